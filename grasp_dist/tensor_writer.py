"""Writing safetensors files block by block: first the header, from names, dtypes and shapes, then the bytes.

`safetensors.torch.save_file` needs all tensors of a file at once. A model of which only a block is in memory at a time
is written here, in the same format (https://huggingface.co/docs/safetensors): the length of the header as 8 bytes, the
header as JSON, and the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["INDEX", "ITEM_BITS", "Part", "as_bytes", "write_tensors"]

INDEX = "{stem}.safetensors.index.json"
ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
ITEM_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
"""Bits of one number, by safetensors' name of the dtype."""


@dataclass(frozen=True)
class Part:
    """One tensor of a model that is to be written; `blocks()` makes its bytes, in order."""

    name: str
    dtype: str
    """Safetensors' name, such as BF16; a key of `ITEM_BITS`."""
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's numbers in row-major order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_tensors(
    folder: Path,
    parts: Sequence[Part],
    *,
    stem: str = "model",
    file_bytes: int | None = 2 * 2**30,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> list[Path]:
    """Write `<stem>.safetensors`, or several files of at most `file_bytes` (more for a single larger tensor) and their
    index; returns them all. The bytes are on the disk when it returns. advance(n): n more bytes were written."""
    files = _distribute(parts, file_bytes)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, start=1):
        name = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, content, advance)
        weight_map |= dict.fromkeys((part.name for part in content), name)
        written.append(folder / name)
    if len(files) > 1:
        total = sum(part.num_bytes for part in parts)
        index = folder / INDEX.format(stem=stem)
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        written.append(index)
    return written


def _distribute(parts: Sequence[Part], file_bytes: int | None) -> list[list[Part]]:
    files: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if files[-1] and file_bytes is not None and size + part.num_bytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.num_bytes
    # Readers look at the bytes in place, so numbers have to begin at multiples of their size.
    return [sorted(content, key=lambda part: -ITEM_BITS[part.dtype]) for content in files]


def _write_file(path: Path, parts: Sequence[Part], advance: Callable[[int], None]) -> None:
    with path.open("wb") as file:
        file.write(_header(parts))
        for part in parts:
            begin = file.tell()
            for block in part.blocks():
                file.write(block)
                advance(len(block))
            assert file.tell() - begin == part.num_bytes, part.name
        file.flush()
        os.fsync(file.fileno())


def _header(parts: Iterable[Part]) -> bytes:
    def entries() -> Iterator[tuple[str, object]]:
        yield "__metadata__", {"format": "pt"}
        at = 0
        for part in parts:
            yield (
                part.name,
                {
                    "dtype": part.dtype,
                    "shape": list(part.shape),
                    "data_offsets": [at, at + part.num_bytes],
                },
            )
            at += part.num_bytes

    text = json.dumps(dict(entries())).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
