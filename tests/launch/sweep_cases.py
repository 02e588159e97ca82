"""A sweep's run directory with made-up scores, so that what is said about them can be tested in no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grasp_dist.config import RunConfig
from grasp_dist.graph import RunGraph, Task
from grasp_dist.launch.sweep.grid import arms_of, expand
from tests.tiny_runs import tiny_config

__all__ = ["Scores", "made_up", "write_scores"]

Scores = Callable[[str, int], tuple[float | None, float | None]]
"""(model or arm, seed) -> task and drift."""


def made_up(organism: Path, run: Path, **tune: object) -> RunConfig:
    """An expanded configuration; nothing of it has run."""
    tree = tiny_config(organism, run)
    tree["detect"] = {"rounds": 16}
    tree["training"]["steps"] = 16
    tree["tune"] = {"rank": [1, 4, 8], "side": ["write"], "seed": [0, 1, 2], **tune}
    return expand(RunConfig.model_validate(tree))


def write_scores(config: RunConfig, scores: Scores, *, kind: str = "completion") -> None:
    """Every task of the run finished, with evaluations as the evaluate stage leaves them."""
    control = {arm.name for arm in arms_of(config) if arm.control}
    probes = [
        {"name": "task", "role": "task", "kind": kind, "n": 4},
        {"name": "drift", "role": "drift", "kind": "completion", "n": 4},
    ]
    for task in RunGraph(config).tasks(("naive", "detect", "project", "evaluate")):
        finish(task)
        if task.stage != "evaluate":
            continue
        values = scores(str(task.model), task.seed or 0)
        basis = None if task.arm is None else "random" if task.arm in control else "detected"
        row = {
            "model": task.model, "seed": task.seed, "method": None if task.model == "base" else "lora",
            "basis": basis, "basis_rank": None, "seconds": 3.0, "residual": 1e-9, "final_loss": 0.1, "steps": 8,
            "probe_kinds": probes, "shift": None,
            "probes": {name: {"value": value} for name, value in zip(("task", "drift"), values, strict=True)},
        }  # fmt: skip
        task.path.write_text(json.dumps(row))


def finish(task: Task) -> None:
    """The folder of a finished task, with an output that holds nothing."""
    task.unit.folder.mkdir(parents=True, exist_ok=True)
    task.unit.start()
    task.path.write_text(task.name)
    task.unit.finish(outputs=[task.output], metrics={}, world_size=1)
