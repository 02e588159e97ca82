"""Run the stages: naive -> detect -> project -> evaluate under one process group, then the report. Resumable.

`run_stages` decides on this process what has to run, checks the input, and starts the work here or in N processes;
`work` is what every process of a group does. What a task is made from is said in `grasp_dist.graph`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from grasp_dist.config import RunConfig
from grasp_dist.errors import PREEMPTED, InputError
from grasp_dist.graph import STAGES, RunGraph, Task
from grasp_dist.manifest import write_json
from grasp_dist.run_lock import RunLock

if TYPE_CHECKING:
    from grasp_dist.training.parallel import Parallel

__all__ = ["prepare", "run_stages", "start", "work"]


def run_stages(config: RunConfig, stages: tuple[str, ...] = STAGES, *, nproc: int = 1, dry_run: bool = False) -> None:
    """Bring the stages up to date: finished tasks whose inputs have not changed are kept, the others run.

    nproc: processes on this machine.
    dry_run: check everything that can be checked without training, print what would run, and stop.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise InputError(
            "several tasks were started by srun, without the environment that torchrun gives (WORLD_SIZE, RANK, ...), "
            "so each would run alone in the same folder; use `grasp-dist launch`, or let srun start one "
            "torchrun on each node"
        )
    stale = prepare(config, stages, dry_run=dry_run)
    if dry_run:
        return
    trains = tuple(stage for stage in stages if stage != "report")
    if any(task.stage != "report" for task in stale):
        start(config, trains, nproc=nproc)
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


def start(config: RunConfig, stages: tuple[str, ...], *, nproc: int, only: Collection[str] | None = None) -> None:
    """Do the stages' work here, or in N processes on this machine; `prepare` was called before.

    only: as for `work`. Raises `SystemExit` with the code of the process that failed first.
    """
    if nproc == 1:
        work(config, stages, only=only)
        return
    from grasp_dist.launch.local import run_local

    saved = str(Path(config.run_dir) / "config.yaml")
    tasks = [] if only is None else ["--only", *only]
    code = run_local(["-m", "grasp_dist.worker", saved, *stages, *tasks], nproc=nproc)
    if code:
        if code != PREEMPTED:  # the processes said so
            print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)


def work(
    config: RunConfig,
    stages: tuple[str, ...],
    *,
    only: Collection[str] | None = None,
    prepared: bool = True,
    dry_run: bool = False,
) -> None:
    """What each process does: every stale task of the stages, in order; collective.

    only: names of tasks. These alone are done, and held against other writers, so that process groups can do different
    tasks of one run side by side; None: all, and the whole run is held.
    prepared: `prepare` was called before the processes were started; else rank 0 does it first.
    """
    from grasp_dist.training.parallel import init_parallel
    from grasp_dist.training.preemption import StopSignals

    with (
        StopSignals(config.checkpoint.lead_seconds),
        init_parallel(config.parallel) as parallel,
        _one_writer(config, stages, only, parallel, dry_run=dry_run) as locks,
    ):
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
        trains = tuple(stage for stage in stages if stage != "report")
        if trains:
            from grasp_dist.tasks import Worker  # with it come torch, transformers and peft

            worker = Worker(config, parallel, locks)
            for task in worker.stale_tasks(trains, only):
                worker.do(task)
        if "evaluate" in stages and only is None and parallel.is_main:
            _collect_scores(RunGraph(config))
        if "report" in stages and parallel.is_main:
            _report(RunGraph(config))
        parallel.barrier()


@contextmanager
def _one_writer(
    config: RunConfig, stages: tuple[str, ...], only: Collection[str] | None, parallel: Parallel, *, dry_run: bool
) -> Iterator[list[RunLock]]:
    """Rank 0, which writes, holds the run directory's lock, or those of its tasks; collective. Not the process that
    started the ranks: it may be killed, and they go on for a while."""
    with ExitStack() as stack:
        error, locks = None, []
        if parallel.is_main and not dry_run:
            try:
                for part in [None] if only is None else sorted(only):
                    lock = RunLock(config.run_dir, what=part or " and ".join(stages), part=part)
                    locks.append(stack.enter_context(lock))
            except InputError as caught:
                error = caught
        parallel.share_error(error)
        yield locks


def _report(graph: RunGraph) -> None:
    from grasp_dist.evaluation.report import build_report

    (task,) = graph.tasks(("report",))
    reason = task.unit.stale_because()
    if reason:
        graph.require(task)
        _collect_scores(graph)
        task.unit.start()
        report = graph.config.report
        build_report(
            [graph.root],
            task.unit.folder,
            name=report.name,
            title=report.title,
            task=report.task,
            drift=report.drift,
        )
        task.unit.finish(outputs=[f"{report.name}.html", f"{report.name}.json"], metrics={}, world_size=1)
    print(f"{graph.config.report.name}: {task.path.resolve()}")


def _collect_scores(graph: RunGraph) -> None:
    """evaluate/scores.json: every model's scores in one file, for the report and for other tools."""
    models = [json.loads(task.path.read_text()) for task in graph.tasks(("evaluate",))]
    probes = models[0]["probe_kinds"]
    for model in models:
        del model["probe_kinds"]
    write_json(graph.root / "evaluate" / "scores.json", {"format": 1, "probes": probes, "models": models})
