"""What was launched: `<run_dir>/launch/<n>/record.json`, written by a launch and read by whoever watches it.

<run_dir>/launch/<n>/      n = 1, 2, ...: one folder per launch, never written over
    config.yaml            what its jobs read
    <job key>.sbatch       one script per job, if it was launched with sbatch
    logs/                  <job key>-<job id>[_<element>]-r<restart>.log, and what Slurm itself says
    record.json            this
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from grasp_dist.errors import InputError
from grasp_dist.launch import slurm
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.scripts import job_name
from grasp_dist.manifest import write_json

__all__ = ["Launcher", "Record", "Submitted", "jobs_alive", "make_folder", "next_folder", "read_records"]

FORMAT = 1
RECORD = "record.json"
Launcher = Literal["sbatch", "submitit", "local", "debug"]


@dataclass(frozen=True)
class Submitted:
    """A job of the graph, and what became of it. Element i of an array job is `<job_id>_<i>`."""

    key: str
    stage: str
    kind: str
    tasks: tuple[str, ...]
    after: tuple[str, ...] = ()
    after_each: str | None = None
    job_id: str | None = None
    """None: not submitted (yet), or without Slurm."""
    script: str | None = None
    logs: str = "logs"
    name: str | None = None
    """As `squeue` shows it; None in records of old, and without Slurm."""

    def element(self, task: str) -> str:
        """What stands behind the job id for this task: `_<i>` in an array, else nothing."""
        return f"_{self.tasks.index(task)}" if len(self.tasks) > 1 else ""

    def is_named(self, name: str, run_dir: Path) -> bool:
        """Whether a job of that name can be this one: ids alone may be those of another cluster, or of this one before
        it began to count anew."""
        return name == (self.name or job_name(self.key, run_dir.absolute()))

    @classmethod
    def of(cls, job: Job, *, script: str | None = None, name: str | None = None) -> Submitted:
        """The record of a job that is about to be submitted."""
        return cls(job.key, job.stage, job.kind, job.tasks, job.after, job.after_each, script=script, name=name)


@dataclass(frozen=True)
class Record:
    """One launch."""

    folder: Path
    cluster: str
    launcher: Launcher
    jobs: tuple[Submitted, ...]
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    command: tuple[str, ...] = field(default_factory=lambda: tuple(sys.argv))
    config: str = "config.yaml"

    @property
    def job_ids(self) -> list[str]:
        return [job.job_id for job in self.jobs if job.job_id is not None]

    def with_job(self, key: str, job_id: str, script: str) -> Record:
        """With what submitting a job gave."""
        jobs = tuple(replace(job, job_id=job_id, script=script) if job.key == key else job for job in self.jobs)
        return replace(self, jobs=jobs)

    def write(self) -> None:
        """Write `record.json`, whole or not at all."""
        tree = {"format": FORMAT, **asdict(self)}
        del tree["folder"]
        write_json(self.folder / RECORD, tree)

    def describe(self) -> str:
        return f"{self.folder} (of {self.created}, cluster {self.cluster}: `{shlex.join(self.command)}`)"


def read_records(run_dir: str | Path) -> list[Record]:
    """Every launch of a run, oldest first. Raises `InputError` for a record that cannot be read."""
    return [_read(folder) for _, folder in _numbered(run_dir) if (folder / RECORD).is_file()]


def jobs_alive(run_dir: str | Path, records: Sequence[Record]) -> list[tuple[slurm.Queued, Submitted | None]]:
    """Every job of the run that is queued or running, with what is recorded of it: those that a launch has submitted,
    and those that came from the folder of a launch in another way (by hand; None if the record does not tell which).

    Raises `InputError` if Slurm does not answer; without Slurm, and without launches on one, there are none.
    """
    root = Path(run_dir).absolute() / "launch"
    scripts = next(root.glob("*/*.sbatch"), None) is not None
    if not (scripts or any(record.job_ids for record in records)) or not slurm.available("squeue"):
        return []
    by_id = {job.job_id: job for record in records for job in record.jobs if job.job_id is not None}
    folders = {record.folder.resolve(): record for record in records}
    root = root.resolve()
    found: list[tuple[slurm.Queued, Submitted | None]] = []
    for queued in slurm.queue():
        job = by_id.get(queued.job_id.partition("_")[0])
        if job is not None and job.is_named(queued.name, Path(run_dir)):
            found.append((queued, job))
        elif queued.folder.startswith("/") and root in (folder := Path(queued.folder).resolve()).parents:
            submitted = folders[folder].jobs if folder in folders else ()
            key = queued.name.rpartition("-")[2]
            found.append((queued, next((job for job in submitted if job.key == key), None)))
    return found


def next_folder(run_dir: str | Path) -> Path:
    """Where the next launch of a run would be written."""
    numbers = [number for number, _ in _numbered(run_dir)]
    return Path(run_dir).absolute() / "launch" / str(max(numbers, default=0) + 1)


def make_folder(run_dir: str | Path) -> Path:
    """A new folder for a launch, which no other launch has. Raises `InputError` if it cannot be written."""
    while True:
        folder = next_folder(run_dir)
        try:
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir()
            (folder / "logs").mkdir()
        except FileExistsError:
            continue  # of another launch, just now
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}; choose another run_dir") from None
        return folder


def _numbered(run_dir: str | Path) -> list[tuple[int, Path]]:
    root = Path(run_dir).absolute() / "launch"
    found = [path for path in root.iterdir() if path.name.isdigit()] if root.is_dir() else []
    return sorted((int(path.name), path) for path in found)


def _read(folder: Path) -> Record:
    path = folder / RECORD
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        if tree.pop("format") != FORMAT or tree["launcher"] not in get_args(Launcher):
            raise ValueError(f"it is of a format that this version of grasp_dist does not know ({FORMAT})")
        jobs = tree.pop("jobs")
        for job in jobs:
            job["tasks"], job["after"] = tuple(job["tasks"]), tuple(job["after"])
        tree["command"] = tuple(tree["command"])
        return Record(folder=folder, jobs=tuple(Submitted(**job) for job in jobs), **tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); move {folder} away if it is of no use any more") from None
