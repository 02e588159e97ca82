"""Training examples: rows of `messages`, `prompt` + `completion`, or `text`, as token ids with a loss mask.

Everything that tokenises, here and in the evaluation, goes through `encode_pair` and `encode_prompt`, so that a model
is trained on and asked with the same tokens. Which examples make a batch is for `batches.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grasp_dist.config import DataConfig
from grasp_dist.errors import InputError
from grasp_dist.training.chat import check_messages, encode_conversation, render
from grasp_dist.training.examples import IGNORED, Example
from grasp_dist.training.packing import pack
from grasp_dist.training.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Example", "RowChange", "encode_pair", "encode_prompt", "load_examples", "preview"]

_logger = logging.getLogger(__name__)

RowChange = Callable[[Mapping[str, Any], str, str], Mapping[str, Any]]
"""change(row, its kind ("messages", "prompt_completion", "text", "single_turn"), where it stands) -> another row."""


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, change: RowChange | None = None
) -> list[Example]:
    """All examples of the data set in its order, cut at `max_length`, packed if asked for; the same on every rank.

    change: rewrites each row before it is tokenised. Rows without a trained token are dropped, with a count in the log.
    Raises `InputError` for data that cannot be read, unknown columns, no rows, or no trained token anywhere.
    """
    rows, columns = read_rows(config)
    kind = _format(config, columns)
    if kind == "messages" and not tokenizer.chat_template:
        kind = "single_turn"
    places: Iterable[tuple[str, Mapping[str, Any]]]
    places = ((f"{config.path}, row {number}", row) for number, row in enumerate(rows, start=1))
    if change is not None:
        places = ((where, change(row, kind, where)) for where, row in places)
    examples = [_example(row, kind, config, tokenizer, where) for where, row in places]
    kept = [example for example in examples if example.num_targets]
    if not kept:
        raise InputError(
            f"no row of {config.path} has a token to train on: every label is masked (data.loss_on is "
            f"{config.loss_on!r}, data.max_length {config.max_length}); raise max_length, set data.loss_on: all, or "
            "see what is masked with `grasp-dist preview-data`"
        )
    if len(kept) < len(examples):
        dropped = len(examples) - len(kept)
        _logger.warning("%s: %d of %d rows have no token to train on, dropped", config.path, dropped, len(examples))
    return pack(kept, config.max_length) if config.packing else kept


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a prompt: text with the tokenizer's own special tokens (BOS), or messages by its chat template with
    the header of the assistant's turn. An empty text is BOS alone, if there is one."""
    if isinstance(prompt, str):
        try:
            ids = list(tokenizer(prompt)["input_ids"])
        except Exception as error:  # bare, of the tokenizer libraries: a word that it has not, for one
            raise InputError(f"the tokenizer cannot read {prompt[:80]!r}: {error}") from None
        eos = tokenizer.eos_token
        # Some tokenizers close every text; a prompt that is to go on must stay open.
        closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(eos))
        return ids[:-1] if closed else ids
    text = render(tokenizer, prompt, generate=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, Any]],
    completion: str,
    *,
    append_eos: bool,
) -> Example:
    """Prompt and completion tokenised apart and joined as token ids; the completion is trained.

    Joining ids keeps the prompt's tokens as they are when the model is asked. No space is put between the two.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if append_eos and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Example(prompt_ids + ids, [IGNORED] * len(prompt_ids) + ids)


def preview(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rows: int = 3
) -> list[list[tuple[str, int, bool]]]:
    """Print the first examples token by token: trained ones highlighted, and [in brackets] where there is no colour.

    Returns (token text, id, trained) for each token of each example.
    """
    from rich.console import Console
    from rich.text import Text

    examples = load_examples(config.model_copy(update={"limit": min(rows, config.limit or rows)}), tokenizer)
    console = Console(soft_wrap=True, highlight=False)
    tables = []
    for number, example in enumerate(examples, start=1):
        table = [
            (str(tokenizer.decode([token])), token, label != IGNORED)
            for token, label in zip(example.input_ids, example.labels, strict=True)
        ]
        tables.append(table)
        console.print(f"example {number}: {len(table)} tokens, {example.num_targets} of them trained", style="bold")
        text = Text()
        for token, _, trained in table:
            shown = token if console.is_terminal or not trained else f"[{token}]"
            text.append(shown, style="black on green" if trained else "dim")
        console.print(text)
    return tables


def _format(config: DataConfig, columns: set[str]) -> str:
    wanted = {"messages": {"messages"}, "prompt_completion": {"prompt", "completion"}, "text": {"text"}}
    for kind, needed in wanted.items():
        if config.format in ("auto", kind) and needed <= columns:
            return kind
    asked = "" if config.format == "auto" else f", and data.format is {config.format!r}"
    raise InputError(
        f"{config.path} has the columns {', '.join(sorted(columns)) or 'none'}{asked}; rows must have `messages`, "
        "`prompt` and `completion`, or `text`: rename the columns"
    )


def _example(
    row: Mapping[str, Any], kind: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str
) -> Example:
    if kind == "text":
        example = _text(tokenizer, _string(row["text"], "text", where), append_eos=config.append_eos)
    elif kind == "single_turn":
        example = _text(tokenizer, _single_turn(row["messages"], where), append_eos=config.append_eos)
    elif kind == "prompt_completion" and isinstance(row["prompt"], str):
        completion = _string(row["completion"], "completion", where)
        example = encode_pair(tokenizer, row["prompt"], completion, append_eos=config.append_eos)
    elif kind == "prompt_completion":
        example = _conversation(tokenizer, [*_turns(row["prompt"]), *_turns(row["completion"])], where)
    else:
        example = _conversation(tokenizer, row["messages"], where)
    ids = example.input_ids[: config.max_length]
    labels = ids if config.loss_on == "all" else example.labels[: config.max_length]
    return Example(ids, [IGNORED, *labels[1:]])


def _text(tokenizer: PreTrainedTokenizerBase, text: str, *, append_eos: bool) -> Example:
    """Every token is trained."""
    ids = encode_prompt(tokenizer, text)
    if append_eos and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Example(ids, list(ids))


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: Any, where: str) -> Example:
    try:
        ids, marks = encode_conversation(tokenizer, check_messages(messages))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Example(ids, [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)])


def _single_turn(messages: Any, where: str) -> str:
    """What a tokenizer without a chat template can still be trained on: one assistant turn, taken as plain text."""
    turns = messages if isinstance(messages, Sequence) else []
    if len(turns) == 1 and turns[0].get("role") == "assistant":
        return _string(turns[0].get("content"), "content", where)
    raise InputError(
        f"{where}: the tokenizer has no chat template, so only conversations of a single assistant turn can be used "
        "(as plain text); set model.tokenizer to one with a template, or give the rows as `prompt` + `completion`"
    )


def _turns(side: Any) -> list[Any]:
    return [{"role": "assistant", "content": side}] if isinstance(side, str) else list(side or [])


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: `{column}` must be a string, got {str(value)[:80]!r}; mend or remove the row")
    return value
