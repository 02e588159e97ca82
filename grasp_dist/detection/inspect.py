"""Tables for `grasp-dist inspect`: what a basis file or an adapter holds, and how concentrated each update is."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from grasp_dist.basis import SIDES, SpuriousBasis
from grasp_dist.detection.adapter import read_adapter
from grasp_dist.detection.svd import low_rank_svd, spectrum

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Row", "adapter_rows", "basis_rows", "render"]

_SHOWN = 4
# Methods whose singular values are those of one update; deflation keeps the leading value of every round instead.
_ONE_UPDATE = ("one_shot",)


@dataclass(frozen=True)
class Row:
    """One weight and side. `leading` is the energy share of the first direction, `covered` that of the rank's; these
    and `effective_rank` are None where the spectrum of one whole update is not known."""

    weight: str
    side: str
    dim: int
    rank: int
    values: tuple[float, ...]
    leading: float | None
    covered: float | None
    effective_rank: float | None


def basis_rows(basis: SpuriousBasis) -> list[Row]:
    """One row per weight and side of the basis. Reads no directions."""
    one_update = basis.provenance.get("method") in _ONE_UPDATE
    rows = []
    for weight in basis.weights:
        for side in basis.sides(weight):
            values = basis.singular_values(weight, side)
            rank, dim = basis.basis_rank(weight, side), basis.tensor_shape(weight, side)[-2]
            row = _row(weight, side, dim, rank, values, one_update)
            if not one_update:
                leading, covered = _shares(basis, weight, values)
                row = replace(row, leading=leading, covered=covered)
            rows.append(row)
    return rows


def _shares(basis: SpuriousBasis, weight: str, values: Tensor | None) -> tuple[float | None, float | None]:
    """(leading, covered), as far as the provenance tells them."""
    norm = (basis.provenance.get("update_norm") or {}).get(weight)
    if norm and values is not None:  # of a full difference, whose spectrum is known in part
        energy = values.double().square() / norm**2
        return energy[0].item(), energy.sum().item()
    return (basis.provenance.get("leading_share") or {}).get(weight), None


def adapter_rows(path: str | os.PathLike[str]) -> list[Row]:
    """One row per weight of a PEFT LoRA adapter, for its update s B A. Raises `InputError` as `read_adapter` does."""
    rows = []
    for name, update in read_adapter(path).weights.items():
        _, values, _ = low_rank_svd(update.A, update.B, update.scale)
        rows.append(_row(name, "update", update.shape[0], update.rank, values, True))
    return rows


def render(path: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print the table of a basis file or of an adapter directory. Raises `InputError` for anything else."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe or a file has no width of its own; rich would cut names at 80 columns.
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    path = Path(path)
    if path.is_dir() and not (path / "adapter_config.json").is_file() and (path / "basis.safetensors").is_file():
        path = path / "basis.safetensors"
    if path.is_dir():
        rows, adapter = adapter_rows(path), read_adapter(path)
        facts: dict[str, object] = {"adapter": str(path), "base model": adapter.base_model, "hash": adapter.hash[:16]}
        is_basis = False
    else:
        basis = SpuriousBasis.load(path)
        rows, is_basis = basis_rows(basis), True
        facts = _facts(basis, path)

    for name, value in facts.items():
        if value is not None:
            console.print(f"{name}: {escape(str(value))}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("weight", overflow="fold")
    for heading in ("side", "dim", "rank", "singular values", "top 1", "covered", "effective rank"):
        table.add_column(heading, justify="right")
    for row in rows:
        shown = " ".join(f"{value:.3g}" for value in row.values[:_SHOWN]) + (" .." if len(row.values) > _SHOWN else "")
        shares = [f"{share:.0%}" if share is not None else "" for share in (row.leading, row.covered)]
        effective = f"{row.effective_rank:.1f}" if row.effective_rank is not None else ""
        table.add_row(row.weight, row.side, str(row.dim), str(row.rank), shown, *shares, effective)
    console.print(table)
    console.print(_caption(rows, is_basis), highlight=False)


def _row(weight: str, side: str, dim: int, rank: int, values: Tensor | None, one_update: bool) -> Row:
    numbers = tuple(values.tolist()) if values is not None else ()
    if values is None or not one_update:
        return Row(weight, side, dim, rank, numbers, None, None, None)
    statistics = spectrum(values)
    energy = values.double().square()
    covered = (energy[:rank].sum() / energy.sum()).item() if statistics.norm > 0 else 0.0
    return Row(weight, side, dim, rank, numbers, statistics.leading, covered, statistics.effective_rank)


def _facts(basis: SpuriousBasis, path: Path) -> dict[str, object]:
    base = basis.provenance.get("base_model") or {}
    settings = basis.provenance.get("settings") or {}
    return {
        "basis": str(path),
        "weights": len(basis),
        "directions": sum(basis.basis_rank(weight, side) for weight in basis.weights for side in basis.sides(weight)),
        "sides": " and ".join(side for side in SIDES if any(side in basis.sides(weight) for weight in basis.weights)),
        "method": basis.provenance.get("method"),
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None) or None,
        "base model": base.get("id"),
        "adapter hash": (basis.provenance.get("adapter_hash") or "")[:16] or None,
    }


def _caption(rows: list[Row], is_basis: bool) -> str:
    if all(row.effective_rank is None for row in rows):
        if all(row.covered is not None for row in rows):
            return (
                "singular values: the leading ones of tuned - base; top 1: share of the update's energy in its first "
                "direction; covered: in the directions of the basis' rank"
            )
        return (
            "singular values: strength of each direction when it was found, in order of discovery (one update a "
            "round); top 1: share of a round's update in the directions taken from it, mean over rounds"
        )
    covered = "of the basis' rank" if is_basis else "of the adapter's rank"
    return (
        f"top 1: share of the update's energy in its first direction; covered: in the directions {covered}; "
        "effective rank: exp of the entropy of the singular values"
    )
