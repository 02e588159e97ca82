"""Take the tasks that have to run, one after the other, and give each to its stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError, Preempted
from grasp_dist.graph import RunGraph, Task
from grasp_dist.run_lock import RunLock
from grasp_dist.tasks.detect import detect
from grasp_dist.tasks.evaluate import Evaluation
from grasp_dist.tasks.naive import naive
from grasp_dist.tasks.project import project
from grasp_dist.tasks.workbench import Workbench
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.preemption import stop_requested

__all__ = ["Worker"]


class Worker:
    """The tasks' work on one process of the group, with the loaded model kept from task to task where it fits."""

    def __init__(self, config: RunConfig, parallel: Parallel, locks: list[RunLock]) -> None:
        self._bench = Workbench(config, parallel, locks)
        self._stages: dict[str, Callable[[Workbench, Task], None]] = {
            "naive": naive,
            "detect": detect,
            "project": project,
            "evaluate": Evaluation(),
        }

    def stale_tasks(self, stages: tuple[str, ...], only: Collection[str] | None) -> Iterator[Task]:
        """Each task (of `only` these) that has to run, when its turn comes. Rank 0 looks at the files and decides for
        all."""
        bench, parallel = self._bench, self._bench.parallel
        graph = RunGraph(bench.config)
        tasks = graph.tasks(stages)
        while True:
            if any(parallel.gather_objects(stop_requested())):
                raise Preempted("asked to stop between two tasks; what was finished is kept")
            task = next(tasks, None)
            if task is None:
                return
            if only is not None and task.name not in only:
                continue
            reason = parallel.broadcast_object(task.unit.stale_because() if parallel.is_main else None)
            if reason is None:
                continue
            graph.require(task)
            bench.say(f"{task.name}: {reason}")
            parallel.barrier()
            if parallel.is_main:
                task.unit.start()
            parallel.barrier()
            yield task

    def do(self, task: Task) -> None:
        """The task's work; what stops it is said in its manifest, for those who look at the run from outside."""
        try:
            self._stages[task.stage](self._bench, task)
        except Exception as error:
            if self._bench.parallel.is_main and not isinstance(error, Preempted):
                with suppress(InputError, OSError):
                    task.unit.fail(f"{type(error).__name__}: {error}")
            raise
