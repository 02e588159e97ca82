"""What a static detector is: one or more fine-tunes' weights in, directions with their evidence out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from grasp_dist.basis import SIDES, SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.errors import InputError

__all__ = [
    "Detection",
    "Detector",
    "Side",
    "build_basis",
    "chosen_sides",
    "need_base",
    "one_run",
    "provenance",
    "several_runs",
]

Side = Literal["write", "read", "both"]


@dataclass(frozen=True)
class Detection:
    """`basis`: None where no direction was found. `confidence`: in [0, 1]; each detector says what it means.
    `evidence`: the figures behind it, as JSON values, per weight and pooled."""

    basis: SpuriousBasis | None
    confidence: float
    evidence: dict[str, Any]


class Detector(Protocol):
    """A frozen dataclass whose fields are its settings. The same runs and settings give the same bits on one machine
    at one number of threads; nothing is trained, and no (out, in) update is formed."""

    name: ClassVar[str]

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for too few runs, runs of other weights, or a base model that is needed and missing."""
        ...


def one_run(runs: Sequence[AdapterUpdate], name: str) -> AdapterUpdate:
    """The only run. Raises `InputError` for none or several."""
    if len(runs) != 1:
        raise InputError(f"detector {name!r} reads one naive fine-tune, not {len(runs)}; give one adapter")
    return runs[0]


def several_runs(runs: Sequence[AdapterUpdate], name: str) -> list[AdapterUpdate]:
    """Two or more runs of the same weights. Raises `InputError` for fewer, and for other names, shapes or bases."""
    if len(runs) < 2:
        raise InputError(f"detector {name!r} compares two or more runs, not {len(runs)}; give more adapters")
    first = runs[0]
    for number, run in enumerate(runs[1:], start=2):
        if odd := sorted(run.weights.keys() ^ first.weights.keys()):
            raise InputError(
                f"runs 1 and {number} adapt other weights ({odd[0]!r} is in one only); train both on the same modules"
            )
        for weight, update in run.weights.items():
            if update.shape != first.weights[weight].shape:
                raise InputError(
                    f"{weight!r} is {first.weights[weight].shape} in run 1 and {update.shape} in run {number}; they "
                    "are of different base models"
                )
        if first.base_hash and run.base_hash and first.base_hash != run.base_hash:
            raise InputError(f"runs 1 and {number} were trained from different base models; compare runs of one")
    return list(runs)


def need_base(base: BaseWeights | None, name: str) -> BaseWeights:
    """The base model. Raises `InputError` without one."""
    if base is None:
        raise InputError(f"detector {name!r} reads base weights; give the base model's directory (open_base)")
    return base


def chosen_sides(side: str) -> tuple[str, ...]:
    """("write",), ("read",) or both. Raises `InputError` for another name."""
    if side not in (*SIDES, "both"):
        raise InputError(f"side {side!r} is not one of 'write', 'read', 'both'")
    return SIDES if side == "both" else (side,)


def build_basis(
    detector: Any,
    tensors: Mapping[str, Tensor],
    runs: Sequence[AdapterUpdate],
    base: BaseWeights | None,
    *,
    singular_values: Mapping[str, Tensor] | None = None,
) -> SpuriousBasis | None:
    """A basis of {"<weight>.<side>": (dim, k)} with the detector's name and settings as its provenance; tensors of no
    columns are left out, and None is what nothing gives."""
    kept = {key: columns for key, columns in tensors.items() if columns.shape[1]}
    if not kept:
        return None
    shapes = {key.rpartition(".")[0]: runs[0].weights[key.rpartition(".")[0]].shape for key in kept}
    return SpuriousBasis.from_tensors(
        kept,
        singular_values={key: value for key, value in (singular_values or {}).items() if key in kept},
        shapes=shapes,
        provenance=provenance(detector, runs, base),
    )


def provenance(detector: Any, runs: Sequence[AdapterUpdate], base: BaseWeights | None) -> dict[str, Any]:
    """What a basis says about how a detector, a dataclass with `name`, found it."""
    run = runs[0]
    known = {"id": run.base_model, "revision": run.revision, "hash": run.base_hash}
    settings = asdict(detector)
    return {
        "base_model": base.reference if base is not None and base.reference["id"] is not None else known,
        "method": detector.name,
        "settings": settings,
        "seeds": [settings["seed"]] if "seed" in settings else [],
        "adapter_hashes": [one.hash for one in runs],
    }
