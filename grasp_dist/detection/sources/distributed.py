"""torch.distributed.checkpoint directories: the default format (.metadata and *.distcp), and safetensors.

A tensor is kept in chunks, blocks in all its dimensions, over several files. Only the chunks of the tensor that is
asked for are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grasp_dist.detection.sources.source import TensorSource, check_inside, is_shape
from grasp_dist.errors import InputError
from grasp_dist.safe_pickle import load_metadata, load_piece

__all__ = ["METADATA", "has_sharding", "open_pickled", "open_safetensors"]

METADATA = ".metadata"
_SHARDING = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], Tensor]


def open_pickled(folder: Path, *, trust: bool = False) -> TensorSource:
    """A directory in the default format. Objects that are no tensors are never looked at.

    Raises `InputError` for what `load_metadata` refuses, tensors with holes, and compressed ones.
    """
    path = folder / METADATA
    metadata = load_metadata(path, trust=trust)
    try:
        places = {
            (index.fqn, tuple(getattr(index, "offset", None) or ())): info
            for index, info in metadata.storage_data.items()
        }
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                continue
            chunks = []
            for chunk in entry.chunks:
                offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                info = places.get((name, offsets)) or places[name, ()]
                if getattr(info, "transform_descriptors", None):
                    raise InputError(
                        f"{name!r} in {folder} was compressed when it was saved; save it without extensions"
                    )
                file = check_inside(folder, info.relative_path, path)
                chunks.append(_Chunk(offsets, sizes, _piece(file, int(info.offset), int(info.length), trust)))
            tensors[str(name)] = (tuple(entry.size), chunks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say where its tensors are ({error!r}); save the checkpoint again") from None
    return _source(folder, tensors)


def open_safetensors(folder: Path) -> TensorSource:
    """A directory that HuggingFaceStorageWriter wrote with `save_distributed=True`. Raises `InputError` for holes."""
    chunks: dict[str, list[_Chunk]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        places = _sharding(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    offsets = tuple(places[name]["saved_offsets"])
                    sizes = tuple(opened.get_slice(name).get_shape())
                    chunks.setdefault(name, []).append(_Chunk(offsets, sizes, _whole(file, name)))
        except (KeyError, TypeError, OSError, SafetensorError) as error:
            raise InputError(f"{file} does not say where its tensors belong ({error!r}); save it again") from None
    tensors = {}
    for name, parts in chunks.items():
        ends = [[at + size for at, size in zip(p.offsets, p.sizes, strict=False)] for p in parts]
        tensors[name] = (tuple(map(max, zip(*ends, strict=False))), parts)
    return _source(folder, tensors)


def has_sharding(folder: Path) -> bool:
    """Whether the safetensors files of a folder are pieces of a distributed checkpoint."""
    first = next(iter(sorted(folder.glob("*.safetensors"))), None)
    return first is not None and bool(_sharding(first))


def _sharding(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get(_SHARDING, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{file} is not a readable safetensors file ({error}); copy the checkpoint again") from None


def _source(folder: Path, tensors: dict[str, tuple[tuple[int, ...], list[_Chunk]]]) -> TensorSource:
    for name, (shape, chunks) in tensors.items():
        _check(f"{name!r} in {folder}", shape, chunks)
    return TensorSource(
        path=folder,
        kind="torch.distributed.checkpoint directory",
        shapes={name: shape for name, (shape, _) in tensors.items()},
        read=lambda name: _assemble(f"{name!r} in {folder}", *tensors[name]),
        folders=(folder, folder.parent),
    )


def _check(where: str, shape: tuple[int, ...], chunks: list[_Chunk]) -> None:
    dims = len(shape)
    valid = is_shape(shape) and all(
        is_shape(chunk.offsets)
        and is_shape(chunk.sizes)
        and len(chunk.offsets) == len(chunk.sizes) == dims
        and all(at + size <= whole for at, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True))
        for chunk in chunks
    )
    # Every writer of torch's cuts a tensor without overlaps, so the sizes tell whether something is missing.
    found = (
        sum(math.prod(sizes) for sizes in {chunk.offsets: chunk.sizes for chunk in chunks}.values()) if valid else -1
    )
    if found != math.prod(shape):
        raise InputError(
            f"{where} is not whole: its pieces have {max(found, 0)} of {math.prod(shape)} numbers; a file of the "
            "checkpoint is missing or damaged: copy it again"
        )


def _assemble(where: str, shape: tuple[int, ...], chunks: Iterable[_Chunk]) -> Tensor:
    out: Tensor | None = None
    for chunk in chunks:
        part = chunk.read().detach()
        if tuple(part.shape) != chunk.sizes:
            raise InputError(
                f"{where}: a piece has shape {tuple(part.shape)}, and {chunk.sizes} by the checkpoint's record; it is "
                "damaged: copy it again"
            )
        if chunk.sizes == shape:
            return part
        out = torch.empty(shape, dtype=part.dtype) if out is None else out
        out[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))] = part
    return torch.empty(shape) if out is None else out


def _piece(file: Path, offset: int, length: int, trust: bool) -> Callable[[], Tensor]:
    return lambda: load_piece(file, offset, length, trust=trust)


def _whole(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}); copy the checkpoint again") from None

    return read
