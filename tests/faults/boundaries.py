"""Every moment at which a process is about to change something under a folder; at the n-th of them it is killed.

Seen from outside of the product, through the interpreter's audit events (`sys.addaudithook`): opening for writing,
making, renaming and removing. `os.fsync` raises none and is wrapped. The content of a file is written in between; a
kill in the middle of that is the kernel's, by a limit on the size of files.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

__all__ = ["Boundaries"]

_CHANGES = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 2,
    "os.truncate": None,
    "os.link": 2,
    "os.symlink": 1,
}
"""Audit event -> where the file descriptor of its folder is among the arguments."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Boundaries:
    """Counts from `begin` to `end`; `seen` says what each was. For the life of the process: hooks cannot be removed."""

    def __init__(self, folder: Path, *, kill_at: int | None = None, size: int | None = None) -> None:
        """kill_at: the process is killed just before this one happens, counted from 0. size: or behind it, when a file
        is about to grow beyond so many bytes; what fits is written."""
        self._folder, self._kill_at, self._size = str(folder.resolve()), kill_at, size
        self._counting = False
        self.seen: list[str] = []
        fsync = os.fsync

        def watched(fd: Any) -> None:
            if self._counting:
                self._note("os.fsync", _opened_as(fd))
            fsync(fd)

        os.fsync = watched
        if size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the interpreter ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(self._audit)

    def begin(self) -> None:
        self._counting = True

    def end(self) -> None:
        self._counting = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counting:
            return
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES and isinstance(path, (str, bytes, os.PathLike)):
                self._note(event, os.fsdecode(path))
        elif event in _CHANGES:
            path, at = os.fsdecode(arguments[0]), _CHANGES[event]
            descriptor = -1 if at is None else arguments[at]
            if not os.path.isabs(path) and descriptor >= 0:  # noqa: PTH117
                path = f"{_opened_as(descriptor)}/{path}"
            self._note(event, path)

    def _note(self, event: str, path: str) -> None:
        path = os.path.abspath(path)  # noqa: PTH100 - resolving would look at the disk
        # TensorBoard writes from a thread of its own, whenever it likes.
        if not path.startswith(self._folder) or "/tensorboard" in path:
            return
        if len(self.seen) == self._kill_at:
            if self._size is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._size))
        self.seen.append(f"{event} {path[len(self._folder) + 1 :]}")


def _opened_as(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
