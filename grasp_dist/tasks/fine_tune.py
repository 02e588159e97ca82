"""One fine-tune, whatever is blocked or trained besides."""

from __future__ import annotations

from typing import Any

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import TrainingConfig
from grasp_dist.evaluation.screening import half_of
from grasp_dist.graph import Task
from grasp_dist.projection import GraspProjector
from grasp_dist.tasks.alternatives import alternative_of
from grasp_dist.tasks.workbench import Workbench
from grasp_dist.training.loop import LoopState, train
from grasp_dist.training.model import save_adapter, save_model
from grasp_dist.training.recorder import Recorder

__all__ = ["fine_tune"]


def fine_tune(
    bench: Workbench, task: Task, training: TrainingConfig, basis: SpuriousBasis | None, *, attempt: int = 0
) -> dict[str, Any]:
    """Its metrics; the trained weights are then in `task.path`. basis: all of it is blocked. attempt: how often it was
    made before; the checkpoints of another attempt are passed over."""
    assert task.seed is not None
    examples, alternative = alternative_of(bench, task)
    if task.half is not None:
        examples = half_of(examples, task.half, bench.config.detect.seed)
    model = bench.model(training, seed=task.seed)
    residual: list[float | None] = []

    def protect(where: Any) -> GraspProjector | None:
        if basis is None:
            return None
        assert task.arm is not None
        settings = bench.graph.arm_settings(task.arm)
        return GraspProjector(where, basis, side=settings["side"], gradient=settings["gradient"], pin=settings["pin"])

    def on_end(state: LoopState) -> None:
        residual.append(None if state.projector is None else max(state.projector.residual().values()))
        if training.method == "lora":
            save_adapter(model, task.path, bench.parallel)
        else:
            save_model(model, bench.tokenizer, task.path, bench.parallel)

    with Recorder(task.unit.folder, bench.parallel, task.name, bench.tracker(task, attempt)) as recorder:
        result = train(
            model,
            examples,
            training,
            bench.parallel,
            seed=task.seed,
            recorder=recorder,
            protect=protect,
            keeper=bench.keeper(task, training, model, attempt),
            on_end=on_end,
            alternative=alternative,
        )
    if training.method == "full":
        bench.drop_model()
    return {
        "final_loss": result.losses[-1],
        "steps": len(result.losses),
        "skipped_steps": len(result.skipped),
        "seconds": result.seconds,
        "device": bench.parallel.device.type,
        "residual": residual[0],
    }
