"""The spurious basis: which directions each protected weight must not learn to write or read; in memory and on disk.

A basis names weights as the *base* model does and holds, for each, `write` (out, k) and/or `read` (in, k): orthonormal
columns in order of importance or discovery. docs/basis_format.md describes the file. Needs torch and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from grasp_dist.basis_content import (
    FORMAT_VERSION,
    METADATA_KEY,
    SIDES,
    SPECTRUM,
    Entry,
    FileSource,
    MemorySource,
    RandomSource,
    check_layout,
    checked_columns,
    parse_header,
    spectra_by_side,
    split_key,
)
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_fingerprint, model_reference
from grasp_dist.subspaces import DEPENDENCE_TOLERANCE, angles_between, independent_columns

__all__ = ["FORMAT_VERSION", "SIDES", "SpuriousBasis", "model_fingerprint", "model_reference"]


class SpuriousBasis:
    """Orthonormal directions per weight and side. Immutable: every operation returns a new basis.

    Made by `load`, `from_tensors`, or detection. Content from a file is read when asked for, and only the rows asked
    for. All tensors are fp32 on the CPU: (dim, k), or (experts, dim, k) for stacked experts.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        spectra: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        provenance: Mapping[str, Any],
        origin: str,
        checked: set[str] | None = None,
    ) -> None:
        """For this module's own use; see `load` and `from_tensors`."""
        self._entries = dict(sorted(entries.items()))
        self._spectra = dict(spectra)
        self._shapes = dict(shapes)
        self._origin = origin
        self._checked = set() if checked is None else checked
        self.provenance: dict[str, Any] = dict(provenance)
        self.weights: tuple[str, ...] = tuple(sorted({split_key(key)[0] for key in self._entries}))

    # -- making and storing

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        singular_values: Mapping[str, Tensor] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> SpuriousBasis:
        """A basis in memory from `{"<weight>.write" | "<weight>.read": (dim, k) or (experts, dim, k)}`.

        fp16, bf16, fp32 or fp64; kept as fp32. Half-precision columns that are orthonormal to their rounding are made
        orthonormal again. `singular_values`: 1-D, at least k values, by "<weight>" or "<weight>.<side>". `shapes`:
        logical (out, in) by weight. Raises `InputError` for a bad name, shape, or content.
        """
        spectra = {key: value.detach().cpu().float().clone() for key, value in (singular_values or {}).items()}
        logical = {weight: (int(shape[-2]), int(shape[-1])) for weight, shape in (shapes or {}).items()}
        entries = {}
        for key, tensor in tensors.items():
            columns = checked_columns(key, tensor.detach().cpu(), "the given tensors")
            entries[key] = Entry(MemorySource(columns.clone(memory_format=torch.contiguous_format)), columns.shape[-1])
        by_side = spectra_by_side(spectra, entries, "the given tensors")
        check_layout(entries, by_side, logical, "the given tensors")
        return cls(
            entries,
            spectra=by_side,
            shapes=logical,
            provenance=provenance or {},
            origin="memory",
            checked=set(entries),
        )

    @classmethod
    def empty(cls, provenance: Mapping[str, Any]) -> SpuriousBasis:
        """The basis of a detection that found nothing: no weights. It is kept and read like any other, and is what a
        projector is not made for."""
        return cls({}, spectra={}, shapes={}, provenance=provenance, origin="memory")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpuriousBasis:
        """Open a basis file: the header (and the singular values) are read and checked now, directions when asked for.

        Raises `InputError` for a missing or truncated file, one that is no basis, or another format version.
        """
        path = Path(path)
        remedy = "give the path of a basis.safetensors that `grasp-dist detect` or SpuriousBasis.save wrote"
        if not path.is_file():
            raise InputError(f"there is no basis file {path}; {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_header((file.metadata() or {}).get(METADATA_KEY), path, remedy)
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                found = {key: (tuple(piece.get_shape()), piece.get_dtype()) for key, piece in slices.items()}
                spectra = {key.removesuffix(SPECTRUM): file.get_tensor(key) for key in found if key.endswith(SPECTRUM)}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a readable safetensors file ({error}); {remedy}") from None
        entries = {}
        for key, (shape, dtype) in found.items():
            if key.endswith(SPECTRUM):
                continue
            if dtype != "F32":
                raise InputError(
                    f"basis {path}: {key!r} is stored as {dtype}, not F32; make the file with SpuriousBasis.save"
                )
            entries[key] = Entry(FileSource(path, key, shape), shape[-1] if shape else 0)
        logical = {weight: (int(out), int(into)) for weight, (out, into) in header["shapes"].items()}
        if entries or not header.get("empty"):
            check_layout(entries, spectra, logical, f"basis {path}")
        return cls(
            entries, spectra=spectra, shapes=logical, provenance=header["provenance"], origin=str(path), checked=None
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name in the same folder and rename it into place.

        Raises `InputError` when the folder cannot be written or the disk is full; an older file then stays whole.
        """
        path = Path(path)
        header = {"version": FORMAT_VERSION, "shapes": self._shapes, "provenance": self.provenance}
        if not self._entries:
            header["empty"] = True
        tensors = {key: self.tensor(*split_key(key)).contiguous() for key in self._entries}
        # Both sides may share one spectrum, which the format does not allow.
        tensors |= {key + SPECTRUM: value.clone() for key, value in self._spectra.items()}
        try:
            text = json.dumps(header, sort_keys=True)
        except TypeError as error:
            raise InputError(f"cannot save the basis to {path}: its provenance is not plain JSON ({error})") from None
        content = to_safetensors(tensors, metadata={METADATA_KEY: text})
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise InputError(
                f"cannot write the basis to {path}: {error.strerror or error}; free some space or choose a folder "
                "that you may write to, then run the same command again"
            ) from None
        finally:
            if partial.is_file():
                partial.unlink()

    # -- looking

    def sides(self, weight: str) -> tuple[str, ...]:
        """The sides that this weight has, `write` first; () for a weight that is not in the basis."""
        return tuple(side for side in SIDES if f"{weight}.{side}" in self._entries)

    def basis_rank(self, weight: str, side: str) -> int:
        """Number of directions k."""
        return self._entry(weight, side).rank

    def tensor_shape(self, weight: str, side: str) -> tuple[int, ...]:
        """(dim, k) or (experts, dim, k), without reading the content."""
        return self._entry(weight, side).shape

    def shape(self, weight: str) -> tuple[int, int] | None:
        """Logical (out, in) of the weight, where the header or the presence of both sides tells it."""
        if weight in self._shapes:
            return self._shapes[weight]
        if self.sides(weight) == SIDES:
            return self.tensor_shape(weight, "write")[-2], self.tensor_shape(weight, "read")[-2]
        return None

    def tensor(self, weight: str, side: str) -> Tensor:
        """All rows: (dim, k) or (experts, dim, k), fp32. Raises `InputError` unless finite and orthonormal."""
        entry, key = self._entry(weight, side), f"{weight}.{side}"
        columns = entry.source.read(0, entry.shape[-2], entry.rank)
        if key not in self._checked:
            checked_columns(key, columns, f"basis {self._origin}")
            self._checked.add(key)
        return columns

    def rows(self, weight: str, side: str, start: int, stop: int, *, experts: tuple[int, int] | None = None) -> Tensor:
        """Rows start:stop of `tensor(weight, side)`: (stop - start, k), or (experts, stop - start, k) for stacked ones.

        experts: (start, stop) of those wanted, None: all. From a file, only these are read; checked to be finite.
        Raises `InputError` for non-finite content and `IndexError` for rows that do not exist.
        """
        entry = self._entry(weight, side)
        if not 0 <= start <= stop <= entry.shape[-2]:
            raise IndexError(f"rows {start}:{stop} of {weight}.{side}, which has {entry.shape[-2]}")
        piece = entry.source.read(start, stop, entry.rank, slice(*experts) if experts else slice(None))
        if not torch.isfinite(piece).all():
            raise InputError(
                f"basis {self._origin}: {weight}.{side} holds NaN or infinity in rows {start}:{stop}; detect it again"
            )
        return piece

    def singular_values(self, weight: str, side: str | None = None) -> Tensor | None:
        """Singular values (at least k, fp32) of the update behind the columns; side None: write's, else read's."""
        for name in (side,) if side else SIDES:
            if (values := self._spectra.get(f"{weight}.{name}")) is not None:
                return values
        return None

    def check(self) -> None:
        """Read everything, one tensor at a time; raises `InputError` as `tensor` does."""
        for key in self._entries:
            self.tensor(*split_key(key))

    def fingerprint(self) -> str:
        """sha256 (hex) over names, shapes and directions; the same in memory and from a file."""
        digest = hashlib.sha256()
        for key, entry in self._entries.items():
            digest.update(json.dumps([key, entry.shape]).encode())
            digest.update(self.tensor(*split_key(key)).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, *, id: str | None = None, revision: str | None = None, hash: str | None = None) -> None:
        """Raise `InputError` if this basis was detected on another base model.

        Hashes decide where both are known (`model_fingerprint`); otherwise the ids, and revisions, that both name.
        """
        base = self.provenance.get("base_model") or {}
        theirs = {"id": id, "revision": revision, "hash": hash}
        fields = ("hash",) if base.get("hash") and hash else ("id", "revision")
        for field in fields:
            if base.get(field) and theirs[field] and base[field] != theirs[field]:
                raise InputError(
                    f"basis {self._origin} was detected on the base model {base.get('id')!r} "
                    f"({field} {base[field]!r}), but the model here is {id!r} ({field} {theirs[field]!r}); "
                    "use the model that the basis belongs to, or detect a basis for this one"
                )

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, weight: object) -> bool:
        return weight in self.weights

    def __repr__(self) -> str:
        parts = [f"{len(self)} weights"]
        for side in SIDES:
            ranks = {entry.rank for key, entry in self._entries.items() if key.endswith(f".{side}")}
            if ranks:
                parts.append(f"{side} rank {min(ranks)}" + (f"-{max(ranks)}" if len(ranks) > 1 else ""))
        if method := self.provenance.get("method"):
            parts.append(f"method {method!r}")
        if base := (self.provenance.get("base_model") or {}).get("id"):
            parts.append(f"base {base!r}")
        return f"SpuriousBasis({', '.join(parts)}, from {self._origin})"

    # -- deriving

    def truncate(self, rank: int) -> SpuriousBasis:
        """The first `rank` columns of every tensor; a tensor with fewer keeps all that it has.

        Raises `InputError` for a rank below 1 or above that of every tensor.
        """
        largest = max(entry.rank for entry in self._entries.values())
        if not 1 <= rank <= largest:
            raise InputError(
                f"rank {rank} asked of basis {self._origin}, whose tensors have 1 to {largest} directions; "
                f"choose a rank up to {largest}, or detect again at a larger one"
            )
        return self._derive({key: Entry(old.source, min(rank, old.rank)) for key, old in self._entries.items()})

    def select(self, side: Literal["write", "read", "both"] | str) -> SpuriousBasis:
        """The tensors of one side ("both": all of them). Raises `InputError` if there are none."""
        if side == "both":
            return self
        if side not in SIDES:
            raise InputError(f"side {side!r} is not one of 'write', 'read', 'both'")
        chosen = {key: entry for key, entry in self._entries.items() if key.endswith(f".{side}")}
        if not chosen:
            other = "read" if side == "write" else "write"
            raise InputError(
                f"basis {self._origin} has no {side} side, only {other}; use side {other!r}, or detect again with "
                f"`detect.side: {side}` (or both)"
            )
        return self._derive(chosen)

    def only(self, weights: Sequence[str]) -> SpuriousBasis:
        """The named weights. Raises `InputError` for one that the basis does not have."""
        for weight in weights:
            self._entry(weight, None)
        return self._derive({key: entry for key, entry in self._entries.items() if split_key(key)[0] in set(weights)})

    def random_like(self, seed: int) -> SpuriousBasis:
        """The control: same names, ranks and sides, uniformly random subspaces, another one for every tensor.

        Fixed by the seed and the tensor's name; truncation before and after gives the same columns.
        """
        entries = {key: Entry(RandomSource(old.shape, seed, key), old.rank) for key, old in self._entries.items()}
        provenance = {
            "base_model": self.provenance.get("base_model"),
            "method": "random",
            "seeds": [seed],
            "like": self.provenance.get("method"),
        }
        origin = f"random_like({seed}) of {self._origin}"
        return SpuriousBasis(entries, spectra={}, shapes=self._shapes, provenance=provenance, origin=origin)

    def union(self, other: SpuriousBasis, *, tolerance: float = DEPENDENCE_TOLERANCE) -> SpuriousBasis:
        """Own columns first, unchanged, then what `other` adds to each span, orthonormalised in its order.

        A column whose part outside the span is shorter than `tolerance` (the sine of its angle to the span) is dropped.
        Raises `InputError` for different dimensions, another base model, or stacked experts.
        """
        base = other.provenance.get("base_model") or {}
        self.check_model(id=base.get("id"), revision=base.get("revision"), hash=base.get("hash"))
        tensors, spectra = {}, {}
        for key in sorted({*self._entries, *other._entries}):
            holders = [basis for basis in (self, other) if key in basis._entries]
            parts = [basis.tensor(*split_key(key)) for basis in holders]
            values = [basis._spectra[key] for basis in holders if key in basis._spectra]
            joined = None
            if len(holders) == 1:
                tensors[key] = parts[0]
                joined = values[0] if values else None
            else:
                first, second = parts
                if first.ndim != 2 or first.shape[0] != second.shape[0]:
                    raise InputError(
                        f"cannot join two bases at {key!r}: {tuple(first.shape)} and {tuple(second.shape)}; they must "
                        "be of the same model, and stacked experts cannot be joined"
                    )
                added, kept = independent_columns(first, second, tolerance)
                tensors[key] = torch.cat([first, added.float()], dim=1)
                if len(values) == 2:
                    joined = torch.cat([values[0][: first.shape[1]], values[1][kept]])
            if joined is not None:
                spectra[key] = joined
        provenance = self.provenance
        if other.provenance and other.provenance != self.provenance:
            provenance = {
                "base_model": self.provenance.get("base_model") or other.provenance.get("base_model"),
                "method": "union",
                "parts": [*_parts(self.provenance), *_parts(other.provenance)],
            }
        shapes = {**other._shapes, **self._shapes}
        return SpuriousBasis.from_tensors(tensors, singular_values=spectra, shapes=shapes, provenance=provenance)

    def principal_angles(self, other: SpuriousBasis) -> dict[str, Tensor]:
        """{"<weight>.<side>": angles in radians, ascending, fp64, (min(k1, k2),)} for every tensor that both have.

        Accurate near 0 as near pi/2. Raises `InputError` if nothing is common or dimensions differ.
        """
        common = [key for key in self._entries if key in other._entries]
        if not common:
            raise InputError(f"basis {self._origin} and basis {other._origin} have no weight and side in common")
        angles = {}
        for key in common:
            first, second = self.tensor(*split_key(key)), other.tensor(*split_key(key))
            if first.shape[:-1] != second.shape[:-1]:
                raise InputError(
                    f"cannot compare two bases at {key!r}: {tuple(first.shape)} and {tuple(second.shape)}; they are of "
                    "different models"
                )
            angles[key] = angles_between(first, second)
        return angles

    def with_provenance(self, **fields: Any) -> SpuriousBasis:
        """The same basis with these fields of its provenance set."""
        derived = self._derive(self._entries)
        derived.provenance |= fields
        return derived

    def _derive(self, entries: Mapping[str, Entry]) -> SpuriousBasis:
        weights = {split_key(key)[0] for key in entries}
        return SpuriousBasis(
            entries,
            spectra={key: value for key, value in self._spectra.items() if key in entries},
            shapes={weight: shape for weight, shape in self._shapes.items() if weight in weights},
            provenance=self.provenance,
            origin=self._origin,
            checked=set(self._checked),
        )

    def _entry(self, weight: str, side: str | None) -> Entry:
        for name in (side,) if side else SIDES:
            if (entry := self._entries.get(f"{weight}.{name}")) is not None:
                return entry
        if weight in self:
            raise InputError(f"basis {self._origin} has no {side} side for {weight!r}, only {self.sides(weight)}")
        raise InputError(f"basis {self._origin} has no weight {weight!r}; it has {', '.join(self.weights[:3])}, ...")


def _parts(provenance: Mapping[str, Any]) -> list[Any]:
    return list(provenance["parts"]) if provenance.get("method") == "union" else [dict(provenance)]
