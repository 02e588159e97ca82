"""What the ranks do for each task of a run: train, detect, screen, score, and write what came of it.

`grasp_dist.stages` decides what has to run, and `grasp_dist.graph` what a task is made from.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.baselines.settings import Posthoc, Steering
from grasp_dist.config import CheckConfig, RunConfig, TrainingConfig
from grasp_dist.errors import InputError, Preempted
from grasp_dist.graph import RunGraph, Task
from grasp_dist.manifest import digest, write_json
from grasp_dist.run_lock import RunLock

if TYPE_CHECKING:
    from torch import nn

    from grasp_dist.baselines.activation_shift import ActivationShift
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.training.checkpoints.saving import Keeper
    from grasp_dist.training.parallel import Parallel
    from grasp_dist.training.tracking import Tracker

__all__ = ["Worker"]


class Worker:
    """The tasks' work on one process of the group, with the loaded model kept from task to task where it fits."""

    def __init__(self, config: RunConfig, parallel: Parallel, locks: list[RunLock]) -> None:
        from grasp_dist.training.data import load_examples
        from grasp_dist.training.model import load_tokenizer

        self.config, self.parallel, self.graph, self._locks = config, parallel, RunGraph(config), locks
        self.tokenizer = load_tokenizer(config.model)
        self._load_examples = load_examples
        self._examples: dict[str, list[Any]] = {}
        self._loaded: tuple[str, nn.Module] | None = None
        self._evaluator: Any = None

    def stale_tasks(self, stages: tuple[str, ...], only: Collection[str] | None) -> Iterator[Task]:
        """Each task (of `only` these) that has to run, when its turn comes. Rank 0 looks at the files and decides for
        all."""
        from grasp_dist.training.preemption import stop_requested

        graph = RunGraph(self.config)
        tasks = graph.tasks(stages)
        while True:
            if any(self.parallel.gather_objects(stop_requested())):
                raise Preempted("asked to stop between two tasks; what was finished is kept")
            task = next(tasks, None)
            if task is None:
                return
            if only is not None and task.name not in only:
                continue
            reason = self.parallel.broadcast_object(task.unit.stale_because() if self.parallel.is_main else None)
            if reason is None:
                continue
            graph.require(task)
            self.say(f"{task.name}: {reason}")
            self.parallel.barrier()
            if self.parallel.is_main:
                task.unit.start()
            self.parallel.barrier()
            yield task

    def say(self, line: str) -> None:
        if self.parallel.is_main:
            print(line, flush=True)

    def do(self, task: Task) -> None:
        """The task's work; what stops it is said in its manifest, for those who look at the run from outside."""
        try:
            getattr(self, task.stage)(task)
        except Exception as error:
            if self.parallel.is_main and not isinstance(error, Preempted):
                with suppress(InputError, OSError):
                    task.unit.fail(f"{type(error).__name__}: {error}")
            raise

    # Stages

    def naive(self, task: Task) -> None:
        training = self.config.training if task.half is None else self.config.half_training()
        self._finish(task, lambda: None, self._fine_tune(task, training, basis=None))

    def detect(self, task: Task) -> None:
        from grasp_dist.basis import SpuriousBasis

        started = time.monotonic()
        detect = self.config.detect
        if task.name == "screen":
            self._screen(task)
            return
        method = task.unit.inputs.get("method", detect.method)
        provenance = {"base_model": self._base_reference(), "settings": detect.model_dump(), "seeds": [detect.seed]}
        if task.name == "detect" and detect.screen is not None and not self._factor_found():
            self.say("detect: no factor was found, so nothing is blocked")
            basis = SpuriousBasis.empty({**provenance, "method": "none: no factor found"})
        elif method == "file":
            basis = SpuriousBasis.load(str(detect.basis))
        elif method == "one_shot":
            from grasp_dist.detection import detect_basis

            adapter = Path(detect.adapter) if detect.adapter else task.upstream[0].path
            basis = detect_basis(adapter, rank=detect.rank, side=detect.side, base_model=self.config.model.path)
        else:
            from grasp_dist.detection.deflation import deflate
            from grasp_dist.training.recorder import Recorder

            model = self._model(self.config.training, seed=detect.seed)
            with Recorder(task.unit.folder, self.parallel, task.name, self._tracker(task)) as recorder:
                basis = deflate(
                    model,
                    self._training_examples(),
                    training=self.config.training,
                    detect=detect,
                    parallel=self.parallel,
                    folder=task.unit.folder,
                    recorder=recorder,
                    keeper=self._keeper(task, self.config.training, model),
                    provenance={"method": f"{method} deflation", **provenance},
                )
        self._finish(task, lambda: basis.save(task.path), {"seconds": time.monotonic() - started})

    def project(self, task: Task) -> None:
        assert task.arm is not None
        training, basis = self.config.arm_training(task.arm), self._arm_basis(task)
        if isinstance(self.config.project.arms[task.arm].alternative, Posthoc):
            self._change_naive(task)
        elif basis is None:
            self._finish(task, lambda: None, self._fine_tune(task, training, None))
        elif len(basis):
            self._protect(task, training, basis)
        elif (
            training != self.config.training
            or self.config.project.arms[task.arm].data is not None
            or not self._keep_naive(task)
        ):
            self._finish(task, lambda: None, self._fine_tune(task, training, None))

    def evaluate(self, task: Task) -> None:
        from grasp_dist.evaluation.removal import extended

        graph, config = self.graph, self.config
        if self._evaluator is None:
            from grasp_dist.evaluation.evaluator import Evaluator

            self._loaded = None
            detected = (self._basis(graph.detect_task()) if config.evaluate.shift else None) or None
            self._evaluator = Evaluator(config, self.tokenizer, self.parallel.for_scoring(), detected)
        row: dict[str, Any] = {
            "model": task.model,
            "seed": task.seed,
            "method": None,
            "basis": None,
            "basis_rank": None,
        }
        known_by = {name: task.unit.inputs.get(name) for name in ("model", "precision", "weights", "ablation")}
        known_by |= {"task": task.name, "basis": task.unit.inputs.get("basis") if task.model == "ablation" else None}
        if task.model == "base":
            scores = self._evaluator.base(known_by)
        else:
            source = task.upstream[0]
            training = config.arm_training(task.arm) if task.arm else config.training
            row |= {"method": training.method, **source.unit.manifest["metrics"]}
            ablated = None
            if task.model == "ablation":
                found = self._basis(graph.detect_task())
                ablated = _part(found, config.project.side, config.project.rank) if found else None
                row |= {"basis": "detected", "basis_rank": _ranks(ablated) if ablated else {}, "residual": None}
            elif task.arm and (basis := self._arm_basis(task)) is not None:
                settings = graph.arm_settings(task.arm)
                part = _part(basis, settings["side"], settings["rank"]) if basis else basis
                if again := extended(source.unit.folder):
                    part = self._basis(again[-1])
                row |= {"basis": settings["basis"], "basis_rank": _ranks(part)}
            scores = self._evaluator.trained(source.path, training, known_by, ablated=ablated)
        if task.arm and (alternative := config.project.arms[task.arm].alternative) is not None:
            row["alternative"] = alternative.model_dump()
        row["probe_kinds"] = self._evaluator.describe_probes()
        self._finish(task, lambda: write_json(task.path, {**row, **scores}), {})

    # Their parts

    def _screen(self, task: Task) -> None:
        from grasp_dist.evaluation.screening import compare_halves, read_prompts
        from grasp_dist.training.model import load_model

        settings, training, parallel = self.config.detect.screen, self.config.training, self.parallel.for_scoring()
        assert settings is not None
        started = time.monotonic()
        self._loaded = None
        model = load_model(self.config.model, parallel, precision=training.precision, training=training, seed=0)
        found = compare_halves(
            model,
            (task.upstream[0].path, task.upstream[1].path),
            read_prompts(settings, self.tokenizer),
            settings=settings,
            parallel=parallel,
            batch_size=self.config.evaluate.batch_size,
        )
        self.say(f"screen: {found.describe()}")
        metrics = {"found": found.found, "seconds": time.monotonic() - started}
        self._finish(task, lambda: write_json(task.path, found.to_json()), metrics)

    def _factor_found(self) -> bool:
        return bool(json.loads(self.graph.screen_task().path.read_text())["found"])

    def _keep_naive(self, task: Task) -> bool:
        """Offer the naive adapter of the same seed in the place of a fine-tune with nothing blocked, which would be the
        same; collective. False if it is not there."""
        from grasp_dist.training.files import replace_folder

        assert task.seed is not None
        naive = self.graph.naive_task(task.seed)
        if not self.parallel.broadcast_object(self.parallel.is_main and naive.unit.stale_because() is None):
            return False
        self.say(f"{task.name}: no factor was found; the naive fine-tune is kept unchanged")
        with replace_folder(task.path, self.parallel) as target:
            target.write(lambda folder: shutil.copytree(naive.path, folder, dirs_exist_ok=True))
        self._finish(task, lambda: None, {**naive.unit.manifest["metrics"], "kept_naive": True})
        return True

    def _protect(self, task: Task, training: TrainingConfig, basis: SpuriousBasis) -> None:
        """Fine-tune with the basis blocked. Where the check finds that the removal has failed, block what the fine-tune
        found as well, and make it again."""
        from grasp_dist.evaluation.removal import extend, extended

        assert task.arm is not None
        settings, check = self.graph.arm_settings(task.arm), self.config.checked(task.arm)
        part, seconds = _part(basis, settings["side"], settings["rank"]), 0.0
        while True:
            again = self.parallel.broadcast_object(extended(task.unit.folder) if self.parallel.is_main else None)
            blocked = self._basis(again[-1]) if again else part
            metrics = self._fine_tune(task, training, blocked, attempt=len(again))
            seconds += metrics["seconds"]
            metrics["seconds"] = seconds
            if check is None:
                break
            model, share = self._share_of_naive(task, training, check)
            metrics |= {"share_of_naive": share, "extensions": len(again)}
            if share is None:
                self.say(f"{task.name}: cannot be checked, as the naive fine-tune did not move on generic prompts")
                break
            said = f"{task.name}: moved {share:.0%} as far as naive on generic prompts"
            if share <= check.threshold:
                self.say(f"{said}, as removals do that worked")
                break
            if len(again) == check.repeats:
                self.say(f"{said}: the removal has failed, and project.check.repeats is {check.repeats}")
                break
            self.say(f"{said}: it has found another way, which is blocked now; once again")
            extend(model, blocked, task.unit.folder, self.parallel)
            if self.parallel.is_main:
                shutil.rmtree(task.unit.folder / "checkpoints", ignore_errors=True)
            self.parallel.barrier()
        self._finish(task, lambda: None, metrics)

    def _share_of_naive(
        self, task: Task, training: TrainingConfig, check: CheckConfig
    ) -> tuple[nn.Module, float | None]:
        """The fine-tuned model, loaded for scoring, and how far it moved on generic prompts; collective."""
        from grasp_dist.evaluation.removal import share_of_naive
        from grasp_dist.evaluation.screening import read_prompts
        from grasp_dist.training.model import load_model

        assert task.seed is not None
        self._loaded = None
        parallel = self.parallel.for_scoring()
        model = load_model(self.config.model, parallel, precision=training.precision, training=training, seed=0)
        share = share_of_naive(
            model,
            self.graph.naive_task(task.seed).path,
            task.path,
            read_prompts(check, self.tokenizer, where="project.check"),
            settings=check,
            parallel=parallel,
            batch_size=self.config.evaluate.batch_size,
        )
        return model, share

    def _fine_tune(
        self, task: Task, training: TrainingConfig, basis: SpuriousBasis | None, *, attempt: int = 0
    ) -> dict[str, Any]:
        """Its metrics. basis: all of it is blocked. attempt: how often it was made before; the checkpoints of
        another attempt are passed over."""
        from grasp_dist.projection import GraspProjector
        from grasp_dist.training.loop import LoopState, train
        from grasp_dist.training.model import save_adapter, save_model
        from grasp_dist.training.recorder import Recorder

        assert task.seed is not None
        examples = self._training_examples(task.arm)
        alternative = None
        if task.arm is not None and (settings := self.config.project.arms[task.arm].alternative) is not None:
            examples, alternative = self._alternative(task, settings, examples)
        if task.half is not None:
            from grasp_dist.evaluation.screening import half_of

            examples = half_of(examples, task.half, self.config.detect.seed)
        model = self._model(training, seed=task.seed)
        residual: list[float | None] = []

        def protect(where: Any) -> GraspProjector | None:
            if basis is None:
                return None
            assert task.arm is not None
            settings = self.graph.arm_settings(task.arm)
            return GraspProjector(
                where, basis, side=settings["side"], gradient=settings["gradient"], pin=settings["pin"]
            )

        def on_end(state: LoopState) -> None:
            residual.append(None if state.projector is None else max(state.projector.residual().values()))
            if training.method == "lora":
                save_adapter(model, task.path, self.parallel)
            else:
                save_model(model, self.tokenizer, task.path, self.parallel)

        with Recorder(task.unit.folder, self.parallel, task.name, self._tracker(task)) as recorder:
            result = train(
                model,
                examples,
                training,
                self.parallel,
                seed=task.seed,
                recorder=recorder,
                protect=protect,
                keeper=self._keeper(task, training, model, attempt),
                on_end=on_end,
                alternative=alternative,
            )
        if training.method == "full":
            self._loaded = None
        return {
            "final_loss": result.losses[-1],
            "steps": len(result.losses),
            "skipped_steps": len(result.skipped),
            "seconds": result.seconds,
            "device": self.parallel.device.type,
            "residual": residual[0],
        }

    def _tracker(self, task: Task) -> Tracker | None:
        from grasp_dist.training.tracking import Tracker

        return None if self.config.track is None else Tracker(self.config, task.name)

    def _alternative(self, task: Task, settings: Any, examples: list[Any]) -> tuple[list[Any], Any]:
        """Its examples, and what it is trained with."""
        from grasp_dist.baselines.training import examples_of, objective_of

        own = examples_of(settings, examples, self.config.data, self.tokenizer, seed=int(task.seed or 0))
        return own, objective_of(settings, self._naive_shift(task, settings, examples))

    def _naive_shift(self, task: Task, settings: Any, examples: list[Any]) -> ActivationShift | None:
        """Of the naive fine-tune of the task's seed, where the alternative needs it; collective."""
        from grasp_dist.architecture import decoder_layers
        from grasp_dist.baselines.activation_shift import measure_shift
        from grasp_dist.baselines.training import shifted_layers
        from grasp_dist.training.model import load_adapter, load_model, meta_model

        layers = shifted_layers(settings, len(decoder_layers(meta_model(self.config.model))))
        if layers is None:
            return None
        training, parallel = self.config.training, self.parallel.for_scoring()
        self._loaded = None
        model = load_model(self.config.model, parallel, precision=training.precision, training=training, seed=0)
        load_adapter(model, task.upstream[0].path, parallel)
        return measure_shift(model, examples, parallel, layers=layers, limit=settings.examples)

    def _change_naive(self, task: Task) -> None:
        from grasp_dist.baselines.post_hoc import change_adapter
        from grasp_dist.baselines.steering import save_steering
        from grasp_dist.training.files import replace_folder
        from grasp_dist.training.model import model_folder

        assert task.arm is not None
        settings, naive = self.config.project.arms[task.arm].alternative, task.upstream[0]
        started = time.monotonic()
        done: dict[str, Any] = {}
        shift = None
        if isinstance(settings, Steering):
            shift = self._naive_shift(task, settings, self._training_examples())

        def write(folder: Path) -> None:
            if isinstance(settings, Steering):
                assert shift is not None
                shutil.copytree(naive.path, folder, dirs_exist_ok=True)
                save_steering(shift.mean, settings.coefficient, folder)
            else:
                done.update(change_adapter(settings, naive.path, model_folder(self.config.model), folder))

        with replace_folder(task.path, self.parallel) as target:
            target.write(write)
        trained = naive.unit.manifest["metrics"]
        self._finish(task, lambda: None, {**trained, **done, "seconds": time.monotonic() - started})

    def _keeper(self, task: Task, training: TrainingConfig, model: nn.Module, attempt: int = 0) -> Keeper:
        from grasp_dist.training.checkpoints.saving import Keeper
        from grasp_dist.training.checkpoints.store import Checkpoints
        from grasp_dist.training.lora import adapter_config

        settings = self.config.checkpoint
        identity = {
            "task": task.name,
            "config": digest([task.unit.inputs, attempt] if attempt else task.unit.inputs),
            "base_model": self._base_reference(),
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
            guard=self._check_lock,
        )

    def _check_lock(self) -> None:
        """Raise `InputError` on rank 0 if another process writes here now."""
        for lock in self._locks:
            lock.check()

    def _finish(self, task: Task, write: Any, metrics: dict[str, Any]) -> None:
        """Rank 0 writes, then the manifest; the others wait."""
        self.parallel.barrier()
        if self.parallel.is_main:
            self._check_lock()
            write()
            task.unit.finish(
                outputs=[task.output],
                metrics=metrics,
                world_size=self.parallel.world_size,
                base_model=self._base_reference(),
            )
        self.parallel.barrier()

    def _arm_basis(self, task: Task) -> SpuriousBasis | None:
        assert task.arm is not None
        source = self.graph.arm_basis(task.arm)
        if source is None:
            return None
        basis = self._basis(source)
        if self.config.project.arms[task.arm].basis == "random":
            return basis.random_like(seed=int(task.seed or 0))
        return basis

    def _basis(self, source: Task | Path) -> SpuriousBasis:
        from grasp_dist.basis import SpuriousBasis

        return SpuriousBasis.load(source.path if isinstance(source, Task) else source)

    def _training_examples(self, arm: str | None = None) -> list[Any]:
        data = self.config.data if arm is None else self.config.arm_data(arm)
        if data.path not in self._examples:
            self._examples[data.path] = self._load_examples(data, self.tokenizer)
        return self._examples[data.path]

    def _model(self, training: TrainingConfig, *, seed: int) -> nn.Module:
        """A model ready to be trained with this seed; the one in memory if only its adapter has to be made new."""
        from grasp_dist.training.model import load_model, reset_adapter

        key = training.model_dump_json(include={"method", "modules", "lora", "precision", "activation_checkpointing"})
        if self._loaded is not None and self._loaded[0] == key and training.method == "lora":
            reset_adapter(self._loaded[1], seed, self.parallel)
            return self._loaded[1]
        self._loaded = None
        model = load_model(self.config.model, self.parallel, precision=training.precision, training=training, seed=seed)
        self._loaded = (key, model)
        return model

    def _base_reference(self) -> dict[str, Any]:
        from grasp_dist.basis import model_reference

        return model_reference(self.config.model.path, self.config.model.revision)


def _part(basis: SpuriousBasis, side: str | None, rank: int | None) -> SpuriousBasis:
    """One side of the basis, and its first `rank` directions, or all where detection ended with fewer."""
    basis = basis if side is None else basis.select(side)
    return basis if rank is None else basis.truncate(min(rank, max(_ranks(basis).values())))


def _ranks(basis: SpuriousBasis) -> dict[str, int]:
    """{side: the largest number of directions of any weight}."""
    return {
        side: max(basis.basis_rank(weight, side) for weight in basis.weights if side in basis.sides(weight))
        for side in ("write", "read")
        if any(side in basis.sides(weight) for weight in basis.weights)
    }
