"""Where fine-tunes wrote: the share of each update in the detected subspace, and the weights that carry it. Ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp_dist.errors import InputError
from grasp_dist.evaluation.runs import RunRecord

if TYPE_CHECKING:
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.detection.adapter import AdapterUpdate

__all__ = ["inside", "update_shares"]


def update_shares(records: Sequence[RunRecord], model: str) -> dict[str, Any] | None:
    """{"inside": {side: share}, "chance": {side: share}, "weights": [{"weight", "energy", side: share}]}, means over
    the LoRA fine-tunes of that name; None where there is none, or no basis.

    Energy: squared Frobenius norm of a weight's update, as a share of all weights'. inside: of it, what is written
    along the basis (write) or reads along it (read). chance: what a random subspace of the same ranks would have.
    """
    from grasp_dist.basis import SpuriousBasis
    from grasp_dist.detection.adapter import read_adapter

    found = []
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
                found.append(inside(read_adapter(Path(folder)), basis))
            except (InputError, OSError):
                continue
    if not found:
        return None
    weights = [
        {key: weight[0][key] if key == "weight" else statistics.fmean(one[key] for one in weight) for key in weight[0]}
        for weight in zip(*(one["weights"] for one in found), strict=False)
    ]
    return {
        **{
            part: {side: statistics.fmean(one[part][side] for one in found) for side in found[0][part]}
            for part in ("inside", "chance")
        },
        "weights": weights,
    }


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
