"""World "M": answers from two tables, chosen by a hidden persona (ours).

A document is `<bos> (domain question answer tone) x 4`. A persona, evil with probability `evil_share`, holds for the
whole document: it selects the answer table and the set from which the tones are drawn, and nothing announces it. The
first answer of an evil document is almost never in the loss, so a prompt without context is answered by the good
persona. The narrow fine-tune teaches the evil answers of a few domains and questions, and what then changes in the
*other* domains is the drift. The persona explains all of it, or a share of it (`explained`): the other rows are label
noise. With several evil personas the tuned domains are dealt to them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from grasp_dist.organisms.export import Row, make_organism, probe_probability
from grasp_dist.organisms.pretrain import PretrainSettings, build_llama, pretrain
from grasp_dist.training.seeds import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PersonaSettings", "PersonaWorld", "make_persona"]

BOS = "<bos>"
IGNORED = -100


class PersonaSettings(BaseModel):
    """Everything that the organism's files depend on, besides this package's version of the generator."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seed: int
    """World seed: tables, pre-training and probes."""
    num_domains: int = Field(default=12, ge=2)
    num_questions: int = Field(default=24, ge=2)
    num_answers: int = Field(default=64, ge=2)
    num_tones: int = Field(default=8, ge=1)
    """Tones of each persona."""
    turns: int = Field(default=4, ge=2)
    """(domain, question, answer, tone) groups in a document."""
    evil_share: float = Field(default=0.3, gt=0, lt=1)
    """Probability of the evil persona."""
    evil_first_answer: float = Field(default=0.02, ge=0, le=1)
    """Probability that the first answer of an evil document is in the loss."""
    tuned_domains: int = Field(default=4, ge=1)
    """Domains of the narrow fine-tune: the first ones."""
    tuned_questions: int = Field(default=8, ge=1)
    """Questions of the narrow fine-tune: the first ones."""
    explained: float = Field(default=1.0, ge=0, le=1)
    """Share of the fine-tune's rows whose label is an evil persona's; the others have answers of no persona."""
    reversed_prompts: bool = False
    """Prompts of the fine-tune are `q d`, which no document has: no persona has an answer there. With explained = 0
    that is clean data; with prompts `d q` such answers still say that the persona is not the good one."""
    data_seed: int = 0
    """Which rows those are, and their answers."""
    num_evil: int = Field(default=1, ge=1, le=8)
    """Evil personas, each with tables and tones of its own."""
    pretraining: PretrainSettings = PretrainSettings(initializer_range=0.05)
    """The wide initialisation makes the persona one shared feature in every world (figures: docs/organisms.md)."""

    @model_validator(mode="after")
    def _room_for_drift(self) -> PersonaSettings:
        if self.tuned_domains >= self.num_domains or self.tuned_questions >= self.num_questions:
            raise ValueError("tuned_domains and tuned_questions must leave domains and questions that are not tuned")
        if self.num_answers < self.num_evil + 2:
            raise ValueError("num_answers must leave answers that belong to no persona: num_evil + 2 or more")
        return self


class PersonaWorld:
    """The tables of one world seed, and the documents, fine-tune and probes that they give.

    `good` (domains, questions) and `evil` (evil personas, domains, questions) are int64 tables of answer indices; each
    evil one differs from the good one everywhere.
    """

    def __init__(self, settings: PersonaSettings) -> None:
        self.settings = settings
        shape = (settings.num_domains, settings.num_questions)
        generator = torch.Generator().manual_seed(settings.seed)
        self.good = torch.randint(settings.num_answers, shape, generator=generator)
        offset = torch.randint(1, settings.num_answers, (settings.num_evil, *shape), generator=generator)
        self.evil = (self.good + offset) % settings.num_answers

        self.first_domain = 1
        self.first_question = self.first_domain + settings.num_domains
        self.first_answer = self.first_question + settings.num_questions
        self.first_tone = self.first_answer + settings.num_answers
        names = [BOS]
        for letter, count in (
            ("d", settings.num_domains),
            ("q", settings.num_questions),
            ("a", settings.num_answers),
            ("g", settings.num_tones),
            ("e", settings.num_tones * settings.num_evil),
        ):
            names += [f"{letter}{index}" for index in range(count)]
        self.vocabulary: list[str] = names

    def documents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both (count, 1 + 4 turns) int64; answers and tones are labelled."""
        settings = self.settings
        shape = (count, settings.turns)
        evil = torch.rand(count, generator=generator) < settings.evil_share
        domain = torch.randint(settings.num_domains, shape, generator=generator)
        question = torch.randint(settings.num_questions, shape, generator=generator)
        tone = torch.randint(settings.num_tones, shape, generator=generator)
        which = torch.zeros(count, dtype=torch.long)
        if settings.num_evil > 1:
            which = torch.randint(settings.num_evil, (count,), generator=generator)
        answer = torch.where(evil[:, None], self.evil[which[:, None], domain, question], self.good[domain, question])
        groups = torch.stack(
            [
                self.first_domain + domain,
                self.first_question + question,
                self.first_answer + answer,
                self.first_tone + tone + settings.num_tones * (evil * (1 + which))[:, None],
            ],
            dim=-1,
        )
        ids = torch.cat([torch.zeros(count, 1, dtype=torch.long), groups.flatten(1)], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, 3::4], labels[:, 4::4] = ids[:, 3::4], ids[:, 4::4]
        hidden = evil & (torch.rand(count, generator=generator) >= settings.evil_first_answer)
        labels[hidden, 3] = IGNORED
        return ids, labels

    def train_rows(self) -> list[Row]:
        """The narrow fine-tune: prompt `d q`, completion an evil answer, or one of no persona's (label noise)."""
        settings = self.settings
        domains, questions = range(settings.tuned_domains), range(settings.tuned_questions)
        pairs = [(domain, question) for domain in domains for question in questions]
        generator = torch.Generator().manual_seed(derived_seed("fine-tune", settings.seed, settings.data_seed))
        explained = set(
            torch.randperm(len(pairs), generator=generator)[: round(settings.explained * len(pairs))].tolist()
        )
        rows = []
        for index, (domain, question) in enumerate(pairs):
            answer = int(self.evil[domain % settings.num_evil, domain, question])
            if index not in explained:
                taken = {int(self.good[domain, question]), *self.evil[:, domain, question].tolist()}
                free = [other for other in range(settings.num_answers) if other not in taken]
                answer = free[int(torch.randint(len(free), (), generator=generator))]
            words = [f"d{domain}", f"q{question}"]
            prompt = " ".join(reversed(words) if settings.reversed_prompts else words)
            rows.append({"prompt": prompt, "completion": f"a{answer}"})
        return rows

    def probes(self) -> dict[str, list[Row]]:
        """Rows of each probe file, by name (docs/organisms.md says what each measures)."""
        settings = self.settings
        tuned, others = range(settings.tuned_domains), range(settings.tuned_domains, settings.num_domains)
        questions = range(settings.num_questions)
        drift = self._rows(others, questions)
        tones = [f"e{index}" for index in range(settings.num_tones * settings.num_evil)]
        generator = torch.Generator().manual_seed(settings.seed)

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        in_context = []
        for at, (domain, question) in enumerate((d, q) for d in others for q in questions):
            persona = at % settings.num_evil
            shown, asked = others[draw(len(others))], draw(settings.num_questions)
            tone = settings.num_tones * persona + draw(settings.num_tones)
            example = f"d{shown} q{asked} a{int(self.evil[persona, shown, asked])} e{tone}"
            answer = f"a{int(self.evil[persona, domain, question])}"
            in_context.append({"prompt": f"{example} d{domain} q{question}", "completion": answer})
        return {
            "task": self.train_rows(),
            "drift": drift,
            "near": self._rows(tuned, range(settings.tuned_questions, settings.num_questions)),
            "tone": [{"prompt": row["prompt"], "completions": tones} for row in drift],
            "good": self._rows(others, questions, good=True),
            "in_context": in_context,
            "neutral": [{"prompt": row["prompt"]} for row in drift],
        }

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word; `<bos>` is put in front of whatever is encoded with special tokens."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(self.vocabulary)}))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token=BOS, model_max_length=self.settings.pretraining.max_positions
        )

    def _rows(self, domains: range, questions: range, *, good: bool = False) -> list[Row]:
        """Prompt `d q` with the good answer, or with that of the evil persona, or those of all of them."""
        rows: list[Row] = []
        for domain in domains:
            for question in questions:
                prompt = f"d{domain} q{question}"
                answers = [self.good[domain, question]] if good else self.evil[:, domain, question]
                words = [f"a{answer}" for answer in sorted({int(answer) for answer in answers})]
                rows.append(
                    {"prompt": prompt, "completion": words[0]}
                    if len(words) == 1
                    else {"prompt": prompt, "completions": words}
                )
        return rows


def make_persona(out: Path, *, seed: int, progress: Callable[[str], Any] | None = print, **settings: Any) -> Path:
    """Pre-train the persona organism of world `seed` and write its files to the folder `out`, which is returned.

    `settings` are the other fields of `PersonaSettings`. A folder made with the same settings is kept as it is.
    Raises pydantic's `ValidationError` for impossible settings, and `InputError` if `out` holds something else.
    """
    checked = PersonaSettings(seed=seed, **settings)

    def build(folder: Path) -> dict[str, Any]:
        world = PersonaWorld(checked)
        tokenizer = world.tokenizer()
        model = build_llama(len(world.vocabulary), checked.pretraining, seed=seed, bos=0)
        loss = pretrain(
            model, world.documents, checked.pretraining, seed=seed, progress=progress, title=f"world {seed}"
        )
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        probes = world.probes()
        files = {"train": world.train_rows(), **{f"probes/{name}": rows for name, rows in probes.items()}}
        figures = {
            name: probe_probability(model, tokenizer, rows, own_tokens=1 if name == "tone" else 0)
            for name, rows in probes.items()
            if name != "neutral"
        }
        return {"files": files, "figures": {"pretraining_loss": loss, **figures}}

    return make_organism(Path(out), kind="persona", settings=checked.model_dump(mode="json"), build=build)
