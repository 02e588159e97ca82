"""`grasp-dist sweep CONFIG --tune.rank 1,2,4,8`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from grasp_dist.errors import InputError

if TYPE_CHECKING:
    from grasp_dist.launch.cluster import Cluster

__all__ = ["placed", "sweep"]


def sweep(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML configuration; recipes/ holds examples.", show_default=False)],
    ray: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--ray/--no-ray",
            help="Trials side by side in Ray, or one after the other without it. Default: Ray if it is installed.",
            show_default=False,
        ),
    ] = None,
    cluster: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--cluster",
            help="A Ray cluster that comes along, or the path of a YAML file (docs/clusters.md); or, with --ray, a "
            "Slurm cluster, where one job starts Ray.",
            show_default=False,
        ),
    ] = None,
    nproc: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--nproc", min=1, help="Processes of each trial. Default: 1, or the cluster's.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be checked without training, and stop.")
    ] = False,
) -> None:
    """Find the best rank and side: naive and detection once, then a protected fine-tune and its evaluation for each
    --tune.rank, --tune.side and --tune.seed, random controls among them, and RUN/sweep/sweep.html with the Pareto front
    and a recommendation. Killed anywhere, the same command goes on.

    For example: grasp-dist sweep recipes/organism.yaml --tune.rank 1,2,4,8,16 --tune.side write,both --tune.seed 0,1,2
    """
    from grasp_dist.config_files import load_config

    tree = dict(ctx.obj or {})
    of_cluster = tree.pop("cluster", None)
    settings = load_config(config, tree)
    command = shlex.join(["grasp-dist", *sys.argv[1:]])
    name, chosen = placed(ray=ray, cluster=cluster, overrides=of_cluster, nproc=nproc)
    if chosen is None:
        from grasp_dist.launch.sweep.run import run_sweep

        run_sweep(settings, nproc=nproc or 1, dry_run=dry_run, command=command)
    elif chosen.kind == "slurm":
        from grasp_dist.launch.sweep.ray_job import submit_ray_sweep

        submit_ray_sweep(settings, name, chosen, dry_run=dry_run)
    else:
        from grasp_dist.launch.sweep.ray_trials import run_ray_sweep

        run_ray_sweep(settings, chosen, dry_run=dry_run, command=command)


def placed(
    *, ray: bool | None, cluster: str | None, overrides: dict[str, Any] | None, nproc: int | None
) -> tuple[str, Cluster | None]:
    """The cluster that the trials run in, and its name: a Ray cluster, or a Slurm cluster in whose nodes Ray is to be
    started; None: one after the other, here."""
    from grasp_dist.launch.cluster import Cluster, Resources, load_cluster

    if cluster is not None:
        if ray is False:
            raise InputError("--no-ray runs the sweep here, and --cluster elsewhere; give one of them")
        if nproc is not None:
            raise InputError(
                "--nproc is for a sweep on this machine; how many processes a trial has is said by the cluster "
                "(--cluster.train.nodes, --cluster.train.tasks_per_node)"
            )
        name, chosen = load_cluster(cluster, overrides)
        if chosen.kind == "local" or (chosen.kind == "slurm" and not ray):
            ways = (
                f"`grasp-dist launch CONFIG --cluster {name}` with the same --tune options runs the sweep's jobs there"
            )
            ways += ", and --ray starts Ray on nodes of it" if chosen.kind == "slurm" else ""
            raise InputError(
                f"the cluster {name} is of kind {chosen.kind}, and this command takes sweeps to Ray; {ways}"
            )
        return name, chosen
    if overrides:
        raise InputError("--cluster.* options change a cluster's settings; name it with --cluster")
    if ray is None:
        ray = importlib.util.find_spec("ray") is not None
        print(
            "trials side by side in Ray, on this machine" if ray else "Ray is not installed: one trial after the other"
        )
    if not ray:
        return "", None
    import torch

    number = nproc or 1
    gpus = number if torch.cuda.is_available() else 0
    here = Cluster(
        kind="ray",
        address=os.environ.get("RAY_ADDRESS", "local"),
        gpus_per_node=gpus,
        train=Resources(tasks_per_node=number),
        environment={"RAY_AUTH_MODE": "token"},
    )
    return here.address, here
