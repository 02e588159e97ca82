"""What only the nodes know: a short job for each kind of job, with the very script that a launch would submit, in which
`grasp_dist.launch.doctor.reach` takes the place of the task. `grasp-dist doctor --deep`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.launch.cluster import Cluster, Kind
from grasp_dist.launch.doctor.check import Check, Group
from grasp_dist.launch.doctor.folders import existing
from grasp_dist.launch.doctor.reach import ERRAND, writable
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.scripts import Place, render
from grasp_dist.launch.slurm import available, is_over, queue, sbatch, scancel, show_job, waits

__all__ = ["check_nodes", "trial_script"]

NODES = Group("nodes")
_TIME = "00:05:00"
_RUNS = 600.0
"""Seconds after which a job of five minutes is given up."""
_LATE = 30.0
"""Seconds that a file written on a node may take to be seen here (caches of network file systems)."""
_FORGOTTEN, _UNKNOWN = "FORGOTTEN", "UNKNOWN"
"""Of a job that Slurm no longer has, and of one of which it does not say anything just now."""


def check_nodes(cluster: Cluster, config: RunConfig | None, *, patience: float = 300) -> Iterator[Check]:
    """One job after the other. patience: seconds in which a job must start; it is cancelled when they are over."""
    if cluster.kind != "slurm" or not available():
        yield NODES.skipped("jobs", "no Slurm here to submit them to")
        return
    base = _base(cluster, config)
    if why := writable(base):
        yield NODES.failure("jobs", f"{base} cannot be written: {why}", "name a folder of yours under `shared`")
        return
    for kind in get_args(Kind):
        with tempfile.TemporaryDirectory(prefix=".grasp-dist-doctor-", dir=base, ignore_cleanup_errors=True) as folder:
            yield from _trial(kind, cluster, Path(folder), patience)


def _base(cluster: Cluster, config: RunConfig | None) -> Path:
    """A folder that the nodes should see: beside the run directory, as nothing foreign belongs into it."""
    if config:
        beside = existing(Path(config.run_dir).absolute().parent)
        return existing(Path(config.run_dir)) if writable(beside) else beside
    return next((Path(name) for name in cluster.shared if not writable(Path(name))), Path.cwd())


def _trial(kind: Kind, cluster: Cluster, folder: Path, patience: float) -> Iterator[Check]:
    for name in ("logs", "found"):
        (folder / name).mkdir()
    marker = folder / "marker"
    marker.touch()
    errand = {"out": str(folder / "found"), "marker": str(marker), "shared": cluster.shared, "scratch": cluster.scratch}
    short = cluster.resources(kind).model_copy(update={"time": _TIME})
    environment = {**cluster.environment, ERRAND: json.dumps(errand)}
    trial = cluster.model_copy(update={kind: short, "lead_seconds": 30, "environment": environment})
    job = Job(kind, "report", ("doctor",), kind)
    try:
        place = Place(folder, Path.cwd(), folder, os.environ.get("SLURM_CONF"))
        (folder / "job.sbatch").write_text(trial_script(job, trial, place))
        job_id = sbatch("job.sbatch", folder=folder)
    except InputError as error:
        yield NODES.failure(kind, str(error), "see the findings above")
        return
    state = left = ""
    try:
        state, waited = _wait(job_id, patience)
        wanted = cluster.resources(kind).nodes * cluster.tasks_of(kind)
        found = _found(folder / "found", wanted, _LATE if state in ("COMPLETED", _FORGOTTEN) else 3.0)
        checks = [*_judge(kind, cluster, folder, waited, found)]
    finally:  # also if somebody interrupts it
        if not _has_ended(state):
            left = _take_back(job_id)
    yield from checks
    if left:
        yield NODES.warning(kind, f"job {job_id} may still be there: {left}", f"scancel {job_id}")


def trial_script(job: Job, cluster: Cluster, place: Place) -> str:
    """The script that a launch would submit, with `reach` as its program."""
    text = render(job, cluster, place)
    script = text.replace(" grasp_dist.launch.task ", " grasp_dist.launch.doctor.reach ")
    assert script != text
    return script


def _take_back(job_id: str) -> str:
    """Cancel a job; what Slurm says if it does not take that, several times."""
    for pause in (1.0, 5.0, 0.0):
        try:
            scancel([job_id])
        except InputError as error:
            said = str(error)
            time.sleep(pause)
        else:
            return ""
    return said


def _wait(job_id: str, patience: float) -> tuple[str, str]:
    """The state in which the job has ended, or in which it was given up, and then why."""
    start = time.monotonic()
    while True:
        state = _state(job_id)
        if _has_ended(state):
            return state, ""
        waited = time.monotonic() - start
        if waits(state) and waited > patience:
            reason = (show_job(job_id) or {}).get("Reason", "no reason is given")
            return state, f"it has not started within {patience:g} s ({reason})"
        if waited > patience + _RUNS:
            return state, f"it has not ended ({state})"
        time.sleep(0.5)


def _has_ended(state: str) -> bool:
    """Whether the job was seen to have ended; an empty state is one that was never asked for."""
    return state not in ("", _UNKNOWN) and is_over(state)


def _state(job_id: str) -> str:
    """A job that Slurm no longer knows has ended; but scontrol says nothing either when the controller is busy."""
    if shown := show_job(job_id):
        return shown.get("JobState", _UNKNOWN)
    try:
        queued = {job.job_id: job.state for job in queue()}
    except InputError:
        return _UNKNOWN
    return queued.get(job_id, _FORGOTTEN)


def _found(folder: Path, wanted: int, patience: float) -> list[dict[str, Any]]:
    """What the processes have written, as soon as it is all there."""
    deadline = time.monotonic() + patience
    while len(files := sorted(folder.glob("rank-*.json"))) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    return [json.loads(path.read_text()) for path in files]


def _judge(kind: Kind, cluster: Cluster, folder: Path, waited: str, found: list[dict[str, Any]]) -> Iterator[Check]:
    wanted = cluster.resources(kind).nodes * cluster.tasks_of(kind)
    hosts = sorted({item["host"] for item in found})
    if waited and not found:
        yield NODES.warning(
            kind, f"the job was given up: {waited}", "try again when nodes are free; `squeue --me --start`"
        )
        return
    if len(found) < wanted:
        seen = f"{len(found)} of {wanted} processes have reported" + (f" ({', '.join(hosts)})" if hosts else "")
        log = _log(folder / "logs")
        yield NODES.failure(
            kind, f"{seen}: {log or 'no log has appeared'}",
            f"mend what the log says; if there is none, the nodes do not see {folder.parent}: use a shared folder",
        )  # fmt: skip
        return
    wrong = [*_wrong(kind, cluster, found)]
    yield from wrong
    if wrong:
        return
    one = found[0]
    reached = {name: max(item["reached"].get(name, 0) for item in found) for name in one["reached"]}
    times = "".join(f", {name} all-reduce in {seconds:.1f} s" for name, seconds in reached.items())
    gpus = f", {len(one['gpus'])} x {one['gpus'][0]} each" if one["gpus"] else ""
    who = f"{wanted} process(es) on {', '.join(hosts)}{gpus}"
    yield NODES.ok(kind, f"{who}: Python {one['python']}, torch {one['torch']}{times}")


def _wrong(kind: Kind, cluster: Cluster, found: list[dict[str, Any]]) -> Iterator[Check]:
    def on(items: list[dict[str, Any]]) -> str:
        return ", ".join(sorted({item["host"] for item in items}))

    if blind := [item for item in found if not item["marker"]]:
        yield NODES.failure(kind, f"{on(blind)} does not see a file written here", "use a shared folder for run_dir")
    for name in cluster.shared:
        if blind := [item for item in found if name in item["unseen"]]:
            yield NODES.failure(
                kind, f"{on(blind)} does not see {name}", "correct `shared`, or `constraint` other nodes"
            )
    if full := [item for item in found if item["scratch"]]:
        what = f"scratch cannot be used on {on(full)}: {full[0]['scratch']}"
        yield NODES.failure(kind, what, "correct `scratch`, or leave it out")
    for name in (cluster.interface or "").split(","):
        if name and (without := [item for item in found if name not in item["interfaces"]]):
            known = ", ".join(without[0]["interfaces"])
            yield NODES.failure(kind, f"{on(without)} has no interface {name}", f"set `interface`: there are {known}")
    if cluster.gpus_of(kind) and (without := [item for item in found if not item["gpus"]]):
        yield NODES.failure(
            kind, f"torch {without[0]['torch']} sees no GPU on {on(without)}",
            "look at gpu_option and gpu_type, at the nodes' driver (`nvidia-smi`), and at the build of torch",
        )  # fmt: skip
    if taken := [item for item in found if item["port"]]:
        remedy = "launch again, which takes another port; if it happens often, ask what listens there"
        yield NODES.warning(kind, f"{taken[0]['port']} on {on(taken)}", remedy)
    if apart := [item for item in found if "error" in item]:
        yield NODES.failure(
            kind, f"the processes on {on(apart)} did not reach each other: {apart[0]['error']}",
            "name the right network under `interface`; NCCL_DEBUG: INFO in `environment`, for once, says more",
        )  # fmt: skip


def _log(logs: Path) -> str:
    """What the processes said last before srun told of their end; else the last words of the job."""
    for pattern in ("*-r*.log", "*.out"):
        for path in sorted(logs.glob(pattern)):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
            end = next((number for number, line in enumerate(lines) if line.startswith("srun: error:")), len(lines))
            if lines:
                return " | ".join((lines[1:end] or lines)[-3:])  # the first line is the script's own
    return ""
