"""The job graph of a run: what has to be done, as jobs and arrays of jobs that wait for each other.

    naive[seeds] --> detect_one_shot -------------.
    naive[halves] --> screen --.                  |
    detect (warm: trains) <----'------------------+--> project[arms x seeds] --> evaluate[the same] --> report
                                                  '--> evaluate_others[base, naive, ablation]  -----'

Only tasks that are not finished are in it. Detection is one job however many ranks are swept: its basis holds the
largest, and the others are its first columns. Needs no torch and no Slurm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph, Task
from grasp_dist.launch.cluster import Cluster, Kind, seconds_of

__all__ = ["Job", "node_hours", "plan_jobs"]


@dataclass(frozen=True)
class Job:
    """One job, or an array of them where there are several tasks."""

    key: str
    """Its name within the launch."""
    stage: str
    """Stage of its tasks, as the worker takes it."""
    tasks: tuple[str, ...]
    """The name of each array element's task."""
    kind: Kind
    """Which resources of the cluster it takes."""
    after: tuple[str, ...] = ()
    """Jobs of which every element must have ended well before any of this one starts."""
    after_each: str | None = None
    """A job of as many elements, of which each must have ended well before the same one of this job starts."""

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1


def plan_jobs(graph: RunGraph, cluster: Cluster) -> list[Job]:
    """The jobs that bring a run up to date, each behind those that it waits for; none if everything is finished.

    Raises `InputError` for an array that is larger than the cluster allows.
    """
    stale = [task for task, reason in graph.plan() if reason]
    warm = graph.config.detect.method in ("warm", "restarted")
    jobs: list[Job] = []

    def add(key: str, tasks: Sequence[Task], kind: Kind, each: str | None = None) -> None:
        if not tasks:
            return
        if len(tasks) > cluster.max_array_size:
            raise InputError(
                f"{key} has {len(tasks)} tasks, more than this cluster allows in an array ({cluster.max_array_size}, "
                "max_array_size); sweep over fewer values at a time"
            )
        upstream = {up.name for task in tasks for up in task.upstream}
        after = tuple(job.key for job in jobs if job.key != each and upstream & set(job.tasks))
        jobs.append(Job(key, tasks[0].stage, tuple(task.name for task in tasks), kind, after, each))

    def of(stage: str) -> list[Task]:
        return [task for task in stale if task.stage == stage]

    add("naive", of("naive"), "train")
    for task in of("detect"):
        trains = warm and task.name == "detect"
        add(task.name, [task], "train" if trains else "evaluate" if task.name == "screen" else "light")
    projected = of("project")
    add("project", projected, "train")
    scored = {task.upstream[0].name: task for task in of("evaluate") if task.upstream}
    behind = [scored[task.name] for task in projected if task.name in scored]
    each = "project" if len(behind) == len(projected) > 1 else None
    add("evaluate", behind, "evaluate", each)
    add("evaluate_others", [task for task in of("evaluate") if task not in behind], "evaluate")
    add("report", of("report"), "light")
    return jobs


def node_hours(jobs: Sequence[Job], cluster: Cluster) -> dict[str, float]:
    """Node-hours that each job takes at most: its elements times nodes times time limit."""
    hours = {}
    for job in jobs:
        wanted = cluster.resources(job.kind)
        hours[job.key] = len(job.tasks) * wanted.nodes * seconds_of(wanted.time) / 3600
    return hours
