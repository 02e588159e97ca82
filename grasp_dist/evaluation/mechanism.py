"""Where fine-tunes wrote: the share of each update in the detected subspace, and the weights that carry it. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.errors import InputError
from grasp_dist.evaluation.runs import RunRecord
from grasp_dist.evaluation.statistics import estimate

if TYPE_CHECKING:
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.detection.adapter import AdapterUpdate

__all__ = ["inside", "update_shares"]


def update_shares(records: Sequence[RunRecord], model: str) -> dict[str, Any] | None:
    """{"inside": {side: estimate}, "chance": {side: estimate}, "weights": [{"weight", "energy", side: estimate}]} over
    the LoRA fine-tunes of that name, as `statistics.estimate` gives them; None where there is none, or no basis of
    weights that they train.

    Energy: squared Frobenius norm of a weight's update, as a share of all weights'. inside: of it, what is written
    along the basis (write) or reads along it (read). chance: what a random subspace of the same ranks would have.
    """
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.detection.adapter import read_adapter

    found: list[tuple[str, dict[str, Any]]] = []
    for record in records:
        if not record.found:
            continue
        for name, seed in record.work:
            if name != model or seed is None:
                continue
            stage = "naive" if model == "naive" else f"project/{model}"
            folder = record.folder / stage / f"seed-{seed}" / "adapter"
            try:
                basis = SpuriousBasis.load(record.folder / "detect" / "basis.safetensors")
                one = inside(read_adapter(Path(folder)), basis)
            except (InputError, OSError):
                continue
            if one["inside"]:
                found.append((record.name, one))
    if not found:
        return None
    by_weight: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run, one in found:
        for row in one["weights"]:
            by_weight.setdefault(row["weight"], []).append((run, row))
    return {
        "inside": _estimates([(run, one["inside"]) for run, one in found]),
        "chance": _estimates([(run, one["chance"]) for run, one in found]),
        "weights": [{"weight": weight, **_estimates(rows)} for weight, rows in by_weight.items()],
    }


def _estimates(rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Of each figure that any row has: runs may differ in their modules and in the sides of their basis."""
    names = dict.fromkeys(name for _, row in rows for name in row if name != "weight")
    return {name: estimate([(run, row[name]) for run, row in rows if name in row]) for name in names}


def inside(update: AdapterUpdate, basis: SpuriousBasis) -> dict[str, Any]:
    """The same of one update. No (out, in) matrix is formed: |U^T B A|^2 from r x r products."""
    rows: list[dict[str, Any]] = []
    for weight, factors in update.weights.items():
        a, b = factors.A.double(), factors.B.double() * factors.scale
        row: dict[str, Any] = {"weight": weight, "energy": _energy(b, a)}
        for side in ("write", "read"):
            row[side] = row[f"{side} chance"] = 0.0
            if weight in basis and side in basis.sides(weight):
                columns = basis.tensor(weight, side).double()
                part = _energy(columns.T @ b, a) if side == "write" else _energy(b, a @ columns)
                row[side] = part / row["energy"] if row["energy"] else 0.0
                row[f"{side} chance"] = columns.shape[1] / columns.shape[0]
        rows.append(row)
    whole = sum(row["energy"] for row in rows) or 1.0
    for row in rows:
        row["energy"] /= whole
    sides = [side for side in ("write", "read") if any(row[f"{side} chance"] for row in rows)]
    return {
        "inside": {side: sum(row["energy"] * row[side] for row in rows) for side in sides},
        "chance": {side: sum(row["energy"] * row[f"{side} chance"] for row in rows) for side in sides},
        "weights": [{key: row[key] for key in ("weight", "energy", *sides)} for row in rows],
    }


def _energy(b: Any, a: Any) -> float:
    """|B A|_F^2."""
    return float(((b.T @ b) * (a @ a.T)).sum())
