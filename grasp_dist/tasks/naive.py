"""The naive fine-tune: nothing is blocked."""

from __future__ import annotations

from grasp_dist.graph import Task
from grasp_dist.tasks.fine_tune import fine_tune
from grasp_dist.tasks.workbench import Workbench

__all__ = ["naive"]


def naive(bench: Workbench, task: Task) -> None:
    training = bench.config.training if task.half is None else bench.config.half_training()
    bench.finish(task, lambda: None, fine_tune(bench, task, training, basis=None))
