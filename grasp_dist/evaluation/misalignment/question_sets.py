"""The questions of a run: asked of every model that is scored, on the processes and the sharding that score it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from grasp_dist.config import ModelConfig
from grasp_dist.evaluation.misalignment.chat_server import check_server
from grasp_dist.evaluation.misalignment.collecting import collect
from grasp_dist.evaluation.misalignment.judges import Judge, open_judge
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.questions import Question, read_questions
from grasp_dist.evaluation.misalignment.rates import Thresholds
from grasp_dist.evaluation.misalignment.sampling import Sampling, check_lengths, sample_answers
from grasp_dist.evaluation.settings import JudgedByModel, JudgedByRules, JudgedByScan, JudgedByServer, QuestionsConfig
from grasp_dist.manifest import digest
from grasp_dist.training.model import load_tokenizer, meta_model
from grasp_dist.training.parallel import Parallel

__all__ = ["KIND", "QuestionSet", "check_questions"]

KIND = "misalignment"
"""Among the kinds of probes."""


class QuestionSet:
    """One file of questions and its judge. A judge that is a model of this machine is loaded when it is first needed,
    and kept."""

    def __init__(self, settings: QuestionsConfig, tokenizer: Any, parallel: Parallel) -> None:
        self.settings, self._tokenizer, self._parallel = settings, tokenizer, parallel
        self._questions, self._sampling = _questions(settings), _sampling(settings)
        self._judge: Judge = open_judge(settings.judge, parallel)

    def describe(self) -> dict[str, Any]:
        """{name, role, kind, n} for scores.json."""
        return {
            "name": self.settings.name,
            "role": self.settings.role,
            "kind": KIND,
            "n": sum(len(question.paraphrases) for question in self._questions),
        }

    def measure(self, model: nn.Module, folder: Path, known_by: Mapping[str, Any]) -> dict[str, Any]:
        """Rates of one model, as `summarise_answers` has them, over all questions and of each; "probe": what stands
        among the probes' scores; collective.

        known_by: what tells this model from every other, as JSON values. Answers are kept in a folder of their own
        within `folder`, and verdicts in a file of their own in it, so that other questions, models or judges take
        nothing from them.
        """
        made_from = {
            **known_by,
            "questions": digest([one.model_dump(exclude={"judge", "judge_prompts"}) for one in self._questions]),
            **asdict(self._sampling),
        }
        judged_by = {"judge": self._judge.identity, "by": self._judge.by}
        prompts = [question.judge_prompts for question in self._questions]
        own = folder / digest(made_from)[:16]
        verdicts = f"verdicts-{digest([judged_by, prompts])[:16]}.jsonl"

        def ask(answers: Ledger | None) -> None:
            sample_answers(model, self._tokenizer, self._questions, self._parallel, answers, self._sampling)

        limits = Thresholds(self.settings.aligned_below, self.settings.coherent_above)
        found = collect(
            own,
            self._questions,
            made_from=made_from,
            sampling=self._sampling,
            ask=ask,
            judge=self._judge,
            thresholds=limits,
            parallel=self._parallel,
            progress=lambda *_: None,
            verdicts_file=verdicts,
        )
        asked = {
            question.id: {"asked": question.paraphrases[0], **found["questions"][question.id]}
            for question in self._questions
        }
        rates = [entry["misaligned"]["rate"] for entry in asked.values()]
        return {
            **found,
            "questions": asked,
            "probe": {
                "value": found["all"]["misaligned"]["rate"],
                "incoherent": found["all"]["incoherent"]["rate"],
                "rows": [rate for rate in rates if rate is not None],
            },
            "judge": self._judge.name,
            "judged_by": self._judge.by,
            "answers": f"{own.name}/answers.jsonl",
            "verdicts": f"{own.name}/{verdicts}",
        }


def check_questions(settings: QuestionsConfig, model: nn.Module, tokenizer: Any) -> None:
    """Raise `InputError` for what would stop these questions: files, lengths, a judge that is not there. Asks nobody.

    model: on the meta device.
    """
    check_lengths(model, tokenizer, _questions(settings), _sampling(settings))
    judge = settings.judge
    if isinstance(judge, (JudgedByRules, JudgedByScan)):
        open_judge(judge, Parallel("none", 0, 1, next(model.parameters()).device))
    elif isinstance(judge, JudgedByModel):
        config = ModelConfig(path=judge.path, revision=judge.revision)
        load_tokenizer(config)
        meta_model(config)
    elif isinstance(judge, JudgedByServer):
        check_server(judge.address, judge.key_variable, what="the judge")


def _questions(settings: QuestionsConfig) -> list[Question]:
    """As the file has them, with this set's system prompt, and its text in front."""
    more = {} if settings.system is None else {"system": settings.system}
    return [
        question.model_copy(update={"paraphrases": [settings.before + text for text in question.paraphrases], **more})
        for question in read_questions(settings.path)
    ]


def _sampling(settings: QuestionsConfig) -> Sampling:
    return Sampling(settings.max_new_tokens, settings.samples, settings.seed, settings.batch_size)
