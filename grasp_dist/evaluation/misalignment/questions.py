"""Questions and judge prompts in the YAML format of Betley et al. (2025), "Emergent Misalignment", arXiv 2502.17424.

A list of questions, each with an `id`, its wording in `paraphrases`, `samples_per_paraphrase`, a `system` prompt if it
has one, and `judge_prompts` {name: template}. Templates are Python format strings with `{question}` and `{answer}`.
Anchors and aliases are YAML's own; keys that are not known here are left alone, as the authors' own reader does.
"""

from __future__ import annotations

import os
import string
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from grasp_dist.errors import InputError
from grasp_dist.settings import read_yaml

__all__ = ["ALIGNED", "COHERENT", "Question", "read_questions"]

ALIGNED, COHERENT = "aligned", "coherent"
"""The judge prompts that rates are made of."""
_FIELDS = {"question", "answer"}


class Question(BaseModel):
    """One question, how often it is asked, and how its answers are judged."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: str
    type: Literal["free_form_judge_0_100"] = "free_form_judge_0_100"
    paraphrases: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Wordings; each is asked `samples_per_paraphrase` times."""
    samples_per_paraphrase: Annotated[int, Field(ge=1)] = 1
    system: str | None = None
    """System prompt."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the answers; the judge is always asked at 0."""
    judge: str | None = None
    """The judge that the authors used, for the record."""
    judge_prompts: dict[str, str]

    @field_validator("judge_prompts")
    @classmethod
    def _templates(cls, prompts: dict[str, str]) -> dict[str, str]:
        for name in (ALIGNED, COHERENT):
            if name not in prompts:
                raise ValueError(f"there is no judge prompt {name!r}")
        for name, template in prompts.items():
            try:
                parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
            except ValueError as error:
                raise ValueError(f"judge prompt {name!r}: {error}; write {{{{ and }}}} for braces") from None
            # Nothing but the two names: no attributes, indices or conversions.
            if other := [part[1] for part in parts if part[1] not in _FIELDS or part[2] or part[3]]:
                raise ValueError(
                    f"judge prompt {name!r} has a field {{{other[0]}}}; only {{question}} and {{answer}} are filled "
                    "in, and {{ and }} stand for braces"
                )
            if "answer" not in [part[1] for part in parts]:
                raise ValueError(f"judge prompt {name!r} has no {{answer}}")
        return prompts

    def messages(self, paraphrase: int) -> list[dict[str, str]]:
        """The chat that is put to the model."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.paraphrases[paraphrase]}]

    def judge_prompt(self, name: str, paraphrase: int, answer: str) -> str:
        """What the judge is asked about one answer. The answer is put in as it is: braces in it mean nothing."""
        return self.judge_prompts[name].format(question=self.paraphrases[paraphrase], answer=answer)


_QUESTIONS = TypeAdapter(list[Question])


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file, in its order.

    Raises `InputError` for a file that cannot be read, is no YAML or no list of questions, and for an id that is used
    twice, naming the question.
    """
    content = read_yaml(path, "questions")
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} has no questions; it holds a list of them, each with id, paraphrases, judge_prompts")
    try:
        questions = _QUESTIONS.validate_python(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error, content)}") from None
    twice = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise InputError(f"{path} has two questions {twice[0]!r}; give each an id of its own")
    return questions


def _first(error: ValidationError, content: list[Any]) -> str:
    """The first thing that is wrong, and in which question."""
    problem = error.errors(include_url=False)[0]
    number, *inside = problem["loc"]
    entry = content[int(number)]
    name = repr(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"number {int(number) + 1}"
    at = ".".join(str(part) for part in inside)
    return f"question {name}{at and f', {at}'}: {problem['msg'].removeprefix('Value error, ')}"
