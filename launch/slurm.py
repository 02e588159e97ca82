"""Slurm's commands: sbatch, squeue, sacct, scontrol, scancel, sinfo. Each is asked once, with a time limit, and what it
says of jobs is parsed here and nowhere else. Their plain formats are read, which are the same in every version since
20.11."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grasp_dist.errors import InputError

__all__ = [
    "Finished",
    "NoAnswer",
    "Queued",
    "available",
    "call",
    "finished",
    "is_over",
    "outside_of_jobs",
    "partitions",
    "queue",
    "sbatch",
    "scancel",
    "show_job",
    "show_jobs",
    "slurm_environment",
    "waits",
]

_SECONDS = 60.0
"""How long a command may take; controllers of large clusters are slow to answer."""
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_ACCTG_FREQ", "SBATCH_NETWORK", "SBATCH_PROFILE", "SBATCH_WCKEY"}
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


@dataclass(frozen=True)
class Queued:
    """A job or an element of an array that has not ended."""

    job_id: str
    """`123`, or `123_4` for an element of an array."""
    state: str
    name: str
    reason: str
    folder: str
    """The directory that it was submitted from."""


@dataclass(frozen=True)
class Finished:
    """A job or an element of an array that has ended, as accounting knows it."""

    state: str
    exit_code: str
    """`3:0`: code and signal."""
    nodes: str
    reason: str
    name: str


class NoAnswer(InputError):
    """A command did not answer in time; what was asked for may still happen."""


def is_over(state: str) -> bool:
    """Whether a job in that state has ended."""
    return not waits(state) and state not in ("RUNNING", "COMPLETING", "SUSPENDED", "RESIZING")


def waits(state: str) -> bool:
    """Whether a job in that state has not started (again)."""
    return state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")


def available(command: str = "sbatch") -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which(command) is not None


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what a surrounding job or allocation has left in it, which sbatch would hand to the new job,
    and without SBATCH_TIMELIMIT and the like, which to sbatch are above what the script says. Which Slurm it is, and
    what no script of ours says, stays."""
    ours = ("SLURM_", "SBATCH_")
    return {name: value for name, value in environ.items() if name in _KEPT or not name.startswith(ours)}


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """The same for this process' own environment, for a library that calls sbatch itself."""
    before = dict(os.environ)
    for name in before.keys() - slurm_environment(before).keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= before


def sbatch(script: str, *, folder: Path, options: Sequence[str] = ()) -> str:
    """Submit a script of `folder`, from there; returns the job id. Raises `InputError` with what sbatch said."""
    # "123" or "123;cluster"
    return _run(["sbatch", "--parsable", *options, script], cwd=folder).strip().partition(";")[0]


def queue() -> list[Queued]:
    """Every job of this user that has not ended, array elements one by one."""
    # The folder last: it may hold the separator, as other people's names do; ours do not.
    form = "%i|%T|%r|%j|%Z"
    found = []
    for line in _run(["squeue", "--me", "--noheader", "--array", f"--format={form}"]).splitlines():
        job_id, state, reason, name, folder = [*line.split("|", 4), "", "", "", ""][:5]
        found.append(Queued(job_id, state, name, reason, folder))
    return found


def show_job(job_id: str) -> dict[str, str] | None:
    """What `scontrol` knows of a job (`JobState`, `Reason`, `Restarts`, ...); None when it is forgotten, some minutes
    after its end. Values that hold spaces end at the first."""
    return next(iter(_shown(job_id)), None)


def show_jobs(job_id: str) -> dict[str, dict[str, str]]:
    """{`123`, or `123_4` for each element of an array: as of `show_job`}, asked for at once; empty when forgotten."""
    found: dict[str, dict[str, str]] = {}
    for shown in _shown(job_id):
        elements = _elements(shown["ArrayTaskId"]) if "ArrayTaskId" in shown else [""]
        found |= {job_id + element: shown for element in elements}
    return found


def _shown(job_id: str) -> list[dict[str, str]]:
    try:
        text = _run(["scontrol", "show", "job", "--oneliner", job_id], SLURM_BITSTR_LEN="0")
    except InputError:
        return []
    lines = (dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word) for line in text.splitlines())
    return [fields for fields in lines if fields]


def finished(job_ids: Iterable[str]) -> dict[str, Finished]:
    """{job id, with `_<element>`: what became of it} from the accounting database, also for jobs that `scontrol` has
    forgotten; empty without one."""
    if not (wanted := list(job_ids)) or not available("sacct"):
        return {}
    fields = "--format=jobid,state,exitcode,nodelist,reason,jobname"
    try:
        text = _run(
            ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", fields, "-j", ",".join(wanted)],
            SLURM_BITSTR_LEN="0",
        )
    except InputError:  # no accounting here
        return {}
    found = {}
    for line in text.splitlines():
        job, *rest = line.split("|", 5)
        if len(rest) != 5:
            continue
        state, code, nodes, reason, name = rest
        nodes = "" if nodes == "None assigned" else nodes
        # Elements that never started are one row: `123_[0-5]`.
        base, bracket, elements = job.partition("_[")
        for element in _elements(elements.rstrip("]")) if bracket else [""]:
            found[base + element] = Finished(state.split(" ")[0], code, nodes, reason, name)
    return found


def scancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are left alone."""
    if wanted := list(job_ids):
        _run(["scancel", *wanted])


def partitions() -> list[str]:
    """Names of the cluster's partitions, also of hidden ones."""
    return sorted(set(_run(["sinfo", "--all", "--noheader", "--format=%R"]).split()))


def _elements(text: str) -> list[str]:
    """`0-2,6-10:2%4` -> _0, _1, _2, _6, _8, _10."""
    found: list[str] = []
    for part in text.partition("%")[0].split(","):
        if match := _RANGE.fullmatch(part):
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            found += [f"_{number}" for number in range(first, last + 1, step)]
    return found


def call(
    command: Sequence[str], *, seconds: float = _SECONDS, cwd: Path | None = None, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. more: environment variables for it. Raises `FileNotFoundError` if there is none, and
    `subprocess.TimeoutExpired`."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=slurm_environment(os.environ) | dict(more or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )


def _run(command: list[str], *, cwd: Path | None = None, **more: str) -> str:
    """Standard output. Raises `InputError` with what the command said if it fails, `NoAnswer` if it says nothing."""
    try:
        done = call(command, cwd=cwd, more=more)
    except FileNotFoundError:
        raise InputError(
            f"there is no `{command[0]}` on this machine; launch from a login node of the cluster. --dry-run works "
            "everywhere, and `--cluster local` runs the stages here"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"`{command[0]}` has not answered within {_SECONDS:g} s; `scontrol ping` says whether Slurm's controller "
            "is there. Try again when it is"
        ) from None
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        why = said or f"exit code {done.returncode}"
        raise InputError(f"`{' '.join(command)}` failed: {why} (`grasp-dist doctor` knows remedies)")
    return done.stdout
