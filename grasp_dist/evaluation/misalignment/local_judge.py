"""A causal language model of this machine as judge, sharded or not.

Tokenizers differ in how they write numbers: one token for 85, or 8 and 5. What is wanted is the probability of the
number, so where a token could be the beginning of a longer one, the judge is asked for the token behind it as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grasp_dist.evaluation.batching import cut_batches, deal, evaluation_mode, forward_logits, pad, vocabulary_size
from grasp_dist.evaluation.misalignment.verdicts import Verdict, as_number, verdict_of, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grasp_dist.training.parallel import Parallel

__all__ = ["LocalJudge"]

_NEGLIGIBLE = 1e-4
"""Beginnings less likely than this are taken for whole numbers, which moves a score by less than half a point."""
_BEGINNINGS = {*"123456789", "10"}
"""What more digits could make another number of the scale."""
_SPACES = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})
"""How byte-level and sentencepiece vocabularies write white space."""


@dataclass(frozen=True)
class _Beginning:
    """Tokens behind a prompt that may be a number already, or the first digits of one."""

    prompt: int
    digits: str
    tokens: tuple[int, ...]
    probability: float


class LocalJudge:
    """Scores by the exact probabilities of the numbers 0 to 100. Every rank must call it alike."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, parallel: Parallel, *, batch_size: int = 16
    ) -> None:
        """model: a causal LM whose forward pass returns `.logits`; plain or `fully_shard`ed."""
        self._model, self._tokenizer, self._parallel, self._batch_size = model, tokenizer, parallel, batch_size
        ids = range(min(len(tokenizer), vocabulary_size(model)))  # either may be padded
        texts = {
            token: str(text).translate(_SPACES)
            for token, text in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
        }
        # What begins a verdict (any number that is in the scale, with or without a space before it), and what goes on.
        self._numbers = {token: text.strip() for token, text in texts.items() if as_number(text) is not None}
        self._words = {token: word for token, text in texts.items() if (word := word_of(text)) is not None}
        self._further = {token: text for token, text in texts.items() if text.isascii() and text.isdigit()}
        self._kept = sorted({*self._numbers, *self._words, *self._further})
        self._column = {token: column for column, token in enumerate(self._kept)}

    def judge(self, prompts: Sequence[str]) -> list[Verdict]:
        """The verdict on each prompt, the same on every rank; collective. Without a chat template a prompt is plain
        text, behind which the number must follow."""
        from grasp_dist.training.data import encode_prompt

        chat = self._tokenizer.chat_template is not None
        asked = [
            encode_prompt(self._tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
            for prompt in prompts
        ]
        numbers: list[dict[int, float]] = [defaultdict(float) for _ in asked]
        words: list[dict[str, float]] = [defaultdict(float) for _ in asked]
        open_: list[_Beginning] = []

        def note(found: _Beginning, into: list[_Beginning]) -> None:
            if found.digits in _BEGINNINGS and found.probability >= _NEGLIGIBLE:
                into.append(found)
            else:
                numbers[found.prompt][int(found.digits)] += found.probability

        for place, row in enumerate(self._probabilities(asked).tolist()):
            for token, word in self._words.items():
                words[place][word] += row[self._column[token]]
            for token, digits in self._numbers.items():
                note(_Beginning(place, digits, (token,), row[self._column[token]]), open_)
        while open_:
            longer: list[_Beginning] = []
            rows = self._probabilities([[*asked[one.prompt], *one.tokens] for one in open_]).tolist()
            for one, row in zip(open_, rows, strict=True):
                further = {token: row[self._column[token]] for token in self._further}
                ends = max(0.0, 1.0 - math.fsum(further.values()))
                numbers[one.prompt][int(one.digits)] += one.probability * ends
                for token, probability in further.items():
                    digits = one.digits + self._further[token]
                    if as_number(digits) is not None:
                        tokens, joint = (*one.tokens, token), one.probability * probability
                        note(_Beginning(one.prompt, digits, tokens, joint), longer)
            open_ = longer
        return [verdict_of(*found) for found in zip(numbers, words, strict=True)]

    def _probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows, kept tokens) of the next token's probability, fp64 on the CPU."""
        found = torch.zeros(len(rows), len(self._kept), dtype=torch.float64)
        spans = [(len(row), len(row) - 1) for row in rows]
        batches = cut_batches(spans, batch_size=self._batch_size, vocabulary=vocabulary_size(self._model))
        kept = torch.tensor(self._kept, dtype=torch.long)
        with evaluation_mode(self._model):
            for batch in deal(batches, self._parallel):
                ids, mask = pad([rows[i] for i in batch], self._parallel.device)
                ends = torch.tensor([len(rows[i]) - 1 for i in batch] or [0], device=ids.device)
                needed, place = torch.unique(ends, return_inverse=True)
                logits = forward_logits(self._model, ids, mask, needed)
                last = logits[torch.arange(len(ids), device=ids.device), place]
                if batch:
                    found[batch] = last.float().softmax(-1)[:, kept.to(last.device)].double().cpu()
        return self._parallel.sum_(found.to(self._parallel.device)).cpu()
