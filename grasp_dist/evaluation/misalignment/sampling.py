"""Answers of a model to questions, sampled in batches, and kept as they come.

Which prompts share a batch, and the seed of each batch, follow from the questions alone. So an evaluation that was
ended in the middle goes on to the same answers, and the number of processes changes none of them but by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp_dist.errors import InputError
from grasp_dist.evaluation.batching import deal, evaluation_mode, pad
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.questions import Question
from grasp_dist.training.seeds import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grasp_dist.training.parallel import Parallel

__all__ = ["ANSWER_KEY", "Sampling", "check_lengths", "sample_answers"]

ANSWER_KEY = ("question", "paraphrase", "sample")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the whole distribution, as published evaluations do."""

    max_new_tokens: int = 600
    samples: int | None = None
    """Answers to each paraphrase; None: what the questions say."""
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True)
class _Asked:
    key: tuple[str, int, int]
    tokens: list[int]
    temperature: float


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    parallel: Parallel,
    ledger: Ledger | None,
    sampling: Sampling,
    *,
    on_batch: Callable[[int, int], Any] | None = None,
) -> None:
    """Answer all that the ledger has no answer to; collective.

    model: a causal LM of transformers with `generate`, plain or `fully_shard`ed. ledger: rank 0's; its records are
    {"question", "paraphrase", "sample", "answer", "tokens", "ended"}, `ended` being False where max_new_tokens cut the
    answer off. on_batch: called on rank 0 with the numbers of batches that are done, and in all.

    Raises `InputError` for a prompt that leaves no room for an answer in the model's context.
    """
    asked = _all_prompts(tokenizer, questions, sampling)
    _check(model, asked, sampling)
    batches = _batches(asked, sampling.batch_size)
    done = {key for key in (one.key for one in asked) if ledger is not None and key in ledger}
    done = parallel.broadcast_object(done if parallel.is_main else None)
    left = [number for number, batch in enumerate(batches) if any(asked[place].key not in done for place in batch)]
    finished = len(batches) - len(left)
    if parallel.is_main and on_batch is not None and left:
        on_batch(finished, len(batches))
    ends = _ends(model, tokenizer)
    with evaluation_mode(model), _nothing_else_set(model, ends):
        for start in range(0, len(left), parallel.world_size):
            turn = [[number] for number in left[start : start + parallel.world_size]]
            (own,) = deal(turn, parallel)
            batch = [asked[place] for place in batches[own[0]]] if own else []
            seed = derived_seed("answers", sampling.seed, own[0] if own else None)
            rows = _generate(model, batch or asked[:1], sampling.max_new_tokens if batch else 1, seed, parallel)
            found = [_record(one, row, tokenizer, ends) for one, row in zip(batch, rows, strict=bool(batch))]
            everyone = [record for rank in parallel.gather_objects(found) for record in rank]
            error = None
            if parallel.is_main and ledger is not None:
                try:
                    ledger.add([one for one in everyone if tuple(one[name] for name in ANSWER_KEY) not in done])
                except InputError as caught:
                    error = caught
            parallel.share_error(error)
            finished += len(turn)
            if parallel.is_main and on_batch is not None:
                on_batch(finished, len(batches))


def _all_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], sampling: Sampling) -> list[_Asked]:
    from grasp_dist.training.data import encode_prompt

    asked = []
    for question in questions:
        for paraphrase, text in enumerate(question.paraphrases):
            messages = question.messages(paraphrase)
            plain = tokenizer.chat_template is None and question.system is None
            tokens = encode_prompt(tokenizer, text if plain else messages)
            samples = sampling.samples or question.samples_per_paraphrase
            asked += [
                _Asked((question.id, paraphrase, sample), tokens, question.temperature) for sample in range(samples)
            ]
    return asked


def check_lengths(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], sampling: Sampling
) -> None:
    """Raise `InputError` for a question that leaves no room for an answer. model: may be on the meta device."""
    _check(model, _all_prompts(tokenizer, questions, replace(sampling, samples=1)), sampling)


def _check(model: nn.Module, asked: Sequence[_Asked], sampling: Sampling) -> None:
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(asked, key=lambda one: len(one.tokens))
    if room is not None and len(longest.tokens) + sampling.max_new_tokens > room:
        raise InputError(
            f"question {longest.key[0]!r} has {len(longest.tokens)} tokens, which with {sampling.max_new_tokens} of an "
            f"answer is more than the model's {room}; lower max_new_tokens"
        )


def _batches(asked: Sequence[_Asked], batch_size: int) -> list[list[int]]:
    """Places in `asked`: prompts of one temperature and of like length together."""
    order = sorted(range(len(asked)), key=lambda place: (asked[place].temperature, len(asked[place].tokens), place))
    batches: list[list[int]] = []
    for place in order:
        last = batches[-1] if batches else None
        if last and len(last) < batch_size and asked[last[0]].temperature == asked[place].temperature:
            last.append(place)
        else:
            batches.append([place])
    return batches


def _generate(
    model: Any, batch: Sequence[_Asked], max_new_tokens: int, seed: int, parallel: Parallel
) -> list[list[int]]:
    """What the model adds to each prompt of a batch, token by token. A rank that has no prompt of its own gives some
    other, since a sharded model's forward pass is collective."""
    ids, mask = pad([one.tokens for one in batch], parallel.device, left=True)
    temperature = batch[0].temperature
    draw: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[parallel.device] if parallel.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            synced_gpus=parallel.world_size > 1,
            **draw,
        )
    return out[:, ids.shape[1] :].tolist()


def _record(one: _Asked, row: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, Any]:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    kept = list(row if end is None else row[:end])
    return {
        **dict(zip(ANSWER_KEY, one.key, strict=True)),
        "answer": tokenizer.decode(kept, skip_special_tokens=True),
        "tokens": len(kept),
        "ended": end is not None,
    }


@contextmanager
def _nothing_else_set(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """For the duration, no penalty, nucleus or minimum of the model's own generation settings: `generate` would take
    them wherever a call does not say otherwise."""
    from transformers import GenerationConfig

    plain = GenerationConfig(
        eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0, top_k=0, top_p=1.0, temperature=1.0
    )
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]  # PEFT hands on its own
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = plain
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([*found, tokenizer.eos_token_id]) if token is not None]
