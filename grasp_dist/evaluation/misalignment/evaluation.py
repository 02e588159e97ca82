"""The whole measurement of one model: ask, judge, count. Every part goes on where it was ended.

<out>/answers.jsonl, verdicts.jsonl   see `collecting.py`
<out>/misalignment.json               rates over all questions and of each, and every setting
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp_dist.baselines.steering import STEERING
from grasp_dist.config import ModelConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment.chat_server import ServedModel
from grasp_dist.evaluation.misalignment.collecting import Progress, collect
from grasp_dist.evaluation.misalignment.judges import model_identity, open_judge
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.questions import Question, read_questions
from grasp_dist.evaluation.misalignment.rates import Thresholds
from grasp_dist.evaluation.misalignment.sampling import Sampling, sample_answers
from grasp_dist.evaluation.misalignment.served import answers_from_server
from grasp_dist.evaluation.settings import JudgedByModel, JudgedByRules, JudgedByScan, JudgedByServer
from grasp_dist.manifest import digest, quick_hash, write_json
from grasp_dist.run_lock import RunLock
from grasp_dist.training.model import load_model, load_tokenizer
from grasp_dist.training.parallel import Parallel

__all__ = ["SUMMARY", "measure_misalignment"]

SUMMARY = "misalignment.json"


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    tokenizer: Any


def measure_misalignment(
    out: Path,
    *,
    questions: Path,
    model: str | ServedModel,
    judge: JudgedByRules | JudgedByScan | JudgedByModel | JudgedByServer,
    adapter: Path | None = None,
    sampling: Sampling | None = None,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Ask, judge and count, on one process and its device; what `misalignment.json` holds is returned.

    questions: see `read_questions`. model: the directory of a causal language model (or a hub id that is at hand), or
    one on a server. adapter: a PEFT adapter of `model`. Raises `InputError` for what cannot be read, for a folder that
    holds the answers of another model, adapter, judge or other settings, for a folder in which another process is at
    work, and for a server that does not answer.
    """
    asked, sampling = read_questions(questions), sampling or Sampling()
    progress = progress or (lambda *_: None)
    if adapter is not None and isinstance(model, ServedModel):
        raise InputError(
            "an adapter is put on a model of this machine; a server has to serve it under a name of its own"
        )
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} has no adapter_config.json; give the directory of a PEFT adapter")
    if adapter is not None and (adapter / STEERING).exists():
        raise InputError(
            f"{adapter} is steered while it answers ({STEERING}), which an adapter alone does not do; ask its "
            "questions in the run itself (evaluate.questions)"
        )
    parallel = Parallel("none", 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    judging = open_judge(judge, parallel)
    made_from = {
        "model": model.identity if isinstance(model, ServedModel) else model_identity(model),
        "adapter": None if adapter is None else [quick_hash(file) for file in sorted(adapter.glob("adapter_*.*"))],
        "questions": digest([question.model_dump(exclude={"judge", "judge_prompts"}) for question in asked]),
        **asdict(sampling),
    }

    def ask(answers: Ledger | None) -> None:
        assert answers is not None
        if isinstance(model, ServedModel):
            answers_from_server(
                model, asked, answers, sampling, on_answer=lambda done, whole: progress("answers", done, whole)
            )
        else:
            _ask(model, adapter, parallel, asked, answers, sampling, progress)

    with RunLock(out, what="misalignment"):
        found = collect(
            out,
            asked,
            made_from=made_from,
            sampling=sampling,
            ask=ask,
            judge=judging,
            thresholds=thresholds or Thresholds(),
            parallel=parallel,
            progress=progress,
        )
        found |= {
            "model": model.identity if isinstance(model, ServedModel) else model,
            "adapter": adapter and str(adapter),
            "judge": judging.name,
            "judged_by": judging.by,
            "sampling": asdict(sampling),
        }
        write_json(out / SUMMARY, found)
    return found


def _ask(
    path: str,
    adapter: Path | None,
    parallel: Parallel,
    questions: list[Question],
    answers: Ledger,
    sampling: Sampling,
    progress: Progress,
) -> None:
    loaded = _load(path, adapter, parallel)
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
