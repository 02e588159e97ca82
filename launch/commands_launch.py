"""`grasp-dist launch CONFIG --cluster NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["launch"]


def launch(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML configuration; recipes/ holds examples.", show_default=False)],
    cluster: Annotated[
        str,
        typer.Option("--cluster", help="A cluster that comes along, or the path of a YAML file (docs/clusters.md)."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the job graph and every script, and stop. Needs no Slurm.")
    ] = False,
    launcher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--launcher", help="sbatch, submitit or debug. Default: the cluster's own.", show_default=False),
    ] = None,
) -> None:
    """Run all stages on a cluster, as jobs that wait for each other. Finished ones are kept; the same command goes on
    after a failure."""
    from grasp_dist.config_files import load_config
    from grasp_dist.launch.submit import launch as start

    tree = dict(ctx.obj or {})
    of_cluster = tree.pop("cluster", None)
    start(load_config(config, tree), cluster, of_cluster, dry_run=dry_run, launcher=launcher)
