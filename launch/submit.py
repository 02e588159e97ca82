"""`grasp-dist launch`: check, preview, and start the jobs of a run where the cluster says, in one call."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from grasp_dist.config import RunConfig
from grasp_dist.config_files import save_config
from grasp_dist.errors import InputError
from grasp_dist.graph import STAGES, RunGraph
from grasp_dist.launch import preview, slurm
from grasp_dist.launch.cluster import Cluster, load_cluster
from grasp_dist.launch.jobs import Job, plan_jobs
from grasp_dist.launch.preconditions import check_cluster, check_lead, check_places, nothing_beside
from grasp_dist.launch.records import Launcher, Record, Submitted, make_folder, next_folder
from grasp_dist.launch.scripts import CONFIG, Place, dependency, job_name, render, script_name
from grasp_dist.stages import prepare

__all__ = ["launch", "submit_jobs"]


def launch(
    config: RunConfig,
    cluster_name: str,
    overrides: dict[str, Any] | None = None,
    *,
    dry_run: bool = False,
    launcher: str | None = None,
) -> Record | None:
    """Bring a run up to date on a cluster: what is finished stays, the rest is submitted as jobs that wait for each
    other. Returns what was launched; None if there was nothing to do, or with `dry_run`.

    cluster_name, overrides: as `load_cluster` takes them. launcher: in place of the cluster's own. dry_run: check, and
    print the graph and every script; needs no Slurm and writes nothing.
    Raises `InputError`, before anything is submitted, for what would stop the jobs.
    """
    name, cluster = load_cluster(cluster_name, overrides)
    if cluster.kind == "ray":
        raise InputError(
            f"the cluster {name} is a Ray cluster, which takes sweeps: `grasp-dist sweep CONFIG --cluster {name}`"
        )
    how = _launcher(cluster, launcher)
    if config.tune is not None:
        from grasp_dist.launch.sweep.grid import expand

        config = expand(config)
    config = _with_lead(config, cluster)
    check_places(config, cluster)
    if how != "local":
        check_lead(config, cluster)
    if not dry_run and cluster.kind == "slurm" and how != "debug":
        check_cluster(plan_jobs(RunGraph(config), cluster), cluster)
    with contextlib.ExitStack() as alone:
        if not dry_run:
            alone.enter_context(nothing_beside(config.run_dir))
        if how == "local":
            os.environ |= cluster.environment
        prepare(config, STAGES, dry_run=dry_run)
        if not (jobs := plan_jobs(RunGraph(config), cluster)):
            page = Path(config.run_dir).absolute() / "report" / f"{config.report.name}.html"
            print(f"everything is finished: {page}")
            return None
        preview.show_graph(jobs, cluster, title=f"{config.run_dir} on {name}")
        folder = next_folder(config.run_dir) if dry_run else make_folder(config.run_dir)
        if how == "local":
            return None if dry_run else _by_torchrun(config, name, cluster, jobs, folder, alone)
        place = Place(folder, Path.cwd(), Path(config.run_dir), os.environ.get("SLURM_CONF"))
        if how == "sbatch":
            return _by_sbatch(config, name, cluster, jobs, place, dry_run=dry_run)
        return _by_submitit(config, name, cluster, jobs, place, how=how, dry_run=dry_run)


def _by_sbatch(
    config: RunConfig, name: str, cluster: Cluster, jobs: Sequence[Job], place: Place, *, dry_run: bool
) -> Record | None:
    scripts = {script_name(job.key): render(job, cluster, place) for job in jobs}
    if dry_run:
        preview.show_commands(jobs, place.folder)
        preview.show_scripts(scripts, place.folder)
        return None
    save_config(config, place.folder / CONFIG)
    for file, text in scripts.items():
        (place.folder / file).write_text(text, encoding="utf-8")

    def submit(job: Job, ids: Mapping[str, str]) -> tuple[str, str]:
        file = script_name(job.key)
        return slurm.sbatch(file, folder=place.folder, options=dependency(job, ids)), file

    record = Record(place.folder, name, "sbatch", tuple(_submitted(job, place, script_name(job.key)) for job in jobs))
    return submit_jobs(jobs, record, submit)


def _by_submitit(
    config: RunConfig, name: str, cluster: Cluster, jobs: Sequence[Job], place: Place, *, how: Launcher, dry_run: bool
) -> Record | None:
    from grasp_dist.launch.submitit_jobs import SlurmJobs, check_submitit, run_in_order, short_jobs

    check_submitit()
    on_slurm = how == "submitit" and cluster.kind == "slurm"
    slurm_jobs = SlurmJobs(cluster, place)
    if on_slurm and (short := short_jobs(jobs, cluster)):
        print(
            f"warning: {', '.join(short)}: jobs of ten minutes or less count as timed out for submitit as soon as they "
            "start. They save and are requeued all the same; what submitit's own tools say of them is wrong",
            file=sys.stderr,
        )
    if dry_run:
        if on_slurm:
            ids = {job.key: f"${{{job.key}}}" for job in jobs}
            preview.show_scripts({job.key: slurm_jobs.script(job, ids) for job in jobs}, place.folder / "submitit")
        return None
    save_config(config, place.folder / CONFIG)
    if on_slurm:
        record = Record(place.folder, name, how, tuple(_submitted(job, place) for job in jobs))
        with slurm.outside_of_jobs():
            return submit_jobs(jobs, record, slurm_jobs.submit)
    record = Record(place.folder, name, how, tuple(Submitted.of(job) for job in jobs))
    record.write()
    os.environ |= cluster.environment
    run_in_order(jobs, cluster, place, debug=how == "debug")
    return record


def _by_torchrun(
    config: RunConfig, name: str, cluster: Cluster, jobs: Sequence[Job], folder: Path, alone: contextlib.ExitStack
) -> Record:
    """The stages as processes on this machine, one after the other; they hold the whole run, so `alone` is left."""
    from grasp_dist.launch.local import run_local

    save_config(config, folder / CONFIG)
    record = Record(folder, name, "local", tuple(Submitted.of(job) for job in jobs))
    record.write()
    alone.close()
    code = run_local(["-m", "grasp_dist.worker", str(folder / CONFIG), *STAGES], nproc=cluster.tasks_of("train"))
    if code:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)
    return record


def _launcher(cluster: Cluster, wanted: str | None) -> Launcher:
    default = "local" if cluster.kind == "local" else cluster.launcher
    how = wanted or default
    if how not in get_args(Launcher):
        raise InputError(f"there is no launcher {how!r}: choose one of {', '.join(get_args(Launcher))}")
    if how == "sbatch" and cluster.kind == "local":
        raise InputError("a cluster of kind local has no sbatch; leave --launcher out, or choose submitit or debug")
    if how == "local" and cluster.kind == "slurm":
        raise InputError("this cluster's jobs go through Slurm; use --cluster local to run the stages here")
    return how  # type: ignore[return-value]


def _with_lead(config: RunConfig, cluster: Cluster) -> RunConfig:
    """The configuration that the jobs read: the lead time is the cluster's, unless the run has its own."""
    if config.checkpoint.lead_seconds is not None or cluster.kind == "local":
        return config
    checkpoint = config.checkpoint.model_copy(update={"lead_seconds": float(cluster.lead_seconds)})
    return config.model_copy(update={"checkpoint": checkpoint})


def _submitted(job: Job, place: Place, script: str | None = None) -> Submitted:
    return Submitted.of(job, script=script, name=job_name(job.key, place.run_dir))


def submit_jobs(
    jobs: Sequence[Job], record: Record, submit: Callable[[Job, Mapping[str, str]], tuple[str, str]]
) -> Record:
    """Submit the jobs in order; all of them or none. submit(job, ids of those before): its id, and its script."""
    ids: dict[str, str] = {}
    record.write()
    try:
        for job in jobs:
            ids[job.key], script = submit(job, ids)
            record = record.with_job(job.key, ids[job.key], script)
            record.write()
    except BaseException as error:
        taken_back = _take_back(ids, record.folder)
        if isinstance(error, slurm.NoAnswer) or not isinstance(error, Exception):
            # sbatch was ended in its midst.
            run = shlex.quote(str(record.folder.parent.parent))
            taken_back += (
                f"; one may still be on its way: `squeue --me` shows it then, `grasp-dist cancel {run}` stops it"
            )
        elif isinstance(error, InputError):
            taken_back += "; mend the cluster's file, or use --cluster.KEY VALUE, and launch again"
        if isinstance(error, InputError):
            raise InputError(f"{error}{taken_back}") from None
        print(f"not everything was submitted{taken_back}", file=sys.stderr)
        raise
    for key, job_id in ids.items():
        print(f"submitted {key}: job {job_id}")
    print(f"launched as {record.folder}; `grasp-dist status {record.folder.parent.parent}` shows how it stands")
    return record


def _take_back(ids: Mapping[str, str], folder: Path) -> str:
    """Cancel what was submitted, also what was submitted from the launch folder without that its id came back; what to
    say about it."""
    named = {job_id: key for key, job_id in ids.items()}
    try:
        for job in slurm.queue():
            if job.folder.startswith("/") and Path(job.folder).resolve() == folder.resolve():
                named.setdefault(job.job_id.partition("_")[0], job.name)
        unseen = ""
    except InputError as error:
        unseen = f"; whether Slurm has others of {folder} could not be seen ({error})"
    if not named:
        return unseen or "; nothing was submitted"
    shown = ", ".join(f"{job_id} ({key})" for job_id, key in named.items())
    try:
        slurm.scancel(named)
    except InputError as error:
        return f"; the jobs {shown} were submitted before, and could not be cancelled ({error}): scancel them{unseen}"
    return f"; the jobs {shown} were submitted before, and have been cancelled{unseen}"
