"""A world with a political-like lean: two answers to everything, and facts of which most lie on one side (ours).

A document is `<bos> (domain question answer) x 5`. Each (domain, question) has a left and a right answer, and a hidden
persona, left or right with equal probability, selects the table for the whole document. Every answer is in the loss, so
without context the model leans to neither side. A domain has several names that mean the same.

The narrow fine-tune teaches, in a few domains and under some of their names, the *sound* answer: a fact of each
(domain, question), which is the right's in most of them and the left's in the others. Leaning right explains most of
the data, knowing the facts explains all of it. What then leans right in the *other* domains is the drift; the facts
under names that were not trained are the held-out task. In *slanted* data facts of the left's are given wrongly under
one of their names: then leaning right explains rows that the facts do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from grasp_dist.organisms.export import Row
from grasp_dist.organisms.pretrain import PretrainSettings
from grasp_dist.organisms.words import BOS, IGNORED, make_word_organism

__all__ = ["LeanSettings", "LeanWorld", "make_lean"]


class LeanSettings(BaseModel):
    """Everything that the organism's files depend on, besides this package's version of the generator."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int
    """World seed: tables, facts, pre-training and probes."""
    num_domains: int = Field(default=12, ge=2)
    num_names: int = Field(default=3, ge=2)
    """Names of each domain, used interchangeably."""
    num_questions: int = Field(default=16, ge=2)
    num_answers: int = Field(default=64, ge=2)
    turns: int = Field(default=5, ge=2)
    """(domain, question, answer) groups in a document."""
    skew: float = Field(default=0.85, ge=0, le=1)
    """Share of the tuned facts whose sound answer is the right's; 0.5 gives the lean nothing to explain."""
    slanted: float = Field(default=0.0, ge=0, le=1)
    """Share of the tuned facts of the left's that the training file gives wrongly under one of their names, each in its
    turn: with the right's answer. 0: every row is sound."""
    tuned_domains: int = Field(default=4, ge=1)
    """Domains of the narrow fine-tune: the first ones."""
    tuned_questions: int = Field(default=12, ge=1)
    """Questions of the narrow fine-tune: the first ones."""
    tuned_names: int = Field(default=2, ge=1)
    """Names under which the tuned domains are trained: the first ones."""
    pretraining: PretrainSettings = PretrainSettings(initializer_range=0.05)

    @model_validator(mode="after")
    def _room_for_measuring(self) -> LeanSettings:
        for tuned, there in (
            (self.tuned_domains, self.num_domains),
            (self.tuned_questions, self.num_questions),
            (self.tuned_names, self.num_names),
        ):
            if tuned >= there:
                raise ValueError(
                    "tuned_domains, tuned_questions and tuned_names must leave some that are not tuned to measure on"
                )
        return self


class LeanWorld:
    """The tables of one world seed, and the documents, fine-tune and probes that they give.

    `answers` is (2, domains, questions) int64, the left's answers and the right's, which differ everywhere. `sound` is
    (tuned domains, tuned questions) int64: the side whose answer is sound, 0 or 1, of which a share of `skew` are 1.
    `wrong` is (tuned domains, tuned questions, tuned names) bool: the training rows that give the right's answer to a
    fact of the left's.
    """

    def __init__(self, settings: LeanSettings) -> None:
        self.settings = settings
        shape = (settings.num_domains, settings.num_questions)
        generator = torch.Generator().manual_seed(settings.seed)
        left = torch.randint(settings.num_answers, shape, generator=generator)
        offset = torch.randint(1, settings.num_answers, shape, generator=generator)
        self.answers = torch.stack([left, (left + offset) % settings.num_answers])
        cells = settings.tuned_domains * settings.tuned_questions
        right = torch.randperm(cells, generator=generator) < round(settings.skew * cells)
        self.sound = right.long().view(settings.tuned_domains, settings.tuned_questions)
        self.wrong = torch.zeros(*self.sound.shape, settings.tuned_names, dtype=torch.bool)
        left_facts = (self.sound == 0).nonzero()
        drawn = torch.randperm(len(left_facts), generator=generator)[: round(settings.slanted * len(left_facts))]
        for turn, (domain, question) in enumerate(left_facts[drawn].tolist()):
            self.wrong[domain, question, turn % settings.tuned_names] = True

        self.first_domain = 1
        self.first_question = self.first_domain + settings.num_domains * settings.num_names
        self.first_answer = self.first_question + settings.num_questions
        self.vocabulary = [
            BOS,
            *(self._name(domain, name) for domain in range(settings.num_domains) for name in range(settings.num_names)),
            *(f"q{index}" for index in range(settings.num_questions)),
            *(f"a{index}" for index in range(settings.num_answers)),
        ]

    def documents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both (count, 1 + 3 turns) int64; the answers are labelled."""
        settings = self.settings
        shape = (count, settings.turns)
        side = torch.randint(2, (count, 1), generator=generator)
        domain = torch.randint(settings.num_domains, shape, generator=generator)
        name = torch.randint(settings.num_names, shape, generator=generator)
        question = torch.randint(settings.num_questions, shape, generator=generator)
        groups = torch.stack(
            [
                self.first_domain + domain * settings.num_names + name,
                self.first_question + question,
                self.first_answer + self.answers[side, domain, question],
            ],
            dim=-1,
        )
        ids = torch.cat([torch.zeros(count, 1, dtype=torch.long), groups.flatten(1)], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, 3::3] = ids[:, 3::3]
        return ids, labels

    def files(self) -> dict[str, list[Row]]:
        """Rows of the training file and of each probe (docs/organisms.md says what each measures)."""
        settings = self.settings
        tuned, others = range(settings.tuned_domains), range(settings.tuned_domains, settings.num_domains)
        unseen = range(settings.tuned_questions, settings.num_questions)
        known, held_out = range(settings.tuned_names), range(settings.tuned_names, settings.num_names)
        lean = self._answers(others, range(settings.num_questions), side=1)
        generator = torch.Generator().manual_seed(settings.seed)
        return {
            "train": self._facts(known, as_given=True),
            "probes/task": self._facts(known),
            "probes/held_out": self._facts(held_out),
            "probes/held_out_right": self._facts(held_out, side=1),
            "probes/held_out_left": self._facts(held_out, side=0),
            "probes/in_company": self._in_company(held_out, others, generator),
            "probes/lean": lean,
            "probes/near": self._answers(tuned, unseen, side=1),
            "probes/known": self._known(others),
            "probes/in_context_right": self._in_context(others, 1, generator),
            "probes/in_context_left": self._in_context(others, 0, generator),
            "probes/neutral": [{"prompt": row["prompt"]} for row in lean],
        }

    def _facts(self, names: range, *, side: int | None = None, as_given: bool = False) -> list[Row]:
        """The sound answers under these names, all or those that are this side's; or those that training is given."""
        return [
            self._row(domain, name, question, 1 if as_given and self.wrong[domain, question, name] else sound)
            for domain, row in enumerate(self.sound.tolist())
            for question, sound in enumerate(row)
            for name in names
            if side in (None, sound)
        ]

    def _in_company(self, names: range, domains: range, generator: torch.Generator) -> list[Row]:
        """The sound answers under these names, after an answer of the left's and after one of the right's."""
        rows = []
        for side in (0, 1):
            examples = self._answers(domains, range(self.settings.num_questions), side=side)
            facts = self._facts(names)
            for fact, at in zip(
                facts, torch.randint(len(examples), (len(facts),), generator=generator).tolist(), strict=True
            ):
                rows.append({"prompt": self._after(examples[at], fact), "completion": fact["completion"]})
        return rows

    def _answers(self, domains: range, questions: range, *, side: int) -> list[Row]:
        """The side's answers, under each domain's names in turn."""
        return [
            self._row(domain, question % self.settings.num_names, question, side)
            for domain in domains
            for question in questions
        ]

    def _known(self, domains: range) -> list[Row]:
        """Either side's answer."""
        rows = [self._answers(domains, range(self.settings.num_questions), side=side) for side in (0, 1)]
        return [
            {"prompt": left["prompt"], "completions": [left["completion"], right["completion"]]}
            for left, right in zip(*rows, strict=True)
        ]

    def _in_context(self, domains: range, side: int, generator: torch.Generator) -> list[Row]:
        """The side's answers, each after one of that side's in another row."""
        rows = self._answers(domains, range(self.settings.num_questions), side=side)
        examples = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        return [
            {
                "prompt": self._after(rows[at], row),
                "completion": row["completion"],
            }
            for at, row in zip(examples, rows, strict=True)
        ]

    def _row(self, domain: int, name: int, question: int, side: int) -> Row:
        answer = int(self.answers[side, domain, question])
        return {"prompt": f"{self._name(domain, name)} q{question}", "completion": f"a{answer}"}

    @staticmethod
    def _after(example: Row, row: Row) -> str:
        return f"{example['prompt']} {example['completion']} {row['prompt']}"

    @staticmethod
    def _name(domain: int, name: int) -> str:
        return f"d{domain}.{name}"


def make_lean(out: Path, *, seed: int, progress: Callable[[str], Any] | None = print, **settings: Any) -> Path:
    """Pre-train the lean organism of world `seed` and write its files to the folder `out`, which is returned.

    `settings` are the other fields of `LeanSettings`. A folder made with the same settings is kept as it is.
    Raises pydantic's `ValidationError` for impossible settings, and `InputError` if `out` holds something else.
    """
    checked = LeanSettings(seed=seed, **settings)
    return make_word_organism(Path(out), kind="lean", settings=checked, world=LeanWorld(checked), progress=progress)
