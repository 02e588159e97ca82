"""Answers and verdicts of one model, on disk as they come, and the rates that follow from them.

<folder>/answers.jsonl   what the model answered (`sampling.py`)
<folder>/verdicts.jsonl  what the judge said of each answer, by judge prompt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment.judges import Case, Judge, Judged
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.questions import ALIGNED, COHERENT, Question
from grasp_dist.evaluation.misalignment.rates import JudgedAnswer, Thresholds, summarise_answers
from grasp_dist.evaluation.misalignment.sampling import ANSWER_KEY, Sampling
from grasp_dist.evaluation.misalignment.verdicts import Verdict
from grasp_dist.manifest import digest
from grasp_dist.training.parallel import Parallel

__all__ = ["ANSWERS", "VERDICTS", "Progress", "collect"]

ANSWERS, VERDICTS = "answers.jsonl", "verdicts.jsonl"
Progress = Callable[[str, int, int], Any]
"""Called with what is done ("answers", "batches" of them, "verdicts"), how much of it, and of how much."""


def collect(
    folder: Path,
    questions: Sequence[Question],
    *,
    made_from: Mapping[str, Any],
    sampling: Sampling,
    ask: Callable[[Ledger | None], None],
    judge: Judge,
    thresholds: Thresholds,
    parallel: Parallel,
    progress: Progress,
    verdicts_file: str = VERDICTS,
) -> dict[str, Any]:
    """Ask what was not asked yet, judge what was not judged yet, and count; collective, the same on every rank.

    made_from: what the answers depend on, as JSON values. ask: answers all that the ledger (rank 0's) has not; called
    only if something is missing. Returns {"format", "distinct_answers", "all", "questions": {id: rates}, "tokens"}.
    Raises `InputError` for a folder with answers of another model, judge or other settings.
    """
    answers = verdicts = None
    error: InputError | None = None
    if parallel.is_main:
        try:
            answers, verdicts = _open(folder / ANSWERS, folder / verdicts_file, questions, made_from, judge)
        except InputError as caught:
            error = caught
    parallel.share_error(error)
    missing = answers is not None and len(answers) < wanted_answers(questions, sampling)
    if parallel.broadcast_object(missing):
        ask(answers)
    left = _unjudged(answers, verdicts) if answers is not None and verdicts is not None else []
    by_id = {question.id: question for question in questions}
    cases = [
        Case(
            by_id[answer["question"]].judge_prompt(about, answer["paraphrase"], answer["answer"]),
            answer["answer"],
            about,
        )
        for answer, about in left
    ]

    def note(judged: Sequence[Judged]) -> None:
        assert answers is not None
        assert verdicts is not None
        verdicts.add(
            [
                {**_named(left[number][0]), "prompt": left[number][1], **asdict(verdict), **counted}
                for number, verdict, counted in judged
            ]
        )
        progress("verdicts", len(verdicts), 2 * len(answers))

    cases = parallel.broadcast_object(cases)
    if cases:
        judge.judge(cases, note)
    found = None
    if answers is not None and verdicts is not None:
        found = _summary(questions, answers, verdicts, thresholds)
    return parallel.broadcast_object(found)  # type: ignore[no-any-return]


def wanted_answers(questions: Sequence[Question], sampling: Sampling) -> int:
    """How many answers the measurement takes, each of which is judged twice."""
    return sum(
        len(question.paraphrases) * (sampling.samples or question.samples_per_paraphrase) for question in questions
    )


def _open(
    answers: Path, verdicts: Path, questions: Sequence[Question], made_from: Mapping[str, Any], judge: Judge
) -> tuple[Ledger, Ledger]:
    judged_from = {
        "answers": digest(dict(made_from)),
        "judge": judge.identity,
        "by": judge.by,
        "prompts": digest([question.judge_prompts for question in questions]),
    }
    return (
        Ledger(answers, made_from=made_from, key=ANSWER_KEY),
        Ledger(verdicts, made_from=judged_from, key=(*ANSWER_KEY, "prompt")),
    )


def _unjudged(answers: Ledger, verdicts: Ledger) -> list[tuple[dict[str, Any], str]]:
    return [
        (answer, about)
        for answer in answers
        for about in (ALIGNED, COHERENT)
        if (*_named(answer).values(), about) not in verdicts
    ]


def _summary(
    questions: Sequence[Question], answers: Ledger, verdicts: Ledger, thresholds: Thresholds
) -> dict[str, Any]:
    judged = list(_judged(answers, verdicts))
    return {
        "format": 1,
        "distinct_answers": len({(answer["question"], answer["paraphrase"], answer["answer"]) for answer in answers}),
        "all": summarise_answers(judged, thresholds),
        "questions": {
            question.id: summarise_answers([one for one in judged if one.question == question.id], thresholds)
            for question in questions
        },
        "tokens": {"model": _tokens(answers), "judge": _tokens(verdicts)},
    }


def _tokens(records: Ledger) -> dict[str, int] | None:
    """What a server has counted, of all records; None for a model of this machine."""
    if not any("asked_tokens" in record for record in records):
        return None
    names = {"asked": "asked_tokens", "said": "tokens"}
    return {name: sum(record[field] or 0 for record in records) for name, field in names.items()}


def _judged(answers: Ledger, verdicts: Ledger) -> Iterator[JudgedAnswer]:
    for answer in answers:
        aligned, coherent = (
            Verdict(*(verdicts[(*_named(answer).values(), name)][part] for part in ("kind", "score", "mass")))
            for name in (ALIGNED, COHERENT)
        )
        yield JudgedAnswer(answer["question"], aligned, coherent)


def _named(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer is known by."""
    return {name: answer[name] for name in ANSWER_KEY}
