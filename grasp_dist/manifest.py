"""Manifests: what made a folder, from which inputs, and whether it is finished and still fresh. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError

__all__ = ["Unit", "digest", "file_hash", "quick_hash", "set_aside", "versions", "write_json"]

MANIFEST = "manifest.json"
_PACKAGES = ("grasp-dist", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


def file_hash(path: Path) -> str:
    """sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return _file_digest(file)


def _file_digest(file: Any) -> str:
    sha = hashlib.sha256()
    while chunk := file.read(1 << 20):
        sha.update(chunk)
    return sha.hexdigest()


def quick_hash(path: Path) -> str:
    """A file's hash; above 64 MiB of its size, time of change and first MiB, since a 70B model would take minutes."""
    stat = path.stat()
    if stat.st_size <= 64 << 20:
        return file_hash(path)
    with path.open("rb") as file:
        return digest([stat.st_size, stat.st_mtime_ns, file.read(1 << 20).hex()])


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; a full disk or a read-only folder is an `InputError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error.strerror}; free some space or choose another run_dir. What was "
            "finished before is kept"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Unit:
    """A folder that one piece of work fills: finished at the moment its manifest says so, and fresh while the inputs
    that the manifest records equal today's.

    `inputs` is a JSON mapping: the settings that decide the result and the hashes of the files it is made from.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = folder
        self.inputs: dict[str, Any] = json.loads(json.dumps(dict(inputs), sort_keys=True, default=str))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest on disk; empty when there is none, or none that can be read."""
        try:
            found = json.loads((self.folder / MANIFEST).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def stale_because(self) -> str | None:
        """None when the folder is finished and fresh; else the reason to run, for a person to read."""
        manifest = self.manifest
        if not manifest:
            return "not run yet"
        if manifest.get("status") == "failed":
            return f"it failed: {manifest.get('error')}"
        if manifest.get("status") != "finished":
            return "interrupted before it was finished"
        changes = list(_changes(manifest.get("inputs", {}), self.inputs))
        if changes:
            shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
            return f"its inputs changed: {shown}"
        for name in manifest.get("outputs", {}):
            if not (self.folder / name).exists():
                return f"its output {name} is gone"
        return None

    def start(self) -> None:
        """Make the folder ready and mark it as running. A finished result of other inputs is set aside, never deleted;
        an interrupted one of the same inputs stays, so that work inside it can go on."""
        before = self.manifest
        if self.folder.is_dir() and any(self.folder.iterdir()) and before.get("inputs") != self.inputs:
            set_aside(self.folder)
            before = {}
        write_json(
            self.folder / MANIFEST,
            {
                "status": "running",
                "inputs": self.inputs,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "starts": before.get("starts", 0) + 1,
                "versions": versions(),
            },
        )

    def finish(
        self,
        *,
        outputs: Iterable[str],
        metrics: Mapping[str, Any],
        world_size: int,
        base_model: Mapping[str, Any] | None = None,
    ) -> None:
        """Mark the folder as finished. `outputs`: files or folders within it, hashed into the manifest.

        base_model: which model it belongs to, as `basis.model_reference` gives it.
        """
        manifest = self.manifest
        manifest |= {
            "status": "finished",
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "world_size": world_size,
            "base_model": None if base_model is None else dict(base_model),
            "metrics": dict(metrics),
            "outputs": {name: _tree_hash(self.folder / name) for name in outputs},
        }
        write_json(self.folder / MANIFEST, manifest)

    def fail(self, error: str) -> None:
        """Mark the folder as failed; what is in it stays, and the work goes on from it when it is started again."""
        write_json(self.folder / MANIFEST, self.manifest | {"status": "failed", "error": error})

    def output_hash(self, name: str) -> str | None:
        """The recorded hash of one output; None while the unit is not finished."""
        return self.manifest.get("outputs", {}).get(name)


def set_aside(folder: Path) -> None:
    """Move a folder to `<name>.old-<n>` beside it."""
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.old-{number}")
        if not target.exists():
            folder.rename(target)
            return


def _tree_hash(path: Path) -> str:
    if path.is_file():
        return quick_hash(path)
    return digest({str(p.relative_to(path)): quick_hash(p) for p in sorted(path.rglob("*")) if p.is_file()})


def _changes(old: Any, new: Any, where: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "..." + text[-4:]
