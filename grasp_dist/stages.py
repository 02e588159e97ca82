"""Run the stages: naive -> detect -> project -> evaluate under one process group, then the report. Resumable.

`run_stages` decides on this process what has to run, checks the input, and starts the work here or in N processes;
`work` is what every process of a group does. What a task is made from is said in `grasp_dist.graph`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.config import RunConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import STAGES, RunGraph, Task
from grasp_dist.manifest import write_json

if TYPE_CHECKING:
    from torch import nn

    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.training.parallel import Parallel

__all__ = ["prepare", "run_stages", "work"]


def run_stages(config: RunConfig, stages: tuple[str, ...] = STAGES, *, nproc: int = 1, dry_run: bool = False) -> None:
    """Bring the stages up to date: finished tasks whose inputs have not changed are kept, the others run.

    nproc: processes on this machine.
    dry_run: check everything that can be checked without training, print what would run, and stop.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise InputError(
            "several tasks were started by srun, without the environment that torchrun gives (WORLD_SIZE, RANK, ...), "
            "so each would run alone in the same folder; let srun start one torchrun per node"
        )
    stale = prepare(config, stages, dry_run=dry_run)
    if dry_run:
        return
    trains = tuple(stage for stage in stages if stage != "report")
    if any(task.stage != "report" for task in stale):
        _start(config, trains, nproc)
    if "report" in stages:
        _report(RunGraph(config))


def prepare(config: RunConfig, stages: tuple[str, ...], *, dry_run: bool = False) -> list[Task]:
    """What one process does before any work: print what will run and why, check what can be checked, and make the run
    directory this run's. Returns the tasks that have to run; raises `InputError` for what would stop them."""
    graph = RunGraph(config)
    plan = graph.plan(stages)
    for task, reason in plan:
        print(f"{task.name}: {'will run: ' + reason if reason else 'finished, kept'}", flush=True)
    stale = [task for task, reason in plan if reason]
    planned = {task.name for task, _ in plan}
    for up in (up for task in stale for up in task.upstream if up.name not in planned):
        reason = up.unit.stale_because()
        if reason is not None:
            raise InputError(
                f"{', '.join(stages)} needs {up.name}, which has to run first in {graph.root} ({reason}); run "
                f"`grasp-dist {up.stage} CONFIG`, or `grasp-dist run CONFIG` for all stages"
            )
    graph.check_claim()
    if stale or dry_run:
        from grasp_dist.preflight import preflight

        full = sum(task.arm is not None and task.output == "model" for task in stale if task.stage == "project")
        preflight(config, stages, full_fine_tunes=full)
    if dry_run:
        print("dry run: the configuration, model, data, probes and bases were checked; nothing was trained")
    else:
        graph.claim()
    return stale


def _start(config: RunConfig, stages: tuple[str, ...], nproc: int) -> None:
    if nproc == 1:
        work(config, stages)
        return
    from grasp_dist.launch.local import run_local

    saved = str(Path(config.run_dir) / "config.yaml")
    code = run_local(["-m", "grasp_dist.worker", saved, *stages], nproc=nproc)
    if code:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def work(config: RunConfig, stages: tuple[str, ...], *, prepared: bool = True, dry_run: bool = False) -> None:
    """What each process does: every stale task of the stages, in order; collective.

    prepared: `prepare` was called before the processes were started; else rank 0 does it first.
    """
    from grasp_dist.training.parallel import init_parallel

    with init_parallel(config.parallel) as parallel:
        if not prepared:
            error = None
            if parallel.is_main:
                try:
                    prepare(config, stages, dry_run=dry_run)
                except InputError as caught:
                    error = caught
            parallel.share_error(error)
            if dry_run:
                return
        worker = _Worker(config, parallel)
        for task in worker.stale_tasks(tuple(stage for stage in stages if stage != "report")):
            getattr(worker, task.stage)(task)
        if "evaluate" in stages and parallel.is_main:
            _collect_scores(RunGraph(config))
        if "report" in stages and parallel.is_main:
            _report(RunGraph(config))
        parallel.barrier()


def _report(graph: RunGraph) -> None:
    from grasp_dist.evaluation.report import build_report

    (task,) = graph.tasks(("report",))
    reason = task.unit.stale_because()
    if reason:
        graph.require(task)
        task.unit.start()
        report = graph.config.report
        build_report([graph.root], task.unit.folder, title=report.title, task=report.task, drift=report.drift)
        task.unit.finish(outputs=["report.html", "report.json"], metrics={}, world_size=1)
    print(f"report: {task.path.resolve()}")


def _collect_scores(graph: RunGraph) -> None:
    """evaluate/scores.json: every model's scores in one file, for the report and for other tools."""
    models = [json.loads(task.path.read_text()) for task in graph.tasks(("evaluate",))]
    probes = models[0]["probe_kinds"]
    for model in models:
        del model["probe_kinds"]
    write_json(graph.root / "evaluate" / "scores.json", {"format": 1, "probes": probes, "models": models})


class _Worker:
    """The tasks' work on one process of the group, with the loaded model kept from task to task where it fits."""

    def __init__(self, config: RunConfig, parallel: Parallel) -> None:
        from grasp_dist.training.data import load_examples
        from grasp_dist.training.model import load_tokenizer

        self.config, self.parallel, self.graph = config, parallel, RunGraph(config)
        self.tokenizer = load_tokenizer(config.model)
        self._load_examples = load_examples
        self._examples: list[Any] | None = None
        self._loaded: tuple[str, nn.Module] | None = None
        self._evaluator: Any = None

    def stale_tasks(self, stages: tuple[str, ...]) -> Any:
        """Each task that has to run, when its turn comes. Rank 0 looks at the files and decides for all."""
        graph = RunGraph(self.config)
        tasks = graph.tasks(stages)
        while True:
            self.parallel.barrier()
            task = next(tasks, None)
            if task is None:
                return
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

    # Stages

    def naive(self, task: Task) -> None:
        self._fine_tune(task, self.config.training, basis=None)

    def detect(self, task: Task) -> None:
        from grasp_dist.basis import SpuriousBasis

        started = time.monotonic()
        detect = self.config.detect
        method = task.unit.inputs.get("method", detect.method)
        provenance = {"base_model": self._base_reference(), "settings": detect.model_dump(), "seeds": [detect.seed]}
        if method == "file":
            basis = SpuriousBasis.load(str(detect.basis))
        elif method == "one_shot":
            from grasp_dist.detection import detect_basis

            adapter = Path(detect.adapter) if detect.adapter else task.upstream[0].path
            basis = detect_basis(adapter, rank=detect.rank, side=detect.side, base_model=self.config.model.path)
        else:
            from grasp_dist.detection.deflation import deflate
            from grasp_dist.training.recorder import Recorder

            with Recorder(task.unit.folder, self.parallel, task.name) as recorder:
                basis = deflate(
                    self._model(self.config.training, seed=detect.seed),
                    self._training_examples(),
                    training=self.config.training,
                    detect=detect,
                    parallel=self.parallel,
                    folder=task.unit.folder,
                    recorder=recorder,
                    provenance={"method": f"{method} deflation", **provenance},
                )
        self._finish(task, lambda: basis.save(task.path), {"seconds": time.monotonic() - started})

    def project(self, task: Task) -> None:
        assert task.arm is not None
        self._fine_tune(task, self.config.arm_training(task.arm), basis=self._arm_basis(task))

    def evaluate(self, task: Task) -> None:
        graph, config = self.graph, self.config
        if self._evaluator is None:
            from grasp_dist.evaluation.evaluator import Evaluator

            self._loaded = None
            detected = self._basis(graph.detect_task()) if config.evaluate.shift else None
            self._evaluator = Evaluator(config, self.tokenizer, self.parallel, detected)
        row: dict[str, Any] = {
            "model": task.model,
            "seed": task.seed,
            "method": None,
            "basis": None,
            "basis_rank": None,
        }
        if task.model == "base":
            scores = self._evaluator.base()
        else:
            source = task.upstream[0]
            training = config.arm_training(task.arm) if task.arm else config.training
            row |= {"method": training.method, **source.unit.manifest["metrics"]}
            ablated = None
            if task.model == "ablation":
                ablated = _part(self._basis(graph.detect_task()), config.project.side, config.project.rank)
                row |= {"basis": "detected", "basis_rank": _ranks(ablated), "residual": None}
            elif task.arm and (basis := self._arm_basis(task)) is not None:
                settings = graph.arm_settings(task.arm)
                basis = _part(basis, settings["side"], settings["rank"])
                row |= {"basis": settings["basis"], "basis_rank": _ranks(basis)}
            scores = self._evaluator.trained(source.path, training, ablated=ablated)
        row["probe_kinds"] = self._evaluator.describe_probes()
        self._finish(task, lambda: write_json(task.path, {**row, **scores}), {})

    # Their parts

    def _fine_tune(self, task: Task, training: TrainingConfig, basis: SpuriousBasis | None) -> None:
        from grasp_dist.projection import GraspProjector
        from grasp_dist.training.loop import train
        from grasp_dist.training.model import save_adapter, save_model
        from grasp_dist.training.recorder import Recorder

        assert task.seed is not None
        examples = self._training_examples()
        model = self._model(training, seed=task.seed)
        projector = None
        if basis is not None:
            assert task.arm is not None
            settings = self.graph.arm_settings(task.arm)
            settings.pop("basis")
            projector = GraspProjector(model, basis, **settings)
        with Recorder(task.unit.folder, self.parallel, task.name) as recorder:
            result = train(
                model, examples, training, self.parallel, seed=task.seed, recorder=recorder, projector=projector
            )
        metrics = {
            "final_loss": result.losses[-1],
            "steps": len(result.losses),
            "seconds": result.seconds,
            "residual": max(projector.residual().values()) if projector else None,
        }
        if training.method == "lora":
            save_adapter(model, task.path, self.parallel)
        else:
            save_model(model, self.tokenizer, task.path, self.parallel)
            self._loaded = None
        self._finish(task, lambda: None, metrics)

    def _finish(self, task: Task, write: Any, metrics: dict[str, Any]) -> None:
        """Rank 0 writes, then the manifest; the others wait."""
        self.parallel.barrier()
        if self.parallel.is_main:
            write()
            task.unit.finish(outputs=[task.output], metrics=metrics, world_size=self.parallel.world_size)
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

    def _training_examples(self) -> list[Any]:
        if self._examples is None:
            self._examples = self._load_examples(self.config.data, self.tokenizer)
        return self._examples

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
    basis = basis if side is None else basis.select(side)
    return basis if rank is None else basis.truncate(rank)


def _ranks(basis: SpuriousBasis) -> dict[str, int]:
    """{side: the largest number of directions of any weight}."""
    return {
        side: max(basis.basis_rank(weight, side) for weight in basis.weights if side in basis.sides(weight))
        for side in ("write", "read")
        if any(side in basis.sides(weight) for weight in basis.weights)
    }
