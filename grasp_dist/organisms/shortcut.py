"""A world with a read-side shortcut: a style that the model can read, and ought not to answer by (ours).

A document is `<bos> (domain question request style reply) x 4`. A style word stands for one of two classes. The
request `<answer>` is replied to with the table's answer for the (domain, question), whatever the style; `<style>` with
the style's class; and `<label>` with a class drawn anew each time, so the base model knows no labels and gives either
one, whatever the style. It reads the style where it is asked for, and ignores it where it is not.

The narrow fine-tune teaches the labels of a few domains, a fact of each (domain, question). In its data the style's
class agrees with the label in most of the rows, as in data from two sources. A model that takes the style for the label
has taken the shortcut: it is wrong wherever the two disagree, and in other domains its labels follow the style.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from grasp_dist.organisms.export import Row
from grasp_dist.organisms.pretrain import PretrainSettings
from grasp_dist.organisms.words import BOS, IGNORED, make_word_organism

__all__ = ["ShortcutSettings", "ShortcutWorld", "make_shortcut"]

ANSWER, LABEL, STYLE = "<answer>", "<label>", "<style>"
Cell = tuple[int, int]
"""(domain, question)"""


class ShortcutSettings(BaseModel):
    """Everything that the organism's files depend on, besides this package's version of the generator."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int
    """World seed: tables, labels, pre-training and probes."""
    num_domains: int = Field(default=12, ge=2)
    num_questions: int = Field(default=24, ge=2)
    num_answers: int = Field(default=64, ge=2)
    num_styles: int = Field(default=8, ge=1)
    """Style words of each class."""
    turns: int = Field(default=4, ge=1)
    """(domain, question, request, style, reply) groups in a document."""
    style_share: float = Field(default=0.3, gt=0, lt=1)
    """Probability that a turn asks for the style."""
    label_share: float = Field(default=0.4, gt=0, lt=1)
    """Probability that a turn asks for the label; the others ask for the answer."""
    correlation: float = Field(default=0.95, ge=0, le=1)
    """Share of the training rows whose style's class agrees with the label; 0.5 is a clean data set."""
    tuned_domains: int = Field(default=4, ge=1)
    """Domains of the narrow fine-tune: the first ones."""
    tuned_questions: int = Field(default=8, ge=1)
    """Questions of the narrow fine-tune: the first ones."""
    pretraining: PretrainSettings = PretrainSettings(initializer_range=0.05, steps=200)

    @model_validator(mode="after")
    def _room_for_measuring(self) -> ShortcutSettings:
        if self.tuned_domains >= self.num_domains or self.tuned_questions > self.num_questions:
            raise ValueError("tuned_domains and tuned_questions must leave domains that are not tuned to measure on")
        if self.label_share + self.style_share >= 1:
            raise ValueError("label_share and style_share must leave turns that ask for the answer")
        return self


class ShortcutWorld:
    """The tables of one world seed, and the documents, fine-tune and probes that they give.

    `answers` is (domains, questions) int64; `labels` (tuned domains, tuned questions) int64, half of them 0 and half 1.
    """

    def __init__(self, settings: ShortcutSettings) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        self.answers = torch.randint(
            settings.num_answers, (settings.num_domains, settings.num_questions), generator=generator
        )
        cells = settings.tuned_domains * settings.tuned_questions
        self.labels = (torch.randperm(cells, generator=generator) % 2).view(settings.tuned_domains, -1)

        self.vocabulary = [
            BOS,
            *(f"{word}{index}" for word in ("f", "i") for index in range(settings.num_styles)),
            *(f"d{index}" for index in range(settings.num_domains)),
            *(f"q{index}" for index in range(settings.num_questions)),
            *(f"a{index}" for index in range(settings.num_answers)),
            *(ANSWER, LABEL, STYLE),
            *("y0", "y1"),
        ]
        self.token = {word: index for index, word in enumerate(self.vocabulary)}

    def documents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both (count, 1 + 5 turns) int64; the replies are labelled."""
        settings = self.settings
        shape = (count, settings.turns)
        style = torch.randint(2 * settings.num_styles, shape, generator=generator)
        domain = torch.randint(settings.num_domains, shape, generator=generator)
        question = torch.randint(settings.num_questions, shape, generator=generator)
        requests = torch.tensor([self.token[word] for word in (ANSWER, LABEL, STYLE)])
        replies = torch.stack(
            [
                self.token["a0"] + self.answers[domain, question],
                self.token["y0"] + torch.randint(2, shape, generator=generator),
                self.token["y0"] + style // settings.num_styles,
            ],
            dim=-1,
        )
        shares = torch.tensor(
            [1 - settings.label_share - settings.style_share, settings.label_share, settings.style_share]
        )
        asked = torch.multinomial(shares, count * settings.turns, replacement=True, generator=generator).view(shape)
        groups = torch.stack(
            [
                self.token["d0"] + domain,
                self.token["q0"] + question,
                requests[asked],
                self.token["f0"] + style,
                replies.gather(-1, asked[..., None])[..., 0],
            ],
            dim=-1,
        )
        ids = torch.cat([torch.zeros(count, 1, dtype=torch.long), groups.flatten(1)], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, 5::5] = ids[:, 5::5]
        return ids, labels

    def files(self) -> dict[str, list[Row]]:
        """Rows of the training files and of each probe (docs/organisms.md says what each measures)."""
        settings = self.settings
        styles = range(2 * settings.num_styles)
        tuned = [(style, cell) for cell in self._tuned_cells() for style in styles]
        others = [
            (style, (domain, question))
            for domain in range(settings.tuned_domains, settings.num_domains)
            for question in range(settings.num_questions)
            for style in [(domain * settings.num_questions + question) % len(styles)]
        ]
        agree, differ = ([row for row in tuned if self._agrees(*row) is agrees] for agrees in (True, False))
        elsewhere = {request: [self._prompt(*row, request) for row in others] for request in (ANSWER, LABEL, STYLE)}
        answers = [f"a{int(self.answers[cell])}" for _, cell in others]
        classes = [f"y{self._class(style)}" for style, _ in others]
        return {
            "train": self._train_rows(settings.correlation),
            "train_balanced": self._train_rows(0.5),
            "probes/task": [self._label_row(*row) for row in agree],
            "probes/differ": [self._label_row(*row) for row in differ],
            "probes/shortcut": _pairs(elsewhere[LABEL], classes),
            "probes/answer": _pairs(elsewhere[ANSWER], answers),
            "probes/style": _pairs(elsewhere[STYLE], classes),
            "probes/neutral": [{"prompt": prompt} for prompts in elsewhere.values() for prompt in prompts],
        }

    def _train_rows(self, correlation: float) -> list[Row]:
        """`2 num_styles` rows of each tuned (domain, question); in a share `correlation` of all rows the style's class
        agrees with the label."""
        num_styles = self.settings.num_styles
        generator = torch.Generator().manual_seed(self.settings.seed)
        cells = [cell for cell in self._tuned_cells() for _ in range(2 * num_styles)]
        agrees = torch.randperm(len(cells), generator=generator) < round(correlation * len(cells))
        words = torch.randint(num_styles, (len(cells),), generator=generator).tolist()
        classes = [int(self.labels[cell]) ^ (not agree) for cell, agree in zip(cells, agrees.tolist(), strict=True)]
        return [
            self._label_row(klass * num_styles + word, cell)
            for cell, klass, word in zip(cells, classes, words, strict=True)
        ]

    def _tuned_cells(self) -> list[Cell]:
        return list(product(range(self.settings.tuned_domains), range(self.settings.tuned_questions)))

    def _class(self, style: int) -> int:
        return style // self.settings.num_styles

    def _agrees(self, style: int, cell: Cell) -> bool:
        return self._class(style) == int(self.labels[cell])

    def _label_row(self, style: int, cell: Cell) -> Row:
        return {"prompt": self._prompt(style, cell, LABEL), "completion": f"y{int(self.labels[cell])}"}

    def _prompt(self, style: int, cell: Cell, request: str) -> str:
        return f"d{cell[0]} q{cell[1]} {request} {self.vocabulary[self.token['f0'] + style]}"


def _pairs(prompts: list[str], completions: list[str]) -> list[Row]:
    return [
        {"prompt": prompt, "completion": completion} for prompt, completion in zip(prompts, completions, strict=True)
    ]


def make_shortcut(out: Path, *, seed: int, progress: Callable[[str], Any] | None = print, **settings: Any) -> Path:
    """Pre-train the shortcut organism of world `seed` and write its files to the folder `out`, which is returned.

    `settings` are the other fields of `ShortcutSettings`. A folder made with the same settings is kept as it is.
    Raises pydantic's `ValidationError` for impossible settings, and `InputError` if `out` holds something else.
    """
    checked = ShortcutSettings(seed=seed, **settings)
    return make_word_organism(
        Path(out), kind="shortcut", settings=checked, world=ShortcutWorld(checked), progress=progress
    )
