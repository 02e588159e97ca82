"""The state of a run in mid-flight: trainable weights, AdamW's moments and the projector's pins, at any world size.

    <folder>/shard-*.safetensors   each rank's own pieces, through torch.distributed.checkpoint; no pickle
    <folder>/checkpoint.json       format, world size, what the caller adds, size and sha256 of every file; the marker

A folder is new for every checkpoint and never written over. The marker is renamed into place last: a folder without it,
or whose files differ from what it says, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import Optimizer

from grasp_dist.architecture import canonical_name
from grasp_dist.errors import InputError
from grasp_dist.training.files import describe_write_error
from grasp_dist.training.optimizer import init_state
from grasp_dist.training.parallel import Parallel

if TYPE_CHECKING:
    from grasp_dist.projection import GraspProjector

__all__ = ["is_valid", "load_checkpoint", "save_checkpoint"]

_FORMAT = 1
_MARKER = "checkpoint.json"


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    projector: GraspProjector | None,
    extra: dict[str, Any],
    parallel: Parallel,
) -> None:
    """Write a checkpoint into `folder`, which must not hold a valid one; collective.

    extra: JSON values, handed back by `load_checkpoint`. What an interrupted attempt left in the folder is removed.
    Raises `InputError` on every rank when the folder is taken, or the disk is full or read-only.
    """
    folder = Path(folder)
    _attempt(parallel, folder, (lambda: _prepare(folder)) if parallel.is_main else None)
    tensors = _tensors(model, optimizer, projector)
    _attempt(parallel, folder, lambda: _write(tensors, folder, parallel))
    _attempt(parallel, folder, (lambda: _commit(folder, extra, parallel)) if parallel.is_main else None)


def is_valid(folder: str | Path) -> bool:
    """Whether `folder` holds a finished checkpoint whose files are as they were written. Reads all of them; local."""
    try:
        _validated(Path(folder))
    except InputError:
        return False
    return True


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    projector: GraspProjector | None,
    parallel: Parallel,
) -> dict[str, Any]:
    """Read a checkpoint into model, optimizer and projector, in place, and return its `extra`; collective.

    The model must train the same parameters, and the projector have the same basis, as when it was saved; the world
    size may differ. At the same world size the tensors are restored bit for bit. Raises `InputError` for a folder that
    was not finished, has been changed, or is of another model.
    """
    folder = Path(folder)
    record: dict[str, Any] = {}
    _attempt(parallel, folder, (lambda: record.update(_validated(folder))) if parallel.is_main else None)
    record = parallel.broadcast_object(record)
    init_state(optimizer)
    tensors = _tensors(model, optimizer, projector)
    _check_names(tensors, record["tensors"], folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with _quiet():
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.world_size == 1)
    if projector is not None:
        pins = {name.removeprefix("pins."): tensor for name, tensor in tensors.items() if name.startswith("pins.")}
        projector.load_state_dict(pins)
    return record["extra"]


def _tensors(model: nn.Module, optimizer: Optimizer, projector: GraspProjector | None) -> dict[str, Tensor]:
    """Everything that is saved, by name, sharing memory with what it is taken from; nothing of size zero."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = canonical_name(name)
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                # The step count is 0-d, and chunks of a checkpoint are told apart by their offsets.
                tensors[f"optimizer.{key}.{name}"] = value.view(1) if value.ndim == 0 else value
    if projector is not None:
        tensors |= {f"pins.{name}": value for name, value in projector.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _write(tensors: dict[str, Tensor], folder: Path, parallel: Parallel) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        dcp.save(tensors, storage_writer=writer, no_dist=parallel.world_size == 1)


@contextmanager
def _quiet() -> Iterator[None]:
    # A single process needs no process group, which torch finds worth a warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _MARKER).exists():
        raise InputError(f"{folder} holds a finished checkpoint already; give a new folder")
    for leftover in folder.iterdir():
        leftover.unlink()


def _commit(folder: Path, extra: dict[str, Any], parallel: Parallel) -> None:
    files = {path.name: _fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {
        "format": _FORMAT,
        "world_size": parallel.world_size,
        "extra": extra,
        "files": files,
        "tensors": _shapes(folder),
    }
    temporary = folder / f".{_MARKER}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / _MARKER)


def _validated(folder: Path) -> dict[str, Any]:
    again = "remove the folder, and run the same command again"
    try:
        record = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        files, version = record["files"], record["format"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{folder} is no finished checkpoint ({error}); {again}") from None
    if version != _FORMAT:
        raise InputError(f"{folder} is a checkpoint of format {version}, and this version reads {_FORMAT}; {again}")
    for name, expected in files.items():
        if not (folder / name).is_file() or _fingerprint(folder / name) != expected:
            raise InputError(f"{folder / name} is missing or has changed since the checkpoint was made; {again}")
    return record


def _shapes(folder: Path) -> dict[str, list[int]]:
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: list(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def _check_names(tensors: dict[str, Tensor], saved: dict[str, list[int]], folder: Path) -> None:
    own = {name: list(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"{folder} has shape {saved.get(name, 'none')} for {name!r}, and this run {own.get(name, 'none')} "
            f"({len(differing)} such); continue with the model, modules, rank and basis that it was made with"
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _attempt(parallel: Parallel, folder: Path, action: Callable[[], object] | None) -> None:
    """Run `action` on the ranks that have one; all raise if any failed."""
    error: Exception | None = None
    if action is not None:
        try:
            action()
        except Exception as found:
            error = describe_write_error(found, folder)
    parallel.share_error(error)
