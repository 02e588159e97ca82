"""What a basis is made of: where its tensors come from, and what they and the file's header must be.

docs/basis_format.md describes the format. Everything that is refused here is refused with an `InputError` by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.subspaces import ORTHONORMAL_TOLERANCE, orthonormal_error, orthonormalise, random_columns

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "SIDES",
    "SPECTRUM",
    "Entry",
    "FileSource",
    "MemorySource",
    "RandomSource",
    "Source",
    "check_layout",
    "checked_columns",
    "parse_header",
    "spectra_by_side",
    "split_key",
]

FORMAT_VERSION = 1
METADATA_KEY = "grasp_basis"
SIDES = ("write", "read")
SPECTRUM = ".singular_values"

# What a format's own rounding leaves of |Q^T Q - I|; such columns are made orthonormal again in fp64.
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


ALL = slice(None)


class Source(Protocol):
    """Where a tensor's content comes from. `read` returns rows start:stop of the first `columns` columns, fp32, CPU; of
    the chosen experts, where they are stacked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int, columns: int, experts: slice = ALL) -> Tensor: ...


@dataclass(frozen=True)
class MemorySource:
    """Directions that were given."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int, columns: int, experts: slice = ALL) -> Tensor:
        whole = self.tensor[experts] if self.tensor.ndim == 3 else self.tensor
        return whole[..., start:stop, :columns]


@dataclass(frozen=True)
class RandomSource:
    """Directions that are drawn again whenever they are read, always the same ones."""

    shape: tuple[int, ...]
    seed: int
    key: str

    def read(self, start: int, stop: int, columns: int, experts: slice = ALL) -> Tensor:
        drawn = random_columns((*self.shape[:-1], columns), self.seed, self.key)
        return (drawn[experts] if drawn.ndim == 3 else drawn)[..., start:stop, :]


@dataclass(frozen=True)
class FileSource:
    """Directions in a safetensors file, opened for every read: handles survive neither a fork nor a replaced file."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def read(self, start: int, stop: int, columns: int, experts: slice = ALL) -> Tensor:
        stack = [experts] if len(self.shape) == 3 else []
        sizes = [len(range(*chosen.indices(self.shape[0]))) for chosen in stack]
        if start == stop or 0 in sizes:
            return torch.empty(*sizes, stop - start, columns)
        try:
            with safe_open(self.path, framework="pt") as file:
                piece = file.get_slice(self.key)
                if tuple(piece.get_shape()) == self.shape:
                    return piece[(*stack, slice(start, stop), slice(0, columns))]
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {self.key!r} from the basis {self.path}: {error}; detect it again") from None
        raise InputError(f"the basis {self.path} changed while it was in use ({self.key!r}); start the command again")


@dataclass(frozen=True)
class Entry:
    """One tensor of a basis: the first `rank` columns of a source."""

    source: Source
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-1], self.rank)


def split_key(key: str) -> tuple[str, str]:
    """ "<weight>.<side>" -> (weight, side)."""
    weight, _, side = key.rpartition(".")
    return weight, side


def parse_header(text: str | None, path: Path, remedy: str) -> dict[str, Any]:
    """{"version", "shapes", "provenance"} from the metadata's JSON; raises `InputError` if it is no basis' header."""
    if text is None:
        raise InputError(
            f"{path} is a safetensors file but no basis ({METADATA_KEY!r} is not in its metadata); {remedy}"
        )
    try:
        header = json.loads(text)
        version = header["version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"basis {path}: its header is damaged; {remedy}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"basis {path} has format version {version!r}, and this grasp-dist reads version {FORMAT_VERSION}; "
            "install the version that wrote it, or detect it again"
        )
    header.setdefault("provenance", {})
    header.setdefault("shapes", {})
    well_formed = isinstance(header["provenance"], dict) and isinstance(header["shapes"], dict)
    if not well_formed or not all(_is_shape(shape) for shape in header["shapes"].values()):
        raise InputError(f"basis {path}: its header is damaged; {remedy}")
    return header


def spectra_by_side(spectra: Mapping[str, Tensor], entries: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Singular values by "<weight>.<side>", from values by weight or by weight and side."""
    by_side: dict[str, Tensor] = {}
    for key, values in spectra.items():
        keys = [key] if key in entries else [f"{key}.{side}" for side in SIDES if f"{key}.{side}" in entries]
        if not keys:
            raise InputError(f"{where}: singular values are given for {key!r}, which has no directions")
        by_side |= dict.fromkeys(keys, values)
    return by_side


def check_layout(
    entries: Mapping[str, Entry], spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], where: str
) -> None:
    """Names, dimensions and ranks; content is checked when it is read."""
    if not entries:
        raise InputError(f"{where}: there are no directions in it; a basis holds at least one")
    for key, entry in entries.items():
        weight, side = split_key(key)
        if side not in SIDES or not weight:
            raise InputError(f"{where}: {key!r} does not end in '.write' or '.read' after the name of a weight")
        if len(entry.shape) not in (2, 3):
            raise InputError(f"{where}: {key!r} has shape {entry.shape}; (dim, k) or (experts, dim, k) is wanted")
        dim = entry.shape[-2]
        if not 1 <= entry.rank <= dim:
            raise InputError(f"{where}: {key!r} has {entry.rank} columns of dimension {dim}; 1 to {dim} are possible")
        if weight in shapes and shapes[weight][SIDES.index(side)] != dim:
            raise InputError(
                f"{where}: {key!r} has dimension {dim}, but the weight is {shapes[weight]} (out, in) by the header; "
                "detect it again on this model"
            )
    for key, values in spectra.items():
        if key not in entries or values.ndim != 1 or len(values) < entries[key].rank or not values.isfinite().all():
            raise InputError(
                f"{where}: the singular values of {key!r} are not a finite list of at least one value per direction"
            )
    for weight in shapes:
        if not any(f"{weight}.{side}" in entries for side in SIDES):
            raise InputError(f"{where}: a shape is given for {weight!r}, which has no directions")


def checked_columns(key: str, columns: Tensor, where: str) -> Tensor:
    """The columns as fp32; raises `InputError` if they are not finite and orthonormal."""
    if not columns.is_floating_point() or columns.ndim not in (2, 3):
        raise InputError(
            f"{where}: {key!r} is {columns.dtype} of shape {tuple(columns.shape)}; floating point (dim, k) or "
            "(experts, dim, k) is wanted"
        )
    if not torch.isfinite(columns).all():
        raise InputError(f"{where}: {key!r} holds NaN or infinity; detect the basis again")
    error = orthonormal_error(columns)
    if error > ROUNDING.get(columns.dtype, ORTHONORMAL_TOLERANCE):
        raise InputError(
            f"{where}: the columns of {key!r} are not orthonormal (|Q^T Q - I| is {error:.1e}, allowed "
            f"{ORTHONORMAL_TOLERANCE:.0e}); orthonormalise them, e.g. with torch.linalg.qr, or detect the basis again"
        )
    return orthonormalise(columns).float() if columns.dtype in ROUNDING else columns.float()


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(size, int) and size > 0 for size in value)
