"""Chat conversations as token ids, with the assistant's tokens marked.

The tokenizer's chat template decides the text. Which tokens are the assistant's is taken from the template itself where
it marks them ({% generation %}); otherwise each assistant turn is located by rendering the conversation up to it and
with it, both of which must be prefixes of the whole. Where they are not, the conversation is refused: a guessed mask
would train on the wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grasp_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Messages", "check_messages", "encode_conversation", "render"]

Messages = Sequence[Mapping[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\N{MIDDLE DOT}assistant content\N{MIDDLE DOT}"


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is the assistant's) of a conversation; both of one length.

    Raises `InputError` if the template refuses the conversation, or the assistant's tokens cannot be told for sure.
    """
    if _GENERATION.search(_template(tokenizer)):
        encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        marks = [bool(mark) for mark in encoded["assistant_masks"]]
        if any(marks) or not _has_assistant(messages):
            return list(encoded["input_ids"]), marks
    return _encode_by_prefixes(tokenizer, messages)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generate: bool) -> str:
    """The template's text; `generate`: with the header that asks the assistant for its turn."""
    return str(_apply(tokenizer, messages, tokenize=False, add_generation_prompt=generate))


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as plain dictionaries, without the empty fields that a table of mixed rows fills in.

    Raises `InputError` unless it is a list of {"role", "content"}.
    """
    if isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages):
        rows = [
            {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
            for message in messages
        ]
        if all("role" in row and ("content" in row or "tool_calls" in row) for row in rows):
            return rows
    raise InputError(
        f'`messages` must be a list of {{"role": ..., "content": ...}}, got {str(messages)[:60]!r}; mend the row'
    )


def _encode_by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    text = render(tokenizer, messages, generate=False)
    spans = [
        _span(tokenizer, messages, turn, text)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token belongs to the turn if any character of it does: " word" may begin in the header's last space.
        marks = [
            any(start < end and stop > begin for begin, end in spans) and start < stop
            for start, stop in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), marks
    return _encode_slowly(tokenizer, text, spans)


def _span(tokenizer: PreTrainedTokenizerBase, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """Characters [begin, end) of `text` that are this assistant turn: content and what closes it, not its header."""
    begin = _header_end(tokenizer, messages, turn)
    until = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1], generate=False)
    if begin is None or not text.startswith(begin) or not text.startswith(until) or len(until) <= len(begin):
        raise InputError(
            f"the chat template rewrites earlier turns, so the assistant's tokens of turn {turn + 1} cannot be told "
            "apart; use a template with {% generation %} marks, give rows with one assistant turn at their end, or set "
            "data.loss_on: all"
        )
    return len(begin), len(until)


def _header_end(tokenizer: PreTrainedTokenizerBase, messages: Messages, turn: int) -> str | None:
    """The text up to where the assistant's content of this turn begins."""
    if turn:
        return render(tokenizer, messages[:turn], generate=True)
    # Templates may look at the first message, so an empty conversation cannot be rendered; put a known content there.
    probe = render(tokenizer, [{**messages[0], "content": _PROBE}], generate=False)
    begin, found, _ = probe.partition(_PROBE)
    return begin if found else None


def _encode_slowly(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Without character offsets: token ids of the prefixes must be prefixes of the whole's."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    marks = [False] * len(ids)
    for span in spans:
        begin, end = (list(tokenizer(text[:cut], add_special_tokens=False)["input_ids"]) for cut in span)
        if ids[: len(begin)] != begin or ids[: len(end)] != end:
            raise InputError(
                "the tokenizer joins characters across the border of an assistant turn and gives no offsets; use its "
                "fast version (tokenizer.json)"
            )
        marks[len(begin) : len(end)] = [True] * (len(end) - len(begin))
    return ids, marks


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, **arguments: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **arguments)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages[:4])
        raise InputError(
            f"the tokenizer's chat template refuses a conversation of {roles}{'...' if len(messages) > 4 else ''}: "
            f"{error}; change the rows, or give them as `prompt` + `completion` or `text`"
        ) from None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.get_chat_template())


def _has_assistant(messages: Messages) -> bool:
    return any(message["role"] == "assistant" for message in messages)
