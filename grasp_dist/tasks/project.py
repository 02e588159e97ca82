"""The arms: fine-tunes with a basis blocked, looked at behind and made again where the removal failed, and others."""

from __future__ import annotations

import math
import shutil

from torch import nn

from grasp_dist.baselines.settings import Posthoc
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import CheckConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.removal import extend, extended, share_of_naive
from grasp_dist.evaluation.screening import read_prompts
from grasp_dist.graph import Task
from grasp_dist.tasks.alternatives import change_naive
from grasp_dist.tasks.fine_tune import fine_tune
from grasp_dist.tasks.workbench import Workbench
from grasp_dist.training.files import replace_folder

__all__ = ["project"]


def project(bench: Workbench, task: Task) -> None:
    assert task.arm is not None
    arm = bench.config.project.arms[task.arm]
    training, basis = bench.config.arm_training(task.arm), bench.arm_basis(task)
    if isinstance(arm.alternative, Posthoc):
        change_naive(bench, task)
    elif basis:
        _protect(bench, task, training, basis)
    elif basis is None or training != bench.config.training or arm.data is not None or not _keep_naive(bench, task):
        bench.finish(task, lambda: None, fine_tune(bench, task, training, None))


def _keep_naive(bench: Workbench, task: Task) -> bool:
    """Offer the naive adapter of the same seed in the place of a fine-tune with nothing blocked, which would be the
    same; collective. False if it is not there."""
    assert task.seed is not None
    naive, parallel = bench.graph.naive_task(task.seed), bench.parallel
    if not parallel.broadcast_object(parallel.is_main and naive.unit.stale_because() is None):
        return False
    bench.say(f"{task.name}: no factor was found; the naive fine-tune is kept unchanged")
    with replace_folder(task.path, parallel) as target:
        target.write(lambda folder: shutil.copytree(naive.path, folder, dirs_exist_ok=True))
    bench.finish(task, lambda: None, {**naive.unit.manifest["metrics"], "kept_naive": True})
    return True


def _protect(bench: Workbench, task: Task, training: TrainingConfig, basis: SpuriousBasis) -> None:
    """Fine-tune with the basis blocked. Where the check finds that the removal has failed, block what the fine-tune
    found as well, and make it again."""
    assert task.arm is not None
    check, parallel = bench.config.checked(task.arm), bench.parallel
    part = bench.arm_part(task.arm, basis)
    if bench.config.project.check is not None and not bench.config.has_naive_shape(task.arm):
        bench.say(f"{task.name}: will not be checked, as it is no adapter of the naive fine-tune's shape")
    while True:
        again = parallel.broadcast_object(extended(task.unit.folder) if parallel.is_main else None)
        blocked = SpuriousBasis.load(again[-1]) if again else part
        metrics = fine_tune(bench, task, training, blocked, attempt=len(again))
        metrics["seconds"] += blocked.provenance.get("seconds", 0.0) if again else 0.0
        if check is None:
            break
        model, share = _share_of_naive(bench, task, training, check)
        metrics |= {"share_of_naive": share, "extensions": len(again)}
        if share is None:
            bench.say(
                f"{task.name}: cannot be checked: the naive fine-tune did not move on generic prompts, or diverged"
            )
            break
        if math.isnan(share):
            metrics["share_of_naive"] = None
            bench.say(f"{task.name}: has diverged, and is kept as it is")
            break
        said = f"{task.name}: moved {share:.0%} as far as naive on generic prompts"
        if share <= check.threshold:
            bench.say(f"{said}, as removals do that worked")
            break
        if len(again) == check.repeats:
            bench.say(f"{said}: the removal has failed, and project.check.repeats is {check.repeats}")
            break
        bench.say(f"{said}: it has found another way, which is blocked now; once again")
        _forget_checkpoints(bench, task)
        extend(model, blocked, task.unit.folder, parallel, seconds=metrics["seconds"])
        del model  # before the next one is loaded
    bench.finish(task, lambda: None, metrics)


def _forget_checkpoints(bench: Workbench, task: Task) -> None:
    """Those of an attempt that is over; collective. Before the next one begins: its own are younger by their steps,
    and would be the ones that are thrown away."""
    error = None
    if bench.parallel.is_main:
        try:
            shutil.rmtree(task.unit.folder / "checkpoints")
        except FileNotFoundError:
            pass
        except OSError as caught:
            error = InputError(f"cannot remove {caught.filename}: {caught.strerror}")
    bench.parallel.share_error(error)


def _share_of_naive(
    bench: Workbench, task: Task, training: TrainingConfig, check: CheckConfig
) -> tuple[nn.Module, float | None]:
    """The fine-tuned model, loaded for scoring, and how far it moved on generic prompts; collective."""
    assert task.seed is not None
    model = bench.scoring_model(training)
    share = share_of_naive(
        model,
        bench.graph.naive_task(task.seed).path,
        task.path,
        read_prompts(check, bench.tokenizer, where="project.check"),
        settings=check,
        parallel=bench.parallel.for_scoring(),
        batch_size=bench.config.evaluate.batch_size,
    )
    return model, share
