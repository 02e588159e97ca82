"""A folder that rank 0 writes while the other ranks take part in gathering what goes into it.

It appears under its name when it is whole. A full or read-only disk ends the writing on rank 0 and nothing else: every
rank carries on through the collectives to the end, and all of them raise there.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grasp_dist.errors import InputError
from grasp_dist.training.parallel import Parallel

__all__ = ["FolderWriter", "describe_write_error", "replace_folder"]

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission is denied; choose another folder or change its owner",
}


class FolderWriter:
    """Runs what writes into the folder on rank 0, until the first error."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.error: Exception | None = None

    def write(self, action: Callable[[Path], object]) -> None:
        """Call `action(folder)` on rank 0, if nothing has failed so far."""
        if self._folder is not None and self.error is None:
            try:
                action(self._folder)
            except Exception as error:
                self.error = error


@contextmanager
def replace_folder(path: str | Path, parallel: Parallel) -> Iterator[FolderWriter]:
    """Write a new folder beside `path` and put it there at the end; collective.

    What stood at `path` is replaced. Raises `InputError` on every rank when rank 0 could not write; `path` is then as
    it was before.
    """
    path = Path(path)
    writer = FolderWriter(None)
    temporary: Path | None = None
    if parallel.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            (temporary / "new").mkdir()
            writer = FolderWriter(temporary / "new")
        except OSError as error:
            writer.error = error
    try:
        yield writer
        writer.write(lambda folder: _put(folder, path))
        parallel.share_error(describe_write_error(writer.error, path))
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def describe_write_error(error: Exception | None, path: Path) -> Exception | None:
    """An `InputError` with the remedy for what the file system refuses; any other error as it is."""
    if isinstance(error, OSError):
        reason = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the disk")
        return InputError(f"cannot write {path}: {reason}, and run the same command again")
    # safetensors and other Rust libraries report the system's error in words.
    if error is not None and "os error 28" in str(error):
        return InputError(f"cannot write {path}: {_REMEDIES[errno.ENOSPC]}, and run the same command again")
    return error


def _put(folder: Path, path: Path) -> None:
    if path.exists():
        path.rename(folder.parent / "old")
    folder.rename(path)
