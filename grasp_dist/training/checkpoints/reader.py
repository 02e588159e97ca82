"""Reading a checkpoint outside of training: whole tensors, or rows of them, out of the pieces that the ranks wrote.

A tensor is kept in chunks over several files: flat ones (a run of the row-major flattened whole, as `FlatPiece` writes
them) or blocks in all its dimensions. A file is open, mapped into memory, only while something is read from it, so that
no more is held than what was asked for. Needs torch and safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.training.checkpoints.store import read_marker, verify

__all__ = ["AdapterTensors", "Shards"]

Box = tuple[slice, ...]
"""A part of a tensor: start and stop in each dimension."""

_SHARDING = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_REMEDY = "use another checkpoint (`grasp-dist checkpoint list` shows them)"


@dataclass(frozen=True)
class _Chunk:
    file: Path
    box: Box
    dtype: str


class Shards:
    """The tensors of one checkpoint folder, by name.

    Every tensor of the record is there in full, whichever ranks wrote it: holes are refused when the folder is opened,
    chunks that overlap and differ when they are read. Nothing is ever filled in.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        """check: compare every file with its checksum first, which reads all of them.

        Raises `InputError` for a checkpoint that is unfinished or damaged, and for a tensor of which a part is missing,
        by name.
        """
        self.folder = Path(folder)
        self.record: dict[str, Any] = verify(self.folder) if check else read_marker(self.folder)
        self._chunks: dict[str, list[_Chunk]] = {name: [] for name in self.record["tensors"]}
        self._overlapping: set[str] = set()
        for file in sorted(self.record["files"]):
            self._add(self.folder / file)
        for name in self._chunks:
            self._check(name)

    def names(self) -> list[str]:
        """Names of all tensors: `model.<parameter>`, `optimizer.<key>.<parameter>`, `pins.<parameter>.<side>`."""
        return sorted(self._chunks)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, in whatever form the tensor was saved."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor was saved with."""
        return getattr(torch, self._entry(name)["dtype"])

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in its logical shape, bit for bit as the ranks wrote it."""
        whole = tuple(slice(0, size) for size in self._stored_shape(name))
        return self._read(name, whole).view(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`read(name)[start:stop]` with 0 <= start <= stop; only these rows are read."""
        shape, stored = self.shape(name), self._stored_shape(name)
        if not shape or not 0 <= start <= stop:
            raise InputError(f"{name!r} of {self.folder} has shape {list(shape)}, and no rows {start}:{stop}")
        start, stop = min(start, shape[0]), min(stop, shape[0])
        width = math.prod(shape[1:]) if len(stored) < len(shape) else 1
        box = (slice(start * width, stop * width), *(slice(0, size) for size in stored[1:]))
        return self._read(name, box).view(stop - start, *shape[1:])

    # -- inside

    def _entry(self, name: str) -> Mapping[str, Any]:
        try:
            return self.record["tensors"][name]
        except KeyError:
            raise InputError(f"{self.folder} has no tensor {name!r}") from None

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """What the chunks are parts of: the tensor in its logical shape, or flattened."""
        shape = self.shape(name)
        flat = all(len(chunk.box) == 1 for chunk in self._chunks[name])
        return (math.prod(shape),) if flat else shape

    def _add(self, path: Path) -> None:
        with _opened(path) as handle:
            try:
                places = json.loads((handle.metadata() or {})[_SHARDING])
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name not in self._chunks:
                        raise InputError(f"{path} holds {name!r}, of which the checkpoint's record knows nothing")
                    part, offsets = handle.get_slice(name), places[name][_OFFSETS]
                    box = tuple(slice(at, at + size) for at, size in zip(offsets, part.get_shape(), strict=True))
                    self._chunks[name].append(_Chunk(path, box, part.get_dtype()))
            except InputError:
                raise
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path} does not say where its tensors belong ({error!r}); {_REMEDY}") from None

    def _check(self, name: str) -> None:
        """Refuse holes and chunks out of place: on a grid that is cut wherever a chunk begins or ends, each cell must
        be in some chunk."""
        where, chunks, shape = f"{name!r} in {self.folder}", self._chunks[name], self._stored_shape(name)
        for chunk in chunks:
            inside = len(chunk.box) == len(shape) and all(
                0 <= part.start <= part.stop <= size for part, size in zip(chunk.box, shape, strict=True)
            )
            if not inside:
                raise InputError(
                    f"{where}: the piece {_text(chunk.box)} in {chunk.file.name} is not within {list(shape)}"
                )
            if chunk.dtype != _NAMES.get(self.dtype(name)):
                raise InputError(f"{where} is {chunk.dtype} in {chunk.file.name}, and {self.dtype(name)} by the record")
        cuts = [
            sorted({0, size} | {edge for chunk in chunks for edge in (chunk.box[dim].start, chunk.box[dim].stop)})
            for dim, size in enumerate(shape)
        ]
        count = torch.zeros([len(cut) - 1 for cut in cuts], dtype=torch.int32)
        for chunk in chunks:
            cells = (
                slice(bisect_left(cut, part.start), bisect_left(cut, part.stop))
                for cut, part in zip(cuts, chunk.box, strict=True)
            )
            count[tuple(cells)] += 1
        if (count == 0).any():
            cell = (count == 0).nonzero()[0].tolist()
            hole = tuple(slice(cut[at], cut[at + 1]) for cut, at in zip(cuts, cell, strict=True))
            raise InputError(
                f"{where} is not whole: {_text(hole)} of {list(shape)} is in none of {len(chunks)} pieces; {_REMEDY}"
            )
        if (count > 1).any():
            self._overlapping.add(name)

    def _read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, in the shape in which it is stored."""
        out = torch.empty([part.stop - part.start for part in box], dtype=self.dtype(name))
        filled: list[Box] = []
        for chunk in self._chunks[name]:
            common = _meet(chunk.box, box)
            if common is None:
                continue
            with _opened(chunk.file) as handle:
                values = handle.get_slice(name)[_within(common, chunk.box)]
                for earlier in filled if name in self._overlapping else ():
                    twice = _meet(earlier, common)
                    if twice and not _same_bits(values[_within(twice, common)], out[_within(twice, box)]):
                        raise InputError(
                            f"{name!r} in {self.folder} was written twice, and differently: {_text(twice)} of "
                            f"{chunk.file.name} is not what another file has; {_REMEDY}"
                        )
                out[_within(common, box)] = values
            filled.append(common)
        return out


class AdapterTensors:
    """The factors in a PEFT adapter's folder, under the names of a checkpoint; the methods are those of `Shards`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        """record: as a checkpoint's. Raises `InputError` for a folder without a readable adapter_model.safetensors."""
        self.folder, self.record = folder, record
        self._path = folder / "adapter_model.safetensors"
        with _opened(self._path) as handle:
            self._keys = {_in_training(key): key for key in handle.keys()}  # noqa: SIM118
            self._shapes = {name: tuple(handle.get_slice(key).get_shape()) for name, key in self._keys.items()}
            types = {text: dtype for dtype, text in _NAMES.items()}
            self._dtypes = {name: types[handle.get_slice(key).get_dtype()] for name, key in self._keys.items()}

    def names(self) -> list[str]:
        return sorted(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        with _opened(self._path) as handle:
            return handle.get_slice(self._keys[name])[start:stop].clone()


def _in_training(key: str) -> str:
    """'base_model.model.<module>.lora_A.weight' -> 'model.<module>.lora_A.default.weight'."""
    module, _, factor = key.removeprefix("base_model.").removesuffix(".weight").rpartition(".")
    return f"{module}.{factor}.default.weight"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); if a training run has removed its checkpoint in the meantime, start "
            "again with the newer one"
        ) from None


def _meet(a: Box, b: Box) -> Box | None:
    box = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return box if all(part.start < part.stop for part in box) else None


def _within(box: Box, outer: Box) -> Box:
    """The same place, counted from where `outer` begins."""
    return tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(box, outer, strict=True))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # By value, a NaN would differ from itself, and zeros of either sign be the same.
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in box) + "]"
