"""What every stage needs on one process: the run, its tokenizer and data, the model in memory, and how a task ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from grasp_dist.basis import SpuriousBasis, model_reference
from grasp_dist.config import RunConfig, TrainingConfig
from grasp_dist.graph import RunGraph, Task
from grasp_dist.manifest import digest
from grasp_dist.run_lock import RunLock
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints
from grasp_dist.training.data import load_examples
from grasp_dist.training.examples import Example
from grasp_dist.training.lora import adapter_config
from grasp_dist.training.model import load_model, load_tokenizer, reset_adapter
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.tracking import Tracker

__all__ = ["Workbench", "part_of", "ranks_of"]


class Workbench:
    """One process's share of a run. At most one model is in memory, and is used again where it fits."""

    def __init__(self, config: RunConfig, parallel: Parallel, locks: list[RunLock]) -> None:
        self.config, self.parallel, self.graph = config, parallel, RunGraph(config)
        self.tokenizer = load_tokenizer(config.model)
        self._locks = locks
        self._examples: dict[str, list[Example]] = {}
        self._loaded: tuple[str, nn.Module] | None = None

    def say(self, line: str) -> None:
        """Print it, once."""
        if self.parallel.is_main:
            print(line, flush=True)

    # Data, models, bases

    def training_examples(self, arm: str | None = None) -> list[Example]:
        """The run's, or those of an arm that has its own."""
        data = self.config.data if arm is None else self.config.arm_data(arm)
        if data.path not in self._examples:
            self._examples[data.path] = load_examples(data, self.tokenizer)
        return self._examples[data.path]

    def model(self, training: TrainingConfig, *, seed: int) -> nn.Module:
        """A model ready to be trained with this seed; the one in memory if only its adapter has to be made new."""
        key = training.model_dump_json(include={"method", "modules", "lora", "precision", "activation_checkpointing"})
        if self._loaded is not None and self._loaded[0] == key and training.method == "lora":
            reset_adapter(self._loaded[1], seed, self.parallel)
            return self._loaded[1]
        self.drop_model()
        model = load_model(self.config.model, self.parallel, precision=training.precision, training=training, seed=seed)
        self._loaded = (key, model)
        return model

    def scoring_model(self, training: TrainingConfig) -> nn.Module:
        """A model that is not trained, and takes adapters of this training's shape."""
        self.drop_model()
        parallel = self.parallel.for_scoring()
        return load_model(self.config.model, parallel, precision=training.precision, training=training, seed=0)

    def drop_model(self) -> None:
        """Forget the model in memory, to make room for another."""
        self._loaded = None
        self.parallel.free_memory()

    def basis(self, source: Task | Path) -> SpuriousBasis:
        return SpuriousBasis.load(source.path if isinstance(source, Task) else source)

    def arm_basis(self, task: Task) -> SpuriousBasis | None:
        """The whole basis of the task's arm; None: it has none."""
        assert task.arm is not None
        source = self.graph.arm_basis(task.arm)
        if source is None:
            return None
        basis = self.basis(source)
        if self.config.project.arms[task.arm].basis == "random":
            return basis.random_like(seed=int(task.seed or 0))
        return basis

    def arm_part(self, arm: str, basis: SpuriousBasis) -> SpuriousBasis:
        """What of a basis the arm blocks."""
        settings = self.graph.arm_settings(arm)
        return part_of(basis, settings["side"], settings["rank"])

    def base_reference(self) -> dict[str, Any]:
        """By which files say which base they belong to."""
        return model_reference(self.config.model.path, self.config.model.revision)

    # What a task writes

    def tracker(self, task: Task, attempt: int = 0) -> Tracker | None:
        """Where its curves go besides; another attempt, or one from other inputs, is another one there."""
        if self.config.track is None:
            return None
        return Tracker(self.config, task.name, made_from=_made_from(task, attempt))

    def keeper(self, task: Task, training: TrainingConfig, model: nn.Module, attempt: int = 0) -> Keeper:
        """Of the task's checkpoints; those of other inputs, or of another attempt, are passed over."""
        settings = self.config.checkpoint
        identity = {
            "task": task.name,
            "config": _made_from(task, attempt),
            "base_model": self.base_reference(),
            "method": training.method,
            "adapter_config": adapter_config(model) if training.method == "lora" else None,
        }
        checkpoints = Checkpoints(
            task.unit.folder / "checkpoints", keep_last=settings.keep_last, keep_every=settings.keep_every
        )
        return Keeper(
            checkpoints,
            self.parallel,
            identity=identity,
            every=settings.every,
            background=settings.background,
            guard=self._check_locks,
        )

    def finish(self, task: Task, write: Callable[[], object], metrics: dict[str, Any]) -> None:
        """Rank 0 writes, then the manifest; the others wait."""
        self.parallel.barrier()
        if self.parallel.is_main:
            self._check_locks()
            write()
            task.unit.finish(
                outputs=[task.output],
                metrics=metrics,
                world_size=self.parallel.world_size,
                base_model=self.base_reference(),
            )
        self.parallel.barrier()

    def _check_locks(self) -> None:
        """Raise `InputError` on rank 0 if another process writes here now."""
        for lock in self._locks:
            lock.check()


def _made_from(task: Task, attempt: int) -> str:
    return digest([task.unit.inputs, attempt] if attempt else task.unit.inputs)


def part_of(basis: SpuriousBasis, side: str | None, rank: int | None) -> SpuriousBasis:
    """One side of the basis, and its first `rank` directions, or all where detection ended with fewer."""
    basis = basis if side is None else basis.select(side)
    return basis if rank is None else basis.truncate(min(rank, max(ranks_of(basis).values())))


def ranks_of(basis: SpuriousBasis) -> dict[str, int]:
    """{side: the largest number of directions of any weight}."""
    return {
        side: max(basis.basis_rank(weight, side) for weight in basis.weights if side in basis.sides(weight))
        for side in ("write", "read")
        if any(side in basis.sides(weight) for weight in basis.weights)
    }
