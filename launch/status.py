"""What a run is doing, told from its directory alone, and from Slurm where it was launched there and Slurm is at hand.

A task is finished, running, waiting, failed, stopped, out of date, or not started; how far it is stands in its
metrics.jsonl, who works on it in its lock, why it failed in its manifest. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grasp_dist.config_files import load_config, started_in
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph, Task
from grasp_dist.launch import slurm
from grasp_dist.launch.preconditions import named_paths
from grasp_dist.run_lock import Holder, holder_of

__all__ = ["JobStatus", "RunReader", "TaskStatus"]

State = Literal["finished", "running", "waiting", "failed", "stopped", "out of date", "not started"]
_SILENT = 60.0
"""Seconds without a heartbeat that are worth a word."""
_RECENT = 20
"""Steps from which the time of one is taken."""


@dataclass(frozen=True)
class JobStatus:
    """What Slurm says of a task's job."""

    job: str
    state: str
    """Slurm's own word: PENDING, RUNNING, FAILED, ..."""
    reason: str = ""
    """Why it waits or ended, with the node where one is to blame."""
    restarts: int = 0

    @property
    def is_over(self) -> bool:
        return slurm.is_over(self.state)

    @property
    def waits(self) -> bool:
        return slurm.waits(self.state)


@dataclass(frozen=True)
class TaskStatus:
    """One task of a run, as it is now."""

    name: str
    state: State
    why: str
    """What is to be known beside the state: the reason, the error, who works on it; may be empty."""
    step: int | None = None
    steps: int | None = None
    """How many there will be."""
    loss: float | None = None
    seconds_left: float | None = None
    """Until the last step, as fast as of late; None if it is not running or too young."""
    restarts: int = 0
    job: str | None = None
    """Slurm's id, of the array element."""

    def record(self) -> dict[str, Any]:
        return asdict(self)


class RunReader:
    """Reads the status of a run again and again; what its inputs hash to is found once, as long as they stay as they
    are. Works from any directory."""

    def __init__(self, run: Path) -> None:
        self._run = run.absolute()
        self._graph: RunGraph | None = None
        self._of: Any = None

    def read(self, jobs: Mapping[str, JobStatus]) -> list[TaskStatus]:
        """Every task of the run, in order.

        jobs: of the run's newest launch, by the name of each task; what is not in it was not launched or is not known.
        Raises `InputError` for a folder that is no run directory.
        """
        run, saved = self._run, self._run / "config.yaml"
        if not saved.is_file():
            raise InputError(
                f"{run} is not a run directory (it has no config.yaml); give the run_dir of a configuration"
            )
        whole = holder_of(run)
        with _inside(started_in(saved)):
            config = load_config(saved).model_copy(update={"run_dir": str(run)})
            of = (config, {path: _stats(Path(path)) for path in named_paths(config).values()})
            if self._graph is None or of != self._of:
                self._graph, self._of = RunGraph(config), of
            plan = self._graph.plan()
        return [_status(run, task, reason, whole, jobs.get(task.name)) for task, reason in plan]


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """With `folder`, if it is there, as the working directory."""
    before = Path.cwd()
    if folder is not None and folder.is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _stats(path: Path) -> list[tuple[str, int, int]]:
    """What a change of a file, or of those in a folder, is known by."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _status(
    run: Path, task: Task, reason: str | None, whole: tuple[Holder, float] | None, job: JobStatus | None
) -> TaskStatus:
    manifest = task.unit.manifest
    rows = _rows(task.unit.folder / "metrics.jsonl")
    last = rows[-1] if rows else {}
    holder = holder_of(run, task.name) or (whole if manifest.get("status") == "running" else None)
    state, why = _state(manifest, reason, holder, job)
    if state == "finished":
        steps = (manifest.get("metrics") or {}).get("steps")
        last = {**last, "step": steps, "steps": steps}
    if state in ("not started", "out of date"):
        rows, last = [], {}
    return TaskStatus(
        name=task.name,
        state=state,
        why=why,
        step=last.get("step"),
        steps=last.get("steps"),
        loss=last.get("loss"),
        seconds_left=_seconds_left(rows) if state == "running" else None,
        restarts=max(int(manifest.get("starts") or 1) - 1, job.restarts if job else 0),
        job=job.job if job else None,
    )


def _state(
    manifest: Mapping[str, Any], reason: str | None, holder: tuple[Holder, float] | None, job: JobStatus | None
) -> tuple[State, str]:
    if reason is None:
        return "finished", ""
    if holder is not None and not (job is not None and _left_behind(*holder, job)):
        who, silent = holder
        return "running", f"{who.host}, pid {who.pid}" + (f", silent for {silent:.0f} s" if silent > _SILENT else "")
    if job is not None and not job.is_over:
        if job.waits:
            return "waiting", job.reason or job.state.lower()
        return "running", job.state.lower()
    if manifest.get("status") == "failed":
        return "failed", str(manifest.get("error"))
    if job is not None and job.state not in ("COMPLETED", "CANCELLED"):
        return "failed", f"{job.state.lower()}{f' ({job.reason})' if job.reason else ''}"
    if job is not None and job.state == "CANCELLED":
        return "stopped", f"cancelled{f' ({job.reason})' if job.reason else ''}"
    if manifest.get("status") == "running":
        return "stopped", "interrupted; the same command goes on"
    return ("out of date", reason) if manifest else ("not started", "")


def _left_behind(holder: Holder, silent: float, job: JobStatus) -> bool:
    """Whether the lock is what a killed job has left. Of a process on another machine it cannot be seen that it is
    gone; Slurm says so."""
    elsewhere = not holder.same_machine(Holder.here("status"))
    return holder.slurm_job is not None and elsewhere and silent > _SILENT and (job.is_over or job.waits)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The last lines of a metrics file, without a cut one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            lines = file.read().decode(errors="replace").splitlines()[-_RECENT - 1 :]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _seconds_left(rows: list[dict[str, Any]]) -> float | None:
    """From the steps of the process that runs now: its clock began at its own start."""
    recent = rows[-1:]
    for row in reversed(rows[:-1]):
        if row.get("seconds", 0) > recent[0].get("seconds", 0):
            break
        recent.insert(0, row)
    if len(recent) < 2 or "steps" not in recent[-1]:
        return None
    per_step = (recent[-1]["seconds"] - recent[0]["seconds"]) / max(1, recent[-1]["step"] - recent[0]["step"])
    return max(0.0, (recent[-1]["steps"] - recent[-1]["step"]) * per_step)
