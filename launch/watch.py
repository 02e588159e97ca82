"""From a run to its jobs and back: what Slurm says of each task, which log is its newest, and how to stop it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grasp_dist.errors import InputError
from grasp_dist.launch import slurm
from grasp_dist.launch.records import Record, Submitted, jobs_alive, read_records
from grasp_dist.launch.status import JobStatus, TaskStatus
from grasp_dist.run_lock import PATIENCE, Holder, holder_of

__all__ = ["cancel", "follow", "jobs_of", "last_lines", "newest_log"]

_LOG = re.compile(r"(.+)-(\d+)((?:_\d+)?)-r\d+\.log")


def jobs_of(run: Path) -> dict[str, JobStatus]:
    """{task: its job, of the newest launch that had it, or of what was submitted by hand since}; empty without
    launches, or where there is no Slurm to ask. Raises `InputError` if Slurm does not answer."""
    if not slurm.available("squeue"):
        return {}
    records = read_records(run)
    alive = {name: queued for queued, job in jobs_alive(run, records) for name in _tasks(queued, job)}
    last = _last_jobs(records)
    ids = {name: job_id for name, (job_id, _) in last.items()} | {name: job.job_id for name, job in alive.items()}
    # Once per job, whatever the number of its elements.
    shown = {key: value for job in sorted({_whole(job_id) for job_id in ids.values()})
             for key, value in slurm.show_jobs(job).items()}  # fmt: skip
    over = slurm.finished(sorted({_whole(job_id) for name, job_id in ids.items() if name not in alive}))
    found = {}
    for name, job_id in ids.items():
        facts = shown.get(job_id, {})
        if name in alive:
            restarts = int(facts.get("Restarts", 0))
            found[name] = JobStatus(job_id, alive[name].state, _plain(alive[name].reason), restarts)
            continue
        submitted, ended = last[name][1], over.get(job_id)
        if not submitted.is_named(facts.get("JobName", ""), run):
            facts = {}
        if ended is not None and not submitted.is_named(ended.name, run):
            ended = None
        if facts or ended:
            found[name] = _ended(job_id, facts, ended)
    return found


def newest_log(run: Path, task: str) -> Path | None:
    """The log of the task's last start in a launched job; None if it was never launched or has not started."""
    for record in reversed(read_records(run)):
        for job in record.jobs:
            if task not in job.tasks:
                continue
            if record.launcher == "submitit" and job.job_id is None:
                return _local_log(record, task)
            key, element = re.escape(job.key), job.element(task)
            own = re.compile(rf"{key}-(\d+){element}-r(\d+)\.log")
            # Without a log of its own, what Slurm itself had to say of the job.
            slurms = re.compile(rf"(?:.*-)?{key}-(\d+){element}\.out")
            for kind in (own, slurms):
                files = [path for path in (record.folder / job.logs).glob("*") if kind is own or path.stat().st_size]
                if logs := [(match, path) for path in files if (match := kind.fullmatch(path.name))]:
                    return max(logs, key=lambda log: [int(number) for number in log[0].groups()])[1]
    return None


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * count))
        return file.read().decode(errors="replace").splitlines()[-count:]


def follow(path: Path, *, lines: int, poll: float = 0.5) -> Iterator[str]:
    """Text of a growing file, from its last `lines` on, for ever; `poll`: seconds between looks."""
    with path.open("rb") as file:
        yield "".join(f"{line}\n" for line in last_lines(path, lines))
        file.seek(0, os.SEEK_END)
        while True:
            if text := file.read():
                yield text.decode(errors="replace")
            else:
                time.sleep(poll)


def cancel(run: Path, tasks: Sequence[TaskStatus], *, everything: bool = False) -> Iterator[str]:
    """Ask the tasks' work to stop: their jobs by scancel, processes on this machine by SIGTERM, on which they save.

    everything: also those jobs of the run that belong to none of its tasks. Yields what was done, a line each. Raises
    `InputError` at the end for what cannot be stopped from here.
    """
    refused: list[str] = []
    wanted, cancelled = {task.name for task in tasks}, set()
    try:
        jobs = []
        for queued, job in jobs_alive(run, read_records(run)):
            names = _tasks(queued, job) or [queued.name]
            jobs += [(name, queued.job_id) for name in names if everything or name in wanted]
        slurm.scancel(sorted({job_id for _, job_id in jobs}))
        for name, job_id in jobs:
            yield f"{name}: job {job_id} cancelled"
        cancelled = {name for name, _ in jobs}
    except InputError as error:
        refused.append(str(error))
    asked: set[tuple[str, int]] = set()
    for task in tasks:
        held = (holder_of(run, task.name) or holder_of(run)) if task.state == "running" else None
        if held is None or (task.name in cancelled and held[0].slurm_job) or (held[0].machine, held[0].pid) in asked:
            continue
        asked.add((held[0].machine, held[0].pid))
        try:
            yield f"{task.name}: {_stop(*held)}"
        except InputError as error:
            refused.append(str(error))
    if refused:
        raise InputError("; ".join(refused))


def _stop(holder: Holder, silent: float) -> str:
    if not holder.same_machine(Holder.here("cancel")):
        if silent > PATIENCE:
            return f"{holder.describe()} has been silent for {silent:.0f} s; the next start will take its place"
        raise InputError(f"{holder.describe()} runs on another machine; stop it there (`{holder.stop}`)")
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise InputError(f"{holder.describe()} is not yours to stop; ask {holder.user}") from None
    return f"asked process {holder.pid} to save and stop"


def _tasks(queued: slurm.Queued, job: Submitted | None) -> list[str]:
    """The task that a job, or an element of one, does; none if that cannot be told."""
    element = queued.job_id.partition("_")[2]
    if job is None or not element or len(job.tasks) == 1:
        return list(job.tasks) if job else []
    return list(job.tasks[int(element) :][:1])


def _last_jobs(records: Sequence[Record]) -> dict[str, tuple[str, Submitted]]:
    """{task: (id of its job or array element, what is recorded of it)}, of the newest launch that had it; without those
    that have none. An id that is younger than the recorded one, submitted by hand, is known by its log."""
    newest = {task: (record, job) for record in records for job in record.jobs for task in job.tasks}
    seen: dict[tuple[Path, str, str], int] = {}
    for folder in {record.folder / job.logs for record, job in newest.values()}:
        for path in folder.glob("*-r*.log"):
            if match := _LOG.fullmatch(path.name):
                place = (folder, match[1], match[3])
                seen[place] = max(seen.get(place, 0), int(match[2]))
    found = {}
    for task, (record, job) in newest.items():
        if job.job_id is not None:
            element = job.element(task)
            job_id = max(int(job.job_id), seen.get((record.folder / job.logs, job.key, element), 0))
            found[task] = (f"{job_id}{element}", job)
    return found


def _ended(job_id: str, facts: Mapping[str, str], ended: slurm.Finished | None) -> JobStatus:
    """facts: as of `show_job`, empty for a job that it has forgotten."""
    state = ended.state if ended else facts["JobState"]
    code = ended.exit_code if ended else facts.get("ExitCode", "")
    nodes = _plain(facts.get("NodeList", "")) or (ended.nodes if ended else "")
    reason = _plain(facts.get("Reason", ""))
    if not facts and ended and not nodes:
        reason = _plain(ended.reason)  # to accounting, of a job that has started, why it waited before
    parts = [reason, f"exit code {code}" * (code not in ("", "0:0")), f"on {nodes}" * bool(nodes)]
    return JobStatus(job_id, state, ", ".join(part for part in parts if part), int(facts.get("Restarts", 0)))


def _local_log(record: Record, task: str) -> Path | None:
    """submitit's own log of a task on the machine of the launch, which starts them one after the other."""
    tasks = [name for job in record.jobs for name in job.tasks]
    starts = sorted(record.folder.glob("submitit/*_submitted.pkl"), key=lambda path: path.stat().st_mtime_ns)
    for name, start in zip(tasks, starts, strict=False):
        log = start.with_name(start.name.replace("_submitted.pkl", "_0_log.out"))
        if name == task and log.is_file():
            return log
    return None


def _whole(job_id: str) -> str:
    return job_id.partition("_")[0]


def _plain(reason: str) -> str:
    return "" if reason in ("None", "(null)") else reason
