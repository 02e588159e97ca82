"""The command line for checkpoints: `grasp-dist checkpoint list|verify|prune` and `grasp-dist export`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from grasp_dist.errors import InputError
from grasp_dist.training.checkpoints.finding import checkpoint_roots, is_checkpoint, run_above
from grasp_dist.training.checkpoints.store import MARKER, Checkpoints, Listed, check_files, read_marker, remove

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["checkpoint", "export"]

checkpoint = typer.Typer(
    no_args_is_help=True,
    help="Look at, check and thin out the checkpoints that training leaves in "
    "RUN/<stage>/.../checkpoints/step-<n>. A checkpoint is valid when it was finished and every file in it is, bit for "
    "bit, what was written; training continues from the newest valid one by itself. `grasp-dist export` makes a usable "
    "model of one.",
)

_FOLDERS = "A run directory, a task in it, or its checkpoints folder"
Where = Annotated[Path, typer.Argument(metavar="PATH", help=f"{_FOLDERS}; or one step's folder.", show_default=False)]


class Dtype(str, Enum):
    """What weights can be cast to."""

    bf16 = "bf16"
    fp32 = "fp32"


@checkpoint.command(name="list")
def list_(
    path: Where,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare the files' sizes, not their content; at once, also for large ones.")
    ] = False,
) -> None:
    """Show step, time, size, world size, engine and state of every checkpoint, newest first.

    Reads all files to compare them with their checksums, unless --quick is given.
    """
    from rich.table import Table
    from rich.text import Text

    console = _console()
    for root, found in _examine(path, quick):
        table = Table(title=Text(str(root)), title_justify="left", title_style="bold")
        for name in ("step", "when", "size", "world size", "engine", "state"):
            table.add_column(name, justify="right" if name in ("step", "size", "world size") else "left")
        for entry in found:
            color = {"valid": "green", "damaged": "red", "unfinished": "yellow"}[entry.state]
            reason = entry.reason.replace(f"{entry.path}/", "")
            state = "sizes fit" if quick and entry.state == "valid" else entry.state
            table.add_row(
                str(entry.step),
                _when(entry.path),
                _size(sum(_files(entry.path).values())),
                str(entry.record.get("world_size", "-")),
                str(entry.record.get("strategy", "-")),
                Text.assemble((state, color), f": {reason}" if reason else ""),
            )
        console.print(table)


@checkpoint.command()
def verify(path: Where) -> None:
    """Compare every file of every checkpoint with its checksum; exit code 2 if any is damaged, or none is valid.

    Reads all of them. An unfinished checkpoint is what a killed run leaves: training passes it over, and it is no error
    here, unless it is the one that was asked for.
    """
    every = [entry for _, found in _examine(path, quick=False) for entry in found]
    for entry in every:
        print(f"{entry.path}: {entry.state}" + (f" ({entry.reason})" if entry.reason else ""))
    damaged = [entry for entry in every if entry.state == "damaged"]
    if damaged:
        raise InputError(
            f"{len(damaged)} of {len(every)} checkpoints are damaged; first: {damaged[0].reason}. Training passes "
            "damaged ones over; `grasp-dist checkpoint prune --damaged` removes them"
        )
    if not any(entry.state == "valid" for entry in every):
        raise InputError(f"none of the checkpoints under {path} is valid; the same training command starts anew")


@checkpoint.command()
def prune(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=f"{_FOLDERS}.", show_default=False)],
    keep_last: Annotated[int, typer.Option(min=1, help="Keep this many of the newest valid ones.", show_default=False)],
    keep_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Keep also every valid one whose step is a multiple of this."),
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Remove damaged, unfinished and set-aside ones too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove older checkpoints, of each training run under PATH. The newest valid one always stays.

    All files are read, to know which ones are valid. With --damaged, no training may be running there, since what it is
    writing at this moment is unfinished too.

    For example: grasp-dist checkpoint prune runs/mine --keep-last 2 --keep-every 1000
    """
    if is_checkpoint(path):
        raise InputError(f"{path} is a single checkpoint; give the folder that it is in, or remove it yourself")
    roots = checkpoint_roots(path)
    removed: list[tuple[Path, int]] = []
    with _no_writer(roots if damaged and not dry_run else []):
        for root, found in _examine(path, quick=False):
            steps = [entry.step for entry in found if entry.state == "valid"]
            kept = set(steps[:keep_last]) | {step for step in steps if keep_every and step % keep_every == 0}
            going: list[tuple[Path, str]] = [
                (entry.path, entry.state)
                for entry in found
                if entry.step not in kept and (damaged or entry.state == "valid")
            ]
            going += [(folder, "set aside") for folder in sorted(root.glob("step-*.old-*")) if damaged]
            for folder, state in going:
                removed.append((folder, sum(_files(folder).values())))
                print(f"{'would remove' if dry_run else 'removing'} {folder} ({state})")
                if not dry_run:
                    remove(folder)
                    if folder.exists():
                        raise InputError(f"{folder} cannot be removed; check its owner and permissions")
    freed = _size(sum(size for _, size in removed))
    print(f"{len(removed)} checkpoint(s), {freed}" + (" (dry run: nothing was removed)" if dry_run else " freed"))


def export(
    ctx: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="One step's folder, or a checkpoints folder for the newest valid one; or a task's folder (or a run "
            "directory with one task) for its result if it is finished, else its newest valid checkpoint.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="LoRA: the whole model, with the adapter merged in.")] = False,
    base: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory of the base model, if it is not where the checkpoint says.", show_default=False),
    ] = None,
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045
        typer.Option(help="Of all weights. Default: the base's own; of an adapter: as trained.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base model.")
    ] = False,
) -> None:
    """Make a usable model of a checkpoint: a PEFT adapter (LoRA), or a Hugging Face model directory (--merge, or full
    fine-tuning). Needs no GPU, and little memory however large the model.

    For example: grasp-dist export runs/mine/project/grasp/seed-0 --out my-adapter
    """
    if ctx.obj:
        raise InputError("settings with dots belong to a CONFIG; `grasp-dist export --help` has the options of export")
    from grasp_dist.export import export_checkpoint

    done = export_checkpoint(
        source,
        out,
        merge=merge,
        base=base,
        dtype=None if dtype is None else dtype.value,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        check=_verified,
        progress=lambda num_bytes: _bar("writing", num_bytes),
    )
    print(f"export: {done}")


# -- inside


def _examine(path: Path, quick: bool) -> list[tuple[Path, list[Listed]]]:
    """Each checkpoints folder that the path means, and what is in it, newest first."""
    if is_checkpoint(path):
        groups = [(path.parent, [(_step(path), path)])]
    else:
        groups = [(root, Checkpoints(root).folders()) for root in checkpoint_roots(path)]
    total = sum(sum(_files(folder).values()) for _, folders in groups for _, folder in folders)
    with _bar("reading", 0 if quick else total) as advance:
        return [(root, [_look(step, folder, quick, advance) for step, folder in folders]) for root, folders in groups]


def _look(step: int, folder: Path, quick: bool, advance: Callable[[int], None]) -> Listed:
    record: dict[str, Any] = {}
    if not (folder / MARKER).exists():
        return Listed(step, folder, "unfinished", "it was never finished", record)
    try:
        record = read_marker(folder)
        _compare(folder, record, quick, advance)
    except InputError as error:
        return Listed(step, folder, "damaged", str(error), record)
    return Listed(step, folder, "valid", "", record)


def _verified(folder: Path) -> dict[str, Any]:
    """`store.verify` with a progress bar."""
    record = read_marker(folder)
    with _bar("reading", sum(entry["bytes"] for entry in record["files"].values())) as advance:
        _compare(folder, record, False, advance)
    return record


def _compare(folder: Path, record: dict[str, Any], quick: bool, advance: Callable[[int], None]) -> None:
    check_files(folder, record, [])
    sizes = _files(folder)
    for name, expected in sorted(record["files"].items()):
        if not quick:
            check_files(folder, record, [name])
        elif name not in sizes:
            raise InputError(f"{folder / name} is missing")
        elif sizes[name] != expected["bytes"]:
            raise InputError(
                f"{folder / name} has {sizes[name]} bytes, and had {expected['bytes']} when it was written"
            )
        advance(expected["bytes"])


@contextmanager
def _no_writer(roots: list[Path]) -> Iterator[None]:
    """Hold the locks of the runs that these checkpoints folders belong to, so that no training writes there."""
    from grasp_dist.run_lock import RunLock

    with ExitStack() as stack:
        for run in sorted({run for root in roots if (run := run_above(root)) is not None}):
            stack.enter_context(RunLock(run, what="grasp-dist checkpoint prune"))
        yield


@contextmanager
def _bar(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes on standard error, if that is a terminal and there is something to wait for."""
    if not sys.stderr.isatty() or not num_bytes:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda done: progress.advance(task, done)


def _console() -> Console:
    from rich.console import Console

    # In a file or a pipe lines are as long as they need to be.
    return Console() if sys.stdout.isatty() else Console(width=500)


def _files(folder: Path) -> dict[str, int]:
    """Size of each file of a checkpoint; of one that is being removed, what is still there."""
    sizes = {}
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                sizes[path.name] = path.stat().st_size
    return sizes


def _step(folder: Path) -> int:
    """Of a single checkpoint, whatever its folder is called."""
    try:
        return int(read_marker(folder)["step"])
    except InputError:
        digits = folder.absolute().name.rpartition("-")[2]
        return int(digits) if digits.isdigit() else -1


def _when(folder: Path) -> str:
    marker = folder / MARKER
    with suppress(OSError):
        changed = (marker if marker.exists() else folder).stat().st_mtime
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(changed))
    return "-"


def _size(num_bytes: float) -> str:
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    power = min(int(math.log10(num_bytes) / 3), 4)
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
