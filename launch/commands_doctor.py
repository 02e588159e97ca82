"""The command line's `grasp-dist doctor`, thin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from grasp_dist.errors import InputError

__all__ = ["doctor_command"]


def doctor_command(
    ctx: typer.Context,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="YAML configuration of a run, to look at its folders too.", show_default=False),
    ] = None,
    cluster: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--cluster",
            help="A cluster that comes along, or the path of a YAML file (docs/clusters.md).",
            show_default=False,
        ),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Submit short jobs, and look on the nodes.")] = False,
) -> None:
    """Look for what would go wrong with a launch: versions and known security holes, folders, network, GPUs, Slurm or
    Ray.

    Every finding says what to do. Ends with code 2 if anything fails. Without --deep nothing is submitted.

    For example: grasp-dist doctor my.yaml --cluster slurm-cpu --cluster.partition main
    """
    from rich.console import Console

    from grasp_dist.config_files import load_config
    from grasp_dist.launch.doctor import doctor, show, summary

    settings = dict(ctx.obj or {})
    of_cluster = settings.pop("cluster", None)
    if of_cluster and cluster is None:
        raise InputError("--cluster.KEY VALUE changes a setting of --cluster NAME, which is missing")
    if settings and config is None:
        raise InputError("settings with dots belong to a CONFIG, which is missing; the cluster's begin with --cluster.")
    loaded = load_config(config, settings) if config else None
    console = Console(highlight=False)
    found = doctor(cluster, loaded, overrides=of_cluster, deep=deep, say=lambda check: show(check, console))
    console.print(summary(found), style="bold", soft_wrap=True)
    if any(check.state == "failure" for check in found):
        raise typer.Exit(2)
