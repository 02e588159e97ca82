"""What a launch will submit, for a person to read before: the job graph with its costs, the commands, every script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.jobs import Job, node_hours
from grasp_dist.launch.scripts import dependency, script_name

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_commands", "show_graph", "show_scripts"]


def show_graph(jobs: Sequence[Job], cluster: Cluster, *, title: str) -> None:
    """The graph as a tree, each job below the last of those that it waits for, and where jobs have a time limit the
    node-hours that they take at most."""
    from rich.tree import Tree

    hours = node_hours(jobs, cluster) if cluster.kind == "slurm" else {}
    root = Tree(f"[bold]{_plain(title)}[/bold]")
    branches: dict[str, Tree] = {}
    for job in jobs:
        waits = [key for key in (*job.after, job.after_each) if key is not None]
        parent = branches[waits[-1]] if waits else root
        branches[job.key] = parent.add(_line(job, cluster, hours.get(job.key)))
    if hours:
        root.add(f"at most [bold]{sum(hours.values()):.4g}[/bold] node-hours in all")
    _console().print(root)


def show_commands(jobs: Sequence[Job], folder: Path) -> None:
    """The submission as shell commands that do the same."""
    print(f"# The same by hand:\ncd {shlex.quote(str(folder))}")
    names: dict[str, str] = {}
    for job in jobs:
        options = " ".join(["--parsable", *(option.replace("'", "") for option in dependency(job, names))])
        print(f"{job.key}=$(sbatch {options} {script_name(job.key)})")
        names[job.key] = f"${{{job.key}}}"
    print()


def show_scripts(scripts: Mapping[str, str], folder: Path) -> None:
    """Every script, byte for byte, below a line that says where it is to be."""
    for name, text in scripts.items():
        print(f"#################### {folder / name}")
        print(text, end="")
    print("####################")


def _line(job: Job, cluster: Cluster, hours: float | None) -> str:
    wanted, gpus = cluster.resources(job.kind), cluster.gpus_of(job.kind)
    width = f", {cluster.max_array_width} at once" if job.is_array and cluster.max_array_width else ""
    what = f"{len(job.tasks)} tasks{width}" if job.is_array else _plain(job.tasks[0])
    processes = cluster.tasks_of(job.kind)
    where = f"{wanted.nodes} node{'s' if wanted.nodes > 1 else ''} x {processes} process{'es' if processes > 1 else ''}"
    where += f", {gpus} GPU{'s' if gpus > 1 else ''} each" if gpus else ""
    limit = "" if hours is None else f"  {wanted.time}  {hours:.4g} node-hours"
    waits = [*job.after, *([f"the same element of {job.after_each}"] if job.after_each else [])]
    after = f"  [dim]after {', '.join(waits)}[/dim]" if waits else ""
    return f"[bold]{job.key}[/bold]  {what}  {where}{limit}{after}"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _console() -> Console:
    from rich.console import Console

    # In a file or a pipe lines are as long as they need to be.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=500)
