"""Probes: JSON-lines files of what to measure, checked and tokenised before any model is loaded.

docs/probes.md describes the files. Prompts and completions are joined by `grasp_dist.training.data`, so that a probe is
tokenised as the training data is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.config import DataConfig, ProbeConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.choices import LETTERS, asked_both_ways, read_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Probe", "ProbeRow", "prepare"]

Line = tuple[str, dict[str, Any]]
"""Where a row stands, for messages, and the row."""


@dataclass(frozen=True)
class ProbeRow:
    """One row as token ids.

    completion: `continuations` are the reference answers, none a prefix of another. pair: they are (a, b). loss:
    `prompt` is the whole sequence and `labels` its targets (-100: not scored). kl: `prompt` alone. choice:
    `continuations` are the options' letters, as often as they can be written, and `values` what each stands for.
    """

    prompt: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    labels: list[int] | None = None
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """One measurement, ready to be scored."""

    config: ProbeConfig
    rows: list[ProbeRow]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def kind(self) -> str:
        return self.config.kind

    def describe(self) -> dict[str, Any]:
        """{name, role, kind, n} for scores.json."""
        return {"name": self.name, "role": self.config.role, "kind": self.kind, "n": len(self.rows)}


def prepare(configs: Sequence[ProbeConfig], tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Read and tokenise every probe file; order is kept.

    Raises `InputError` for a file that is missing, empty or not JSON lines, and for a row that lacks what its kind
    needs or is too long, naming file and line.
    """
    return [Probe(config, _rows(config, tokenizer)) for config in configs]


def _rows(config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> list[ProbeRow]:
    if config.kind == "loss":
        return _loss_rows(config, tokenizer)
    if config.kind == "choice":
        return _choice_rows(config, tokenizer)
    convert = {"completion": _completion_row, "pair": _pair_row, "kl": _kl_row}[config.kind]
    rows = [convert(row, where, config, tokenizer) for where, row in _read(config)]
    if not rows:
        raise InputError(f"probe {config.name!r}: {config.path} has no rows; write one JSON object per line")
    return rows


def _read(config: ProbeConfig) -> Iterator[Line]:
    path = Path(config.path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(
            f"probe {config.name!r}: cannot read {path}: {error.strerror}; correct evaluate.probes, or make the file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"probe {config.name!r}: {path} is not UTF-8 text ({error}); save it as UTF-8") from None
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if config.limit is not None and found == config.limit:
            return
        where = f"probe {config.name!r}: {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, column {error.colno}"
            raise InputError(f"{where} is not JSON ({reason}); write one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object; a {config.kind} row is written {_SHAPES[config.kind]}")
        found += 1
        yield where, row


_SHAPES = {
    "completion": '{"prompt": "...", "completion": "..."} ("messages" for "prompt", "completions": [...] for several)',
    "pair": '{"prompt": "...", "a": "...", "b": "..."} (the prompt may be "", or "messages")',
    "kl": '{"prompt": "..."}, {"text": "..."} or {"messages": [...]}',
}


def _completion_row(
    row: dict[str, Any], where: str, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase
) -> ProbeRow:
    texts = row.get("completions", [row["completion"]] if "completion" in row else None)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{where} has no completion; a completion row is written {_SHAPES['completion']}")
    prompt, answers = _tokens(_prompt(row, where, config.kind), texts, where, config, tokenizer)
    if not prompt:
        raise InputError(f"{where} has an empty prompt, and the tokenizer adds no first token; give the row a prompt")
    # P(a) already counts what begins with a, so longer answers that do are left out.
    distinct = sorted({tuple(answer) for answer in answers}, key=len)
    kept = [list(a) for i, a in enumerate(distinct) if not any(a[: len(b)] == b for b in distinct[:i])]
    return ProbeRow(prompt, kept)


def _pair_row(row: dict[str, Any], where: str, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> ProbeRow:
    texts = [row.get("a"), row.get("b")]
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{where} lacks 'a' or 'b'; a pair row is written {_SHAPES['pair']}")
    prompt, answers = _tokens(_prompt(row, where, config.kind), texts, where, config, tokenizer)
    if not prompt and min(map(len, answers)) < 2:
        raise InputError(
            f"{where} has no prompt and a text of one token, which nothing predicts; give it a prompt or longer texts"
        )
    return ProbeRow(prompt, answers)


def _kl_row(row: dict[str, Any], where: str, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> ProbeRow:
    from grasp_dist.training.data import encode_prompt

    text = row.get("text")
    prompt = text if isinstance(text, str) and text else _prompt(row, where, config.kind)
    tokens = list(_encoded(lambda: encode_prompt(tokenizer, prompt), where))[: config.max_length]
    if not tokens:
        raise InputError(f"{where} has no tokens; a kl row is written {_SHAPES['kl']}")
    return ProbeRow(tokens)


def _loss_rows(config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> list[ProbeRow]:
    from grasp_dist.training.data import load_examples

    data = DataConfig(path=config.path, max_length=config.max_length, limit=config.limit)
    try:
        examples = load_examples(data, tokenizer)
    except InputError as error:
        raise InputError(f"probe {config.name!r}: {error}") from None
    rows = [ProbeRow(list(example.input_ids), labels=list(example.labels)) for example in examples]
    rows = [row for row in rows if any(label != -100 for label in (row.labels or [])[1:])]
    if not rows:
        raise InputError(f"probe {config.name!r}: {config.path} has no token to score; see docs/probes.md")
    return rows


def _choice_rows(config: ProbeConfig, tokenizer: PreTrainedTokenizerBase) -> list[ProbeRow]:
    """Two rows for each wording: the options in their order, and in the reverse."""
    where = f"probe {config.name!r}"
    try:
        questions = read_choices(config.path, config.axis)[: config.limit]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    rows = []
    for asked in asked_both_ways(questions):
        chat = [{"role": "user", "content": asked.prompt}]
        prompt: Any = asked.prompt if tokenizer.chat_template is None else chat
        ways: dict[tuple[int, ...], str] = {}
        head: list[int] = []
        for letter in LETTERS[: len(asked.values)]:
            # " A" begins with a space where that is a token of its own, as all letters then do: not a way to choose.
            head, written = _tokens(prompt, [letter, f" {letter}"], where, config, tokenizer)
            single = {tuple(tokens) for tokens in written if len(tokens) == 1}
            if not single or single & ways.keys():
                raise InputError(f"{where}: the tokenizer has no token {letter!r} of its own to choose an option by")
            ways |= dict.fromkeys(sorted(single), letter)
        value = dict(zip(LETTERS, asked.values, strict=False))
        rows.append(ProbeRow(head, [list(way) for way in ways], values=[value[letter] for letter in ways.values()]))
    return rows


def _prompt(row: dict[str, Any], where: str, kind: str) -> Any:
    """The prompt as text, or as messages in the form of the training data."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        return messages
    raise InputError(f"{where} has no prompt; a {kind} row is written {_SHAPES[kind]}")


def _tokens(
    prompt: Any, texts: list[Any], where: str, config: ProbeConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each text after it."""
    from grasp_dist.training.data import IGNORED, encode_pair

    head: list[int] = []
    tails = []
    for text in texts:
        pair = _encoded(lambda text=text: encode_pair(tokenizer, prompt, text, append_eos=False), where)
        start = next((at for at, label in enumerate(pair.labels) if label != IGNORED), len(pair.labels))
        head, tail = list(pair.input_ids[:start]), list(pair.input_ids[start:])
        if not tail:
            raise InputError(f"{where}: {text!r} has no tokens; leave it out")
        if (length := start + config.own_tokens + len(tail)) > config.max_length:
            raise InputError(
                f"{where} has {length} tokens, more than max_length {config.max_length}; raise the probe's max_length, "
                "or shorten the row"
            )
        tails.append(tail)
    return head, tails


def _encoded(encode: Any, where: str) -> Any:
    try:
        return encode()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
