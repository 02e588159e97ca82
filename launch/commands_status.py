"""`grasp-dist status`, `logs` and `cancel`, thin."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from grasp_dist.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grasp_dist.launch.status import RunReader, TaskStatus

__all__ = ["cancel", "logs", "status"]

Run = Annotated[Path, typer.Argument(help="The run_dir of a configuration.", show_default=False)]
_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "out of date": "yellow",
}
_LINES = 5
"""Of a failed task's log, below the table."""


def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="With --watch: seconds between looks.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """What each task of a run is doing: its step, time left, restarts and job, and why it failed.

    Read from the run directory alone, and from Slurm where the run was launched and Slurm answers. Exit code 1 if a
    task has failed.
    """
    from rich.console import Console

    from grasp_dist.launch.status import RunReader

    reader = RunReader(run)
    found, said = _read(reader, run)
    if as_json:
        print(json.dumps({"run": str(run), "tasks": [task.record() for task in found]}, indent=2))
        _warn(said)
    elif watch and sys.stdout.isatty():
        from rich.live import Live

        with Live(_page(run, found, said), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every)
                try:
                    found, said = _read(reader, run)
                except InputError as error:
                    said = str(error)
                live.update(_page(run, found, said), refresh=True)
    else:
        Console(soft_wrap=not sys.stdout.isatty()).print(_page(run, found, said))
    if any(task.state == "failed" for task in found):
        raise typer.Exit(1)


def logs(
    run: Run,
    task: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="For example project/grasp/seed-0; default: what failed, else what runs.", show_default=False
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is added, until Ctrl-C.")] = False,
) -> None:
    """The log of a launched task's last start."""
    from grasp_dist.launch import watch
    from grasp_dist.launch.status import RunReader

    found, unanswered = _read(RunReader(run), run)
    _warn(unanswered)
    chosen = _choose(found, task)
    path = watch.newest_log(run, chosen)
    if path is None:
        raise InputError(
            f"{chosen} has no log in {run}: it was not launched, or has not started yet (`grasp-dist status {run}`). "
            "What runs in the foreground prints to its terminal"
        )
    print(f"{chosen}: {path}", file=sys.stderr)
    if follow:
        for text in watch.follow(path, lines=lines):
            print(text, end="", flush=True)
    else:
        print("\n".join(watch.last_lines(path, lines)))


def cancel(
    run: Run,
    tasks: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="These tasks alone, for example naive/seed-0; default: all.", show_default=False),
    ] = None,
) -> None:
    """Stop a run's jobs, or its processes on this machine. What was saved is kept; launch again to go on."""
    from grasp_dist.launch import watch
    from grasp_dist.launch.status import RunReader

    found, _ = _read(RunReader(run), run)
    wanted = found if not tasks else [one for one in found if one.name in {_choose(found, name) for name in tasks}]
    none = True
    for line in watch.cancel(run, wanted, everything=not tasks):
        print(line, flush=True)
        none = False
    if none:
        print(f"nothing of {run} is running or waiting")


def _read(reader: RunReader, run: Path) -> tuple[list[TaskStatus], str]:
    """The tasks, and why nothing is known of their jobs where Slurm does not answer."""
    from grasp_dist.launch.watch import jobs_of

    try:
        jobs, said = jobs_of(run), ""
    except InputError as error:
        jobs, said = {}, f"without what Slurm knows: {error}"
    return reader.read(jobs), said


def _warn(said: str) -> None:
    if said:
        print(f"warning: {said}", file=sys.stderr)


def _choose(found: list[TaskStatus], task: str | None) -> str:
    import difflib

    names = [one.name for one in found]
    if task is not None:
        task = task.rstrip("/")
        if task in names:
            return task
        near = difflib.get_close_matches(task, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its tasks: {', '.join(names)}"
        raise InputError(f"the run has no task {task!r}; {hint}")
    for state in ("failed", "running", "stopped", "waiting"):
        if chosen := [one.name for one in found if one.state == state]:
            return chosen[0]
    raise InputError(f"nothing has failed or is running; give a task: {', '.join(names)}")


def _page(run: Path, found: list[TaskStatus], said: str) -> RenderableType:
    """said: what kept a look from seeing everything; may be empty."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from grasp_dist.launch import watch

    columns: dict[str, list[str | Text]] = {
        "task": [task.name for task in found],
        "state": [Text(task.state, style=_COLOURS.get(task.state, "dim")) for task in found],
        "step": ["" if task.step is None else f"{task.step}/{task.steps or '?'}" for task in found],
        "loss": ["" if task.loss is None else f"{task.loss:.4g}" for task in found],
        "left": ["" if task.seconds_left is None else _duration(task.seconds_left) for task in found],
        "restarts": [str(task.restarts or "") for task in found],
        "job": [task.job or "" for task in found],
        "": [task.why if task.state in ("running", "waiting") else "" for task in found],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=None, pad_edge=False)
    for name in columns:
        numeric = name in ("step", "loss", "left", "restarts")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    parts: list[RenderableType] = [table, Text()]
    for task in found:
        if task.why and task.state not in ("running", "waiting"):
            parts.append(Text(f"{task.name} {task.state}: {task.why}", style=_COLOURS.get(task.state, "")))
        if task.state == "failed" and (log := watch.newest_log(run, task.name)) is not None:
            parts.append(Text(f"  the end of {log}:"))
            parts += [Text(f"    {line}") for line in watch.last_lines(log, _LINES)]
    done = sum(task.state == "finished" for task in found)
    parts.append(Text(f"{done} of {len(found)} tasks finished"))
    if said:
        parts.append(Text(said, style="yellow"))
    return Group(*parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
