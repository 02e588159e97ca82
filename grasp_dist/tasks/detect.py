"""Screening, and the basis."""

from __future__ import annotations

import json
import time
from pathlib import Path

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection import detect_basis
from grasp_dist.detection.deflation import deflate
from grasp_dist.evaluation.runs import gain_share, naive_losses, too_short
from grasp_dist.evaluation.screening import compare_halves, read_prompts
from grasp_dist.graph import Task
from grasp_dist.manifest import write_json
from grasp_dist.tasks.workbench import Workbench
from grasp_dist.training.recorder import Recorder

__all__ = ["detect"]


def detect(bench: Workbench, task: Task) -> None:
    if task.name == "screen":
        _screen(bench, task)
        return
    started = time.monotonic()
    settings = bench.config.detect
    method = task.unit.inputs.get("method", settings.method)
    provenance = {"base_model": bench.base_reference(), "settings": settings.model_dump(), "seeds": [settings.seed]}
    if task.name == "detect" and settings.screen is not None and not _factor_found(bench):
        bench.say("detect: no factor was found, so nothing is blocked")
        basis = SpuriousBasis.empty({**provenance, "method": "none: no factor found"})
    elif method == "file":
        basis = SpuriousBasis.load(str(settings.basis))
    elif method == "one_shot":
        adapter = Path(settings.adapter) if settings.adapter else task.upstream[0].path
        basis = detect_basis(adapter, rank=settings.rank, side=settings.side, base_model=bench.config.model.path)
    else:
        training = bench.config.training
        model = bench.model(training, seed=settings.seed)
        with Recorder(task.unit.folder, bench.parallel, task.name, bench.tracker(task)) as recorder:
            basis = deflate(
                model,
                bench.training_examples(),
                training=training,
                detect=settings,
                parallel=bench.parallel,
                folder=task.unit.folder,
                recorder=recorder,
                keeper=bench.keeper(task, training, model),
                provenance={"method": f"{method} deflation", **provenance},
            )
        if said := too_short(gain_share(basis.provenance["gains"], naive_losses(Path(bench.config.run_dir)))):
            bench.say(f"{task.name}: {said}")
    bench.finish(task, lambda: basis.save(task.path), {"seconds": time.monotonic() - started})


def _screen(bench: Workbench, task: Task) -> None:
    settings = bench.config.detect.screen
    assert settings is not None
    started = time.monotonic()
    found = compare_halves(
        bench.scoring_model(bench.config.training),
        (task.upstream[0].path, task.upstream[1].path),
        read_prompts(settings, bench.tokenizer),
        settings=settings,
        parallel=bench.parallel.for_scoring(),
        batch_size=bench.config.evaluate.batch_size,
    )
    bench.say(f"screen: {found.describe()}")
    metrics = {"found": found.found, "seconds": time.monotonic() - started}
    bench.finish(task, lambda: write_json(task.path, found.to_json()), metrics)


def _factor_found(bench: Workbench) -> bool:
    return bool(json.loads(bench.graph.screen_task().path.read_text())["found"])
