"""What would stop a launch, found before anything is submitted; each with its remedy."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch import slurm
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.records import jobs_alive, read_records
from grasp_dist.run_lock import Holder, RunLock, await_free
from grasp_dist.training.checkpoints.store import Checkpoints, read_marker
from grasp_dist.training.preemption import MARGIN

__all__ = ["check_cluster", "check_lead", "check_nothing_runs", "check_places", "named_paths", "nothing_beside"]


def check_places(config: RunConfig, cluster: Cluster) -> None:
    """That the run directory can be written, and that every node sees what the jobs read and write."""
    folder = Path(config.run_dir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the run directory {config.run_dir} cannot be written: {folder}: {error.strerror}; choose another run_dir "
            "(--run_dir ...)"
        ) from None
    shared = [Path(root).resolve() for root in cluster.shared]
    if not shared:
        return
    for what, path in _places(config):
        if not any(path.resolve().is_relative_to(root) for root in shared):
            raise InputError(
                f"{what} is {path}, which is in none of the folders that every node of the cluster sees "
                f"({', '.join(cluster.shared)}); move it there, or add its folder to `shared` in the cluster's file if "
                "the nodes see it"
            )


def _places(config: RunConfig) -> Iterator[tuple[str, Path]]:
    yield "run_dir", Path(config.run_dir)
    yield "the working directory", Path.cwd()
    for what, path in named_paths(config).items():
        if Path(path).exists():  # else the id of a hub, or `detected`
            yield what, Path(path)


def named_paths(config: RunConfig) -> dict[str, str]:
    """{setting: value} of every setting that may name a file or folder to read; hub ids and `detected` among them."""
    named = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "data.path": config.data.path,
        "detect.basis": config.detect.basis,
        "detect.adapter": config.detect.adapter,
    }
    named |= {f"evaluate.probes.{probe.name}.path": probe.path for probe in config.evaluate.probes}
    named |= {f"project.arms.{name}.basis": arm.basis for name, arm in config.project.arms.items()}
    for name, arm in config.project.arms.items():
        for key in ("path", "unaligned"):
            named[f"project.arms.{name}.alternative.{key}"] = getattr(arm.alternative, key, "")
    return {what: path for what, path in named.items() if path}


def check_lead(config: RunConfig, cluster: Cluster) -> None:
    """That the time between the signal and the end is enough for a save, as far as saves were made in this run."""
    own = config.checkpoint.lead_seconds
    if own is not None and own > cluster.lead_seconds:
        raise InputError(
            f"checkpoint.lead_seconds is {own:g}, but the cluster's jobs are asked to stop {cluster.lead_seconds} s "
            "before they end (lead_seconds); leave checkpoint.lead_seconds out, or raise the cluster's"
        )
    lead = float(own or cluster.lead_seconds)
    for task in RunGraph(config).tasks(("naive", "detect", "project")):
        for _, folder in Checkpoints(task.unit.folder / "checkpoints").folders():
            try:
                seconds = read_marker(folder).get("seconds")
            except InputError:
                continue
            if seconds is not None and seconds > lead * (1 - MARGIN):
                raise InputError(
                    f"the last save of {task.name} took {seconds:.0f} s, and {lead:g} s are left between the signal to "
                    f"stop and the end of a job; use --cluster.lead_seconds {max(60, round(2 * seconds) + 60)}"
                )
            break


@contextlib.contextmanager
def nothing_beside(run_dir: str | Path) -> Iterator[None]:
    """`check_nothing_runs`, and no other launch of the run until the end of this one's submission."""
    with RunLock(run_dir, what="launch", part="launch"):
        check_nothing_runs(run_dir)
        yield


def check_nothing_runs(run_dir: str | Path) -> None:
    """That no job of an earlier launch is queued or running, and no process works on the run or a part of it. One that
    may be gone is waited for as `RunLock` does."""
    if left := [queued for queued, _ in jobs_alive(run_dir, read_records(run_dir))]:
        left.sort(key=lambda job: int(job.job_id.partition("_")[0]))  # Slurm shows what is pending first
        shown = ", ".join(f"{job.job_id} ({job.name}, {job.state})" for job in left[:8])
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        ids = sorted({job.job_id.partition("_")[0] for job in left}, key=int)
        raise InputError(
            f"jobs of an earlier launch of {run_dir} are still there: {shown}{more}; wait until they have ended, or "
            f"stop them: `grasp-dist cancel {shlex.quote(str(run_dir))}`, or `scancel {' '.join(ids)}`"
        )
    await_free(run_dir, what="launch", ended=lambda holder: _job_ended(holder, Path(run_dir)))


def _job_ended(holder: Holder, run_dir: Path) -> bool:
    """Whether Slurm here says that the holder's job, launched in this run, has ended."""
    shown = slurm.show_job(holder.slurm_job) if holder.slurm_job else None
    if shown is None or (run_dir / "launch").resolve() not in Path(shown.get("WorkDir", "/")).resolve().parents:
        return False
    return slurm.is_over(shown["JobState"])


def check_cluster(jobs: Sequence[Job], cluster: Cluster) -> None:
    """That Slurm is here, and has the partitions that are asked for."""
    known = slurm.partitions()
    for job in jobs:
        wanted = cluster.resources(job.kind).partition or cluster.partition
        for name in (wanted or "").split(","):
            if name and name not in known:
                raise InputError(
                    f"{job.key} asks for the partition {name!r}, and this cluster has {', '.join(known)}; set "
                    "`partition` in the cluster's file, or use --cluster.partition NAME"
                )
