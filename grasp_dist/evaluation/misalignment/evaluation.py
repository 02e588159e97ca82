"""The whole measurement of one model: ask, judge, count. Every part goes on where it was ended.

<out>/answers.jsonl        what the model answered (`sampling.py`)
<out>/verdicts.jsonl       what the judge said of each answer, by judge prompt
<out>/misalignment.json    rates over all questions and of each, and every setting
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grasp_dist.config import ModelConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment.chat_server import Completion, ServedModel
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.local_judge import LocalJudge
from grasp_dist.evaluation.misalignment.questions import ALIGNED, COHERENT, Question, read_questions
from grasp_dist.evaluation.misalignment.rates import JudgedAnswer, Thresholds, summarise_answers
from grasp_dist.evaluation.misalignment.sampling import ANSWER_KEY, Sampling, sample_answers
from grasp_dist.evaluation.misalignment.served import ServerJudge, answers_from_server
from grasp_dist.evaluation.misalignment.verdicts import Verdict
from grasp_dist.fingerprints import model_reference
from grasp_dist.manifest import digest, quick_hash, write_json
from grasp_dist.run_lock import RunLock
from grasp_dist.training.model import load_model, load_tokenizer
from grasp_dist.training.parallel import Parallel

__all__ = ["ANSWERS", "SUMMARY", "VERDICTS", "measure_misalignment"]

ANSWERS, VERDICTS, SUMMARY = "answers.jsonl", "verdicts.jsonl", "misalignment.json"
_AT_ONCE = 128
"""Verdicts of a model of this machine between two writes."""
Progress = Callable[[str, int, int], Any]
"""Called with what is done ("answers", "batches" of them, "verdicts"), how much of it, and of how much."""


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    tokenizer: Any


def measure_misalignment(
    out: Path,
    *,
    questions: Path,
    model: str | ServedModel,
    judge: str | ServedModel,
    judge_by: Literal["logprobs", "text"] = "logprobs",
    adapter: Path | None = None,
    sampling: Sampling | None = None,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask, judge and count, on one process and its device; what `misalignment.json` holds is returned.

    questions: see `read_questions`. model, judge: directories of causal language models (or hub ids that are at hand),
    or models on a server. judge_by: see `ServerJudge`. adapter: a PEFT adapter of `model`. Raises `InputError` for what
    cannot be read, for a folder that holds the answers of another model, adapter, judge or other settings, for a folder
    in which another process is at work, and for a server that does not answer.
    """
    asked, sampling = read_questions(questions), sampling or Sampling()
    progress = progress or (lambda *_: None)
    if adapter is not None and isinstance(model, ServedModel):
        raise InputError(
            "an adapter is put on a model of this machine; a server has to serve it under a name of its own"
        )
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} has no adapter_config.json; give the directory of a PEFT adapter")
    made_from = {
        "model": _identity(model),
        "adapter": None if adapter is None else [quick_hash(file) for file in sorted(adapter.glob("adapter_*.*"))],
        "questions": digest([question.model_dump(exclude={"judge", "judge_prompts"}) for question in asked]),
        **asdict(sampling),
    }
    by = judge_by if isinstance(judge, ServedModel) else "model"
    judged_by = {"judge": _identity(judge), "by": by, "prompts": digest([question.judge_prompts for question in asked])}
    with RunLock(out, what="misalignment"):
        answers = Ledger(out / ANSWERS, made_from=made_from, key=ANSWER_KEY)
        judged_from = {"answers": digest(made_from), **judged_by}
        verdicts = Ledger(out / VERDICTS, made_from=judged_from, key=(*ANSWER_KEY, "prompt"))
        if len(answers) < _wanted_answers(asked, sampling):
            _ask(model, adapter, asked, answers, sampling, progress)
        if len(verdicts) < 2 * len(answers):
            _judge(judge, judge_by, asked, answers, verdicts, progress)
        found = _summary(asked, answers, verdicts, thresholds)
        found |= {"adapter": adapter and str(adapter), "sampling": asdict(sampling), "judged_by": by}
        found |= {
            name: one if isinstance(one, str) else one.identity for name, one in (("model", model), ("judge", judge))
        }
        found["tokens"] = {"model": _tokens(model, answers), "judge": _tokens(judge, verdicts)}
        write_json(out / SUMMARY, found)
    return found


def _shown(model: str | ServedModel) -> str:
    return model if isinstance(model, str) else model.identity


def _tokens(model: str | ServedModel, records: Ledger) -> dict[str, int] | None:
    """What a server has counted, of all records; None for a model of this machine."""
    if isinstance(model, str):
        return None
    names = {"asked": "asked_tokens", "said": "tokens"}
    return {name: sum(record[field] or 0 for record in records) for name, field in names.items()}


def _identity(model: str | ServedModel) -> str:
    """The hash of a local model, wherever it lies; a hub id as it is; the name of a served one."""
    if isinstance(model, ServedModel):
        return model.identity
    reference = model_reference(model)
    return reference["hash"] or reference["id"]


def _wanted_answers(questions: Sequence[Question], sampling: Sampling) -> int:
    """How many answers the measurement takes, each of which is judged twice."""
    return sum(
        len(question.paraphrases) * (sampling.samples or question.samples_per_paraphrase) for question in questions
    )


def _load(path: str, adapter: Path | None, parallel: Parallel) -> _Loaded:
    config = ModelConfig(path=path)
    precision = "bf16" if parallel.device.type == "cuda" else "fp32"
    tokenizer = load_tokenizer(config)
    model = load_model(config, parallel, precision=precision, training=None, seed=0)
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter).eval()  # type: ignore[arg-type]
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{adapter} is not an adapter of {path}: {reason}") from None
    return _Loaded(model, tokenizer)


def _here() -> Parallel:
    return Parallel("none", 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _ask(
    model: str | ServedModel,
    adapter: Path | None,
    questions: Sequence[Question],
    answers: Ledger,
    sampling: Sampling,
    progress: Progress,
) -> None:
    if isinstance(model, ServedModel):
        answers_from_server(
            model, questions, answers, sampling, on_answer=lambda done, whole: progress("answers", done, whole)
        )
        return
    parallel = _here()
    loaded = _load(model, adapter, parallel)
    sample_answers(
        loaded.model,
        loaded.tokenizer,
        questions,
        parallel,
        answers,
        sampling,
        on_batch=lambda done, whole: progress("batches", done, whole),
    )
    del loaded
    gc.collect()  # room for the judge


def _judge(
    judge: str | ServedModel,
    by: Literal["logprobs", "text"],
    questions: Sequence[Question],
    answers: Ledger,
    verdicts: Ledger,
    progress: Progress,
) -> None:
    by_id = {question.id: question for question in questions}
    left = [
        (answer, name) for answer in answers for name in (ALIGNED, COHERENT) if (*_key(answer), name) not in verdicts
    ]
    prompts = [
        by_id[answer["question"]].judge_prompt(name, answer["paraphrase"], answer["answer"]) for answer, name in left
    ]

    def record(number: int, verdict: Verdict) -> dict[str, Any]:
        answer, name = left[number]
        return {**dict(zip(ANSWER_KEY, _key(answer), strict=True)), "prompt": name, **asdict(verdict)}

    def add(records: list[dict[str, Any]]) -> None:
        verdicts.add(records)
        progress("verdicts", len(verdicts), 2 * len(answers))

    def note(number: int, verdict: Verdict, said: Completion) -> None:
        counted = {"asked_tokens": said.asked_tokens, "tokens": said.said_tokens}
        add([record(number, verdict) | counted])

    if isinstance(judge, ServedModel):
        ServerJudge(judge, by).judge(prompts, note)
        return
    parallel = _here()
    loaded = _load(judge, None, parallel)
    local = LocalJudge(loaded.model, loaded.tokenizer, parallel)
    for start in range(0, len(left), _AT_ONCE):
        found = local.judge(prompts[start : start + _AT_ONCE])
        add([record(number, verdict) for number, verdict in enumerate(found, start)])


def _summary(
    questions: Sequence[Question], answers: Ledger, verdicts: Ledger, thresholds: Thresholds | None
) -> dict[str, Any]:
    judged = list(_judged(answers, verdicts))
    return {
        "format": 1,
        "distinct_answers": len({(*_key(answer)[:2], answer["answer"]) for answer in answers}),
        "all": summarise_answers(judged, thresholds),
        "questions": {
            question.id: summarise_answers([one for one in judged if one.question == question.id], thresholds)
            for question in questions
        },
    }


def _judged(answers: Ledger, verdicts: Ledger) -> Iterator[JudgedAnswer]:
    for answer in answers:
        aligned, coherent = (
            Verdict(*(verdicts[(*_key(answer), name)][part] for part in ("kind", "score", "mass")))
            for name in (ALIGNED, COHERENT)
        )
        yield JudgedAnswer(answer["question"], aligned, coherent)


def _key(answer: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(answer[name] for name in ANSWER_KEY)
