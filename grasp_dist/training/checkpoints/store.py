"""The folder of a run's checkpoints: which are whole, which is the newest, and which go. Needs no torch.

    <root>/step-00000050/*.safetensors     written by the ranks
    <root>/step-00000050/checkpoint.json   the marker: what it is; size and sha256 of every file and of itself

A folder is new for every checkpoint and never written over. The marker is renamed into place last, when all files are
on the disk: a folder without it is unfinished, and one that differs from what it says in a single bit, or holds a file
more or less, is damaged. Checksums guard against damage, not against malice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grasp_dist.errors import InputError
from grasp_dist.manifest import set_aside

__all__ = ["FORMAT", "MARKER", "Checkpoints", "Listed", "check_files", "fingerprint", "read_marker", "verify"]

FORMAT = 2
MARKER = "checkpoint.json"
_PREFIX = "step-"
_HEAD = '{"sha256": "'
_NECK = '", "record": '


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder, and what state it is in."""

    step: int
    path: Path
    state: Literal["valid", "damaged", "unfinished"]
    reason: str
    """Empty for a valid one."""
    record: dict[str, Any]
    """What the marker says; empty where it cannot be read."""


class Checkpoints:
    """Checkpoints of one training run, by step. Called by one process."""

    def __init__(self, root: str | Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        """keep_last: `prune` keeps this many of the newest. keep_every: and every one whose step it divides."""
        self.root = Path(root)
        self.keep_last, self.keep_every = keep_last, keep_every

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.root / f"{_PREFIX}{step:08d}"

    def folders(self) -> list[tuple[int, Path]]:
        """(step, folder), newest first, whatever is in them."""
        found = []
        for path in self.root.glob(f"{_PREFIX}*") if self.root.is_dir() else []:
            digits = path.name.removeprefix(_PREFIX)
            if digits.isdigit() and path.is_dir():
                found.append((int(digits), path))
        return sorted(found, reverse=True)

    def prepare(self, step: int) -> Path:
        """An empty folder for a new checkpoint. What an interrupted attempt left there is removed; a finished one that
        could not be used, and was therefore passed over, is moved aside."""
        folder = self.folder(step)
        if (folder / MARKER).exists():
            set_aside(folder)
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, record: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Make the checkpoint valid. files: {name: `fingerprint`}, all of them already on the disk (fsync)."""
        body = json.dumps({**record, "format": FORMAT, "files": dict(files)}, sort_keys=True)
        text = f"{_HEAD}{hashlib.sha256(body.encode()).hexdigest()}{_NECK}{body}}}\n"
        temporary = folder / f".{MARKER}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)
        temporary.replace(folder / MARKER)
        _sync_folder(folder)
        _sync_folder(folder.parent)

    def listing(self, progress: Callable[[Path], None] | None = None) -> list[Listed]:
        """Every checkpoint, newest first. Reads all of them; progress(folder): called before each."""
        found = []
        for step, path in self.folders():
            if progress is not None:
                progress(path)
            record: dict[str, Any] = {}
            state: Literal["valid", "damaged", "unfinished"] = "valid"
            reason = ""
            if not (path / MARKER).exists():
                state, reason = "unfinished", "it was never finished"
            else:
                try:
                    record = read_marker(path)
                    check_files(path, record)
                except InputError as error:
                    state, reason = "damaged", str(error)
            found.append(Listed(step, path, state, reason, record))
        return found

    def newest(self) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
        """The newest valid checkpoint and its record, and a line for each newer one that is not."""
        problems: list[str] = []
        for _, path in self.folders():
            try:
                return path, verify(path), problems
            except InputError as error:
                problems.append(str(error))
        return None, None, problems

    def prune(self) -> list[Path]:
        """Remove finished checkpoints that need not be kept, and unfinished ones older than the newest finished one;
        returns them. Looks at markers only."""
        folders = self.folders()
        finished = [step for step, path in folders if (path / MARKER).exists()]
        kept = set(finished[: self.keep_last])
        if self.keep_every is not None:
            kept |= {step for step in finished if step % self.keep_every == 0}
        newest = finished[0] if finished else -1
        removed = []
        for step, path in folders:
            if step not in kept and step < newest:
                remove(path)
                removed.append(path)
        return removed


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that is removed in part is unfinished, never damaged."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MARKER).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def verify(folder: str | Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all as they were written; reads all of them.

    Raises `InputError` for one that is unfinished or damaged, saying what is wrong.
    """
    folder = Path(folder)
    record = read_marker(folder)
    check_files(folder, record)
    return record


def read_marker(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint. Raises `InputError` if there is none, or it is damaged or of another format."""
    path = folder / MARKER
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{folder} is not a finished checkpoint: it has no {MARKER}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    digest, body = text[len(_HEAD) : len(_HEAD) + 64], text[len(_HEAD) + 64 + len(_NECK) : -2]
    whole = text == f"{_HEAD}{digest}{_NECK}{body}}}\n" and hashlib.sha256(body.encode()).hexdigest() == digest
    record = json.loads(body) if whole else _old_format(text)
    if record is None:
        raise InputError(f"{path} is damaged: it is not as it was written")
    if record.get("format") != FORMAT:
        raise InputError(
            f"{folder} is a checkpoint of format {record.get('format')}, and this version of grasp_dist reads {FORMAT}"
        )
    return record


def _old_format(text: str) -> dict[str, Any] | None:
    """Format 1 had no checksum of its own."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("format") == 1 else None


def check_files(folder: Path, record: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Raise `InputError` unless the folder holds the record's files and no others, as they were written.

    names: of these only, size and content.
    """
    there = {path.name for path in folder.iterdir()} - {MARKER, f".{MARKER}"}
    if unknown := sorted(there - record["files"].keys()):
        raise InputError(f"{folder / unknown[0]} is not part of the checkpoint")
    for name in sorted(record["files"]) if names is None else names:
        if name not in there:
            raise InputError(f"{folder / name} is missing")
        expected = record["files"][name]
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise InputError(f"{folder / name} has {size} bytes, and had {expected['bytes']} when it was written")
            if fingerprint(folder / name) != expected:
                raise InputError(f"{folder / name} has changed since it was written (sha256)")
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error})") from None


def fingerprint(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync_folder(path: Path) -> None:
    # Some network file systems refuse this, and have written the names by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
