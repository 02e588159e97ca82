"""The scores of every model of the run."""

from __future__ import annotations

from typing import Any

from grasp_dist.basis import SpuriousBasis
from grasp_dist.evaluation.evaluator import Evaluator
from grasp_dist.evaluation.removal import extended
from grasp_dist.graph import Task
from grasp_dist.manifest import write_json
from grasp_dist.tasks.workbench import Workbench, part_of, ranks_of

__all__ = ["Evaluation"]


class Evaluation:
    """Scores one task's model after the other; the loaded base, the probes and its reference values are kept."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def __call__(self, bench: Workbench, task: Task) -> None:
        config = bench.config
        if self._evaluator is None:
            bench.drop_model()
            detected = (bench.basis(bench.graph.detect_task()) if config.evaluate.shift else None) or None
            self._evaluator = Evaluator(config, bench.tokenizer, bench.parallel.for_scoring(), detected)
        known_by = {name: task.unit.inputs.get(name) for name in ("model", "precision", "weights", "ablation")}
        known_by |= {"task": task.name, "basis": task.unit.inputs.get("basis") if task.model == "ablation" else None}
        row: dict[str, Any] = {
            "model": task.model,
            "seed": task.seed,
            "method": None,
            "basis": None,
            "basis_rank": None,
        }
        if task.model == "base":
            scores = self._evaluator.base(known_by)
        else:
            source = task.upstream[0]
            training = config.arm_training(task.arm) if task.arm else config.training
            row |= {"method": training.method, **source.unit.manifest["metrics"]}
            ablated = _ablated(bench) if task.model == "ablation" else None
            if task.model == "ablation":
                row |= {"basis": "detected", "basis_rank": ranks_of(ablated) if ablated else {}, "residual": None}
            elif task.arm and (blocked := _blocked(bench, task)) is not None:
                row |= {"basis": bench.graph.arm_settings(task.arm)["basis"], "basis_rank": ranks_of(blocked)}
            scores = self._evaluator.trained(source.path, training, known_by, ablated=ablated)
        if task.arm and (alternative := config.project.arms[task.arm].alternative) is not None:
            row["alternative"] = alternative.model_dump()
        row["probe_kinds"] = self._evaluator.describe_probes()
        bench.finish(task, lambda: write_json(task.path, {**row, **scores}), {})


def _ablated(bench: Workbench) -> SpuriousBasis | None:
    """What inference-time ablation takes out of the naive model; None where nothing was found."""
    found, settings = bench.basis(bench.graph.detect_task()), bench.config.project
    return part_of(found, settings.side, settings.rank) if found else None


def _blocked(bench: Workbench, task: Task) -> SpuriousBasis | None:
    """What was blocked in the end in the fine-tune that this task scores; None: it has no basis."""
    assert task.arm is not None
    basis = bench.arm_basis(task)
    if not basis:
        return basis
    again = extended(task.upstream[0].unit.folder)
    return SpuriousBasis.load(again[-1]) if again else bench.arm_part(task.arm, basis)
