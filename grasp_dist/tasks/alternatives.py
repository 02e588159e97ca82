"""What an arm's alternative needs from the run: its examples, the naive fine-tune's shift, the naive adapter."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from grasp_dist.architecture import decoder_layers
from grasp_dist.baselines.activation_shift import ActivationShift, measure_shift
from grasp_dist.baselines.post_hoc import change_adapter
from grasp_dist.baselines.settings import Steering
from grasp_dist.baselines.steering import save_steering
from grasp_dist.baselines.training import examples_of, objective_of, shifted_layers
from grasp_dist.graph import Task
from grasp_dist.tasks.workbench import Workbench
from grasp_dist.training.examples import Example
from grasp_dist.training.files import replace_folder
from grasp_dist.training.loop import Alternative
from grasp_dist.training.model import load_adapter, meta_model, model_folder

__all__ = ["alternative_of", "change_naive"]


def alternative_of(bench: Workbench, task: Task) -> tuple[list[Example], Alternative | None]:
    """The examples of the task's fine-tune, and what its alternative, if it has one, trains it with; collective."""
    examples = bench.training_examples(task.arm)
    settings = None if task.arm is None else bench.config.project.arms[task.arm].alternative
    if settings is None:
        return examples, None
    own = examples_of(settings, examples, bench.config.data, bench.tokenizer, seed=int(task.seed or 0))
    return own, objective_of(settings, _naive_shift(bench, task, settings, examples))


def change_naive(bench: Workbench, task: Task) -> None:
    """A post-hoc alternative: the naive adapter of the seed, changed; nothing is trained."""
    assert task.arm is not None
    settings, naive = bench.config.project.arms[task.arm].alternative, task.upstream[0]
    started = time.monotonic()
    done: dict[str, Any] = {}
    shift = None
    if isinstance(settings, Steering):
        shift = _naive_shift(bench, task, settings, bench.training_examples())

    def write(folder: Path) -> None:
        if isinstance(settings, Steering):
            assert shift is not None
            shutil.copytree(naive.path, folder, dirs_exist_ok=True)
            save_steering(shift.mean, settings.coefficient, folder)
        else:
            done.update(change_adapter(settings, naive.path, model_folder(bench.config.model), folder))

    with replace_folder(task.path, bench.parallel) as target:
        target.write(write)
    trained = naive.unit.manifest["metrics"]
    bench.finish(task, lambda: None, {**trained, **done, "seconds": time.monotonic() - started})


def _naive_shift(bench: Workbench, task: Task, settings: Any, examples: list[Example]) -> ActivationShift | None:
    """Of the naive fine-tune of the task's seed, where the alternative needs it; collective."""
    layers = shifted_layers(settings, len(decoder_layers(meta_model(bench.config.model))))
    if layers is None:
        return None
    parallel = bench.parallel.for_scoring()
    model = bench.scoring_model(bench.config.training)
    load_adapter(model, task.upstream[0].path, parallel)
    return measure_shift(model, examples, parallel, layers=layers, limit=settings.examples)
