"""A sweep in Ray on a Slurm cluster: one job that starts Ray on its nodes (`ray symmetric-run`) and the sweep in it.

Ray has whole nodes to itself, since it ends every Ray of this user on them when the sweep has come to its end.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from pathlib import Path

import yaml

from grasp_dist.config import RunConfig
from grasp_dist.config_files import save_config
from grasp_dist.launch import slurm
from grasp_dist.launch.cluster import Cluster, Resources, seconds_of
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.preconditions import check_cluster, check_places, nothing_beside
from grasp_dist.launch.preview import show_scripts
from grasp_dist.launch.records import Record, Submitted, make_folder, next_folder
from grasp_dist.launch.scripts import (
    CONFIG,
    Place,
    command,
    directives,
    job_name,
    python_of,
    script_name,
    surroundings,
    template,
)
from grasp_dist.launch.submit import submit_jobs
from grasp_dist.launch.sweep.run import begin

__all__ = ["render_ray_job", "submit_ray_sweep", "whole_job", "within"]

_JOB = Job("sweep", "sweep", ("sweep",), "train")
_CLUSTER = "ray.yaml"


def submit_ray_sweep(config: RunConfig, name: str, cluster: Cluster, *, dry_run: bool = False) -> Record | None:
    """Submit the job; returns what was launched, None with `dry_run`, which prints the script and needs no Slurm.

    Raises `InputError`, before anything is submitted, for what would stop it.
    """
    check_places(config, cluster)
    with contextlib.ExitStack() as alone:
        if not dry_run:
            alone.enter_context(nothing_beside(config.run_dir))
        whole = begin(config, dry_run=dry_run)
        of_job, of_trials = whole_job(cluster, trials=(config.tune and config.tune.concurrent) or 1), within(cluster)
        if not dry_run:
            check_cluster([_JOB], of_job)
        folder = next_folder(config.run_dir) if dry_run else make_folder(config.run_dir)
        script = script_name(_JOB.key)
        text = render_ray_job(of_job, Place(folder, Path.cwd(), Path(whole.run_dir), os.environ.get("SLURM_CONF")))
        nodes, hours = of_job.train.nodes, of_job.train.nodes * seconds_of(of_job.train.time) / 3600
        print(
            f"one job of {nodes} node{'s' if nodes > 1 else ''}, at most {hours:.4g} node-hours for each of its starts"
        )
        if dry_run:
            show_scripts({_CLUSTER: of_trials, script: text}, folder)
            return None
        save_config(config, folder / CONFIG)
        (folder / _CLUSTER).write_text(of_trials, encoding="utf-8")
        (folder / script).write_text(text, encoding="utf-8")
        called = job_name(_JOB.key, Path(config.run_dir).absolute())
        record = Record(folder, name, "sbatch", (Submitted.of(_JOB, name=called),))
        return submit_jobs([_JOB], record, lambda job, ids: (slurm.sbatch(script, folder=folder), script))


def render_ray_job(cluster: Cluster, place: Place) -> str:
    """The text of the job's script. cluster: with the whole job's nodes under `train`, one process on each."""
    python = python_of(cluster)
    return template("ray.sbatch.j2").render(
        title=f"sweep of {place.run_dir} in Ray",
        file=script_name(_JOB.key),
        key=_JOB.key,
        directives=directives(_JOB, cluster, place),
        interface=cluster.interface,
        programs=str(Path(python).parent) if Path(python).is_absolute() else None,
        gpus=cluster.gpus_of("train"),
        command=command(_JOB, cluster, place, program="-m ray.scripts.scripts symmetric-run"),
        stop=command(_JOB, cluster, place, program="-m ray.scripts.scripts stop --force"),
        entry=f"{shlex.quote(python)} -m grasp_dist.cli sweep",
        config=CONFIG,
        cluster=_CLUSTER,
        page=str(place.run_dir.absolute() / "sweep" / "sweep.html"),
        **surroundings(_JOB, cluster, place),
    )


def whole_job(cluster: Cluster, *, trials: int) -> Cluster:
    """The cluster as the job asks for it: whole nodes for so many trials at once, with one process on each."""
    wanted, gpus = cluster.train, cluster.gpus_of("train")
    cpus = cluster.tasks_of("train") * (wanted.cpus_per_task or 1)
    room = [cluster.gpus_per_node // gpus] if gpus else []
    room += [cluster.cpus_per_node // cpus] if cluster.cpus_per_node else []
    on_node = max(1, min(room, default=1))
    nodes = wanted.nodes * trials if wanted.nodes > 1 else math.ceil(trials / on_node)
    own = {
        "nodes": nodes,
        "gpus_per_node": cluster.gpus_per_node if gpus else 0,
        "tasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_node or on_node * cpus,
        "exclusive": True,
        # The trials on a node share its memory: all of it, since no other job is there.
        "memory": wanted.memory and "0",
    }
    return cluster.model_copy(update={"train": wanted.model_copy(update=own)})


def within(cluster: Cluster) -> str:
    """The Ray cluster that the sweep finds when the job's Ray has started, as YAML: what one trial takes."""
    wanted = Resources(
        nodes=cluster.train.nodes,
        tasks_per_node=cluster.tasks_of("train"),
        cpus_per_task=cluster.train.cpus_per_task,
    )
    inside = Cluster(
        kind="ray",
        address="auto",
        gpus_per_node=cluster.gpus_of("train"),
        train=wanted,
        interface=cluster.interface,
        environment={**cluster.environment, "RAY_AUTH_MODE": "token"},
    )
    return yaml.safe_dump(inside.model_dump(exclude_defaults=True), sort_keys=False)
