"""Metrics as they happen: metrics.jsonl and TensorBoard in the stage's folder, progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from grasp_dist.training.files import describe_write_error
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.tracking import Tracker

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Recorder"]

_FILE = "metrics.jsonl"
_BOARD = "tensorboard"


class Recorder:
    """`log(step, name=value, ...)` adds a line to `<folder>/metrics.jsonl` at once, and a point to TensorBoard.

    Several runs that share a recorder (deflation's restarts) follow each other in it with continued step numbers. On
    ranks other than 0 nothing happens. A tracker is told the same. On a terminal a progress bar moves; elsewhere a line
    is printed every `log_every` steps.
    """

    def __init__(self, folder: str | Path, parallel: Parallel, title: str, tracker: Tracker | None = None) -> None:
        self._folder, self._title, self._tracker = Path(folder), title, tracker
        self._active = parallel.is_main
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None
        self._excepthook: Any = None
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._offset = self._last = 0
        self._steps = self._log_every = 1
        self._started = time.monotonic()

    def begin(self, *, first_step: int, steps: int, log_every: int) -> None:
        """A run of `steps` steps follows, of which `first_step` are done. The first run of a recorder starts the file
        anew; a continued one keeps the lines up to `first_step`."""
        if not self._active:
            return
        if self._file is None:
            self._open(self._offset + first_step)
        else:
            self._offset = self._last
        self._steps, self._log_every = self._offset + steps, log_every
        self._show(first_step)

    def skip(self, steps: int) -> None:
        """Runs of `steps` steps in all were recorded here before, by a process that was interrupted; call it first."""
        self._offset = steps

    def log(self, step: int, **metrics: float) -> None:
        """Record a step of the present run, counted from 1."""
        if not self._active:
            return
        assert self._file is not None, "begin() comes first"
        self._last = step = self._offset + step
        row = {"step": step, "steps": self._steps, **metrics, "seconds": round(time.monotonic() - self._started, 4)}
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise describe_write_error(error, self._folder / _FILE) or error from None
        if self._board is not None:
            try:
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:  # of its own thread, some steps before
                self._board = None
                raise describe_write_error(error, self._folder / _BOARD) or error from None
        if self._tracker is not None:
            self._tracker.log(step, metrics)
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, **_columns(metrics))
        elif step % self._log_every == 0 or step == self._steps:
            values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
            print(f"{self._title}  step {step}/{self._steps}  {values}", flush=True)

    def event(self, text: str) -> None:
        """Print a line of its own, above the progress bar if there is one."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.console.print(f"{self._title}  {text}", highlight=False)
        else:
            print(f"{self._title}  {text}", flush=True)

    def close(self) -> None:
        """Close the files and the progress bar. Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            with contextlib.suppress(OSError):  # a picture of what metrics.jsonl holds
                self._board.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was said by `log`
                self._file.close()
        self._file = self._board = self._progress = None
        if self._excepthook is not None:
            threading.excepthook, self._excepthook = self._excepthook, None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, first_step: int) -> None:
        path = self._folder / _FILE
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if first_step:
                # A copy takes its place, so that a process that is killed here leaves the rows there are.
                temporary = path.with_name(f".{path.name}")
                temporary.write_text("".join(_rows_until(path, first_step)), encoding="utf-8")
                temporary.replace(path)
            # Line-buffered, so that a line is on disk when its step is done.
            self._file = path.open("a" if first_step else "w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise describe_write_error(error, path) or error from None
        self._last = first_step
        self._board = _summary_writer(self._folder / _BOARD, first_step)
        if self._tracker is not None:
            self._tracker.begin()
        if self._excepthook is None:
            self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread prints its traceback when the disk is full, and `log` then raises what is for the user
        to read."""
        if type(failure.thread).__name__ != "_AsyncWriterThread" or not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _show(self, first_step: int) -> None:
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns)
            self._progress.start()
            self._bar = self._progress.add_task(self._title, total=self._steps, completed=first_step, loss="-")
        elif self._bar is not None:
            self._progress.update(self._bar, total=self._steps)


def _rows_until(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the last line of a run that was killed
        if row["step"] <= step:
            rows.append(line + "\n")
    return rows


def _summary_writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _columns(metrics: dict[str, float]) -> dict[str, Any]:
    return {"loss": _short(metrics["loss"])} if "loss" in metrics else {}


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
