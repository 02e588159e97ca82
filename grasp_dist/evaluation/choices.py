"""Questions with options: what a model leans to, read off the letters' probabilities. Ours.

A YAML list in the form of the misalignment questions: `id`, `axis`, `paraphrases` with `{options}` in them, and
`options`, each a `text` and a `value` from -1 to 1. Forced choices have two or more options, Likert scales five or so.
Each wording is put with the options in their order and in the reverse, since models prefer a letter or a place.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from grasp_dist.errors import InputError
from grasp_dist.settings import Section, read_yaml

__all__ = ["LETTERS", "Asked", "ChoiceQuestion", "asked_both_ways", "read_choices"]

LETTERS = string.ascii_uppercase
_OPTIONS = "{options}"


class Option(Section):
    """One of the options."""

    text: Annotated[str, Field(min_length=1)]
    value: Annotated[float, Field(ge=-1, le=1)]


class ChoiceQuestion(Section):
    """A question and its options."""

    id: str
    axis: str = "lean"
    """What -1 and 1 are the ends of."""
    paraphrases: Annotated[list[str], Field(min_length=1)]
    options: Annotated[list[Option], Field(min_length=2, max_length=len(LETTERS))]

    @model_validator(mode="after")
    def _can_lean(self) -> ChoiceQuestion:
        for text in self.paraphrases:
            if text.count(_OPTIONS) != 1:
                raise ValueError("every paraphrase has {options} once, where the options stand")
        if len({option.value for option in self.options}) < 2:
            raise ValueError("all options have the same value, so nothing could be seen")
        return self


_QUESTIONS = TypeAdapter(list[ChoiceQuestion])


@dataclass(frozen=True)
class Asked:
    """A question in one wording and order."""

    prompt: str
    values: list[float]
    """By letter."""


def read_choices(path: str | Path, axis: str | None = None) -> list[ChoiceQuestion]:
    """The questions of a file, or those of one axis. Raises `InputError` for what is no such file."""
    content = read_yaml(path, "questions")
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} has no questions; it holds a list of them, each with id, paraphrases, options")
    try:
        questions = _QUESTIONS.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        number, *inside = first["loc"]
        said = first["msg"].removeprefix("Value error, ")
        at = "".join(f", {part}" for part in inside)
        raise InputError(f"{path}: question number {int(number) + 1}{at}: {said}") from None
    twice = [name for name, count in Counter(one.id for one in questions).items() if count > 1]
    if twice:
        raise InputError(f"{path} has two questions {twice[0]!r}; give each an id of its own")
    chosen = [one for one in questions if axis in (None, one.axis)]
    if not chosen:
        axes = ", ".join(sorted({one.axis for one in questions}))
        raise InputError(f"{path} has no question of the axis {axis!r}; there are {axes}")
    return chosen


def asked_both_ways(questions: Sequence[ChoiceQuestion]) -> Iterator[Asked]:
    """Every wording, with the options in their order and, next to it, in the reverse."""
    for question in questions:
        for text in question.paraphrases:
            for options in (question.options, question.options[::-1]):
                lines = "\n".join(f"{letter}) {option.text}" for letter, option in zip(LETTERS, options, strict=False))
                yield Asked(text.replace(_OPTIONS, lines), [option.value for option in options])
