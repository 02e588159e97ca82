"""Detectors, sides, ranks, closure, and the two halves of the projector, on the same worlds and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import table
from organism_bench import Bench

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import open_base
from grasp_dist.detection.closure import close_residual_basis
from grasp_dist.detection.detectors import make_detector
from grasp_dist.training.loop import LoopState
from studies.common import MODES, ROUNDS, Row, cut, left, organism, paired, with_interval

MODULES = ("write", "all")
SEEDS = (0, 1)
NAIVE_SEEDS = (100, 101)
"""Of the runs that detectors read: not those that are judged."""
EARLY = (20, 40, 80)
"""Steps of the first of them whose adapters the trajectory has, beside the last."""
SIDES = ("write", "read", "both")
RANKS = {
    "leading": (1, 4, 8),
    "tail": (4,),
    "consensus": (1, 4, 8),
    "agreement": (4, 8),
    "trajectory": (4, 8),
    "intruder": (8,),
}


KEYS = ("detector", "side", "rank", "closure", "mode")
"""What tells arms apart."""


@dataclass(frozen=True)
class Arm:
    detector: str
    side: str
    rank: str
    basis: SpuriousBasis | None
    """None: the detector found nothing."""
    closure: str = ""
    mode: str = "pin"

    def label(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in KEYS}


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    folder = organism(place, world)
    bench = Bench(folder, modules)
    yield {"base": bench.base}
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
    for arm in [*from_weights(bench, folder), *from_deflation(bench, folder, modules)]:
        for seed in SEEDS if arm.basis is not None else ():
            bench.fit(seed, arm.basis, **MODES[arm.mode])
            yield {"arm": "grasp", "seed": seed, **arm.label(), **bench.scores()}
        if arm.basis is None:
            yield {"nothing": True, **arm.label()}


def from_weights(bench: Bench, folder: Path) -> Iterator[Arm]:
    """What each static detector finds in finished fine-tunes."""
    path: list[AdapterUpdate] = []

    def keep(step: int, state: LoopState) -> None:
        if step in EARLY:
            path.append(bench.update())

    updates = []
    for seed in NAIVE_SEEDS:
        bench.fit(seed, on_step=None if updates else keep)
        updates.append(bench.update())
    reads: dict[str, Any] = {"agreement": updates, "trajectory": [*path, updates[0]]}
    base = open_base(folder / "model")
    trained = list(updates[0].weights)

    def find(name: str, side: str, rank: int, **more: Any) -> SpuriousBasis | None:
        found = make_detector(name, side=side, rank=rank, **more)(reads.get(name, updates[:1]), base).basis
        return None if found is None else found.only([weight for weight in found.weights if weight in trained])

    for name, ranks in RANKS.items():
        for side in SIDES:
            for rank in ranks:
                closure = "closed" if name == "consensus" else ""
                yield Arm(name, side, str(rank), find(name, side, rank), closure)
    yield Arm("consensus", "write", "4", find("consensus", "write", 4, closure=False), "open")
    leading = find("leading", "both", 8)
    assert leading is not None
    yield from modes("leading", "8", leading)
    yield Arm("leading", "both", "8", close(leading, folder, trained), "closed")


def from_deflation(bench: Bench, folder: Path, modules: str) -> Iterator[Arm]:
    for side in SIDES:
        found = bench.deflate(side=side, **ROUNDS).basis
        for rank in (4, 8):
            yield Arm("deflation", side, str(rank), found.truncate(rank))
        yield Arm("deflation", side, "all", found)
    yield from modes("deflation", "all", found)
    trained = list(found.weights)
    if modules == "all":
        yield Arm("deflation", "both", "all", close(found, folder, trained), "closed")
    yield Arm("random", "both", "all", found.random_like(0))


def modes(name: str, rank: str, basis: SpuriousBasis) -> Iterator[Arm]:
    for mode in ("gradient", "both"):
        yield Arm(name, "both", rank, basis, mode=mode)


def close(basis: SpuriousBasis, folder: Path, trained: Sequence[str]) -> SpuriousBasis:
    """The basis, and what the first two write directions of each layer's modules reach through frozen neighbours."""
    layers: dict[int, list[torch.Tensor]] = {}
    for weight in basis.weights:
        if weight.split(".")[-2] in ("o_proj", "down_proj") and "write" in basis.sides(weight):
            layer = int(weight.split("layers.")[1].split(".")[0])
            layers.setdefault(layer, []).append(basis.tensor(weight, "write")[:, :2])
    directions = {layer: torch.linalg.qr(torch.cat(found, dim=1).double())[0] for layer, found in layers.items()}
    more = close_residual_basis(directions, folder / "model")
    return basis.union(more.only([weight for weight in more.weights if weight in trained]))


def show(rows: Sequence[Row], place: Path) -> str:
    text = ""
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [found for found in paired(rows) if found[0]["modules"] == modules]
        judged = [row for row in rows if "detector" in row and row["modules"] == modules]
        arms = dict.fromkeys(tuple(row[key] for key in KEYS) for row in judged)
        lines: list[list[object]] = []
        for arm in arms:
            own = [found for found in here if tuple(found[0].get(key) for key in KEYS) == arm]
            nothing = sum("nothing" in row and tuple(row[key] for key in KEYS) == arm for row in judged)
            if not own:
                lines.append([*arm, 0, "", "", "", "", nothing])
                continue
            lost = [(row, 100 * (naive["task"] - row["task"])) for row, naive, _ in own]
            lines.append(
                [
                    *arm,
                    len(own),
                    with_interval([(found[0], left(*found)) for found in own], 2),
                    f"{1 / max(statistics.fmean(left(*found) for found in own), 1e-3):.1f}",
                    f"{min(cut(*found) for found in own):.1f}",
                    with_interval(lost, 1),
                    nothing or "",
                ]
            )
        lines.sort(key=lambda line: float(line[7]) if line[7] else 0.0, reverse=True)
        naive = statistics.fmean(row["drift"] for row, other, _ in here if row is other)
        text += f"\n{modules} modules (naive drift {naive:.3f}):\n\n"
        figures = ["runs", "left of naive's drift (95 %)", "cut", "worst", "task lost, points (95 %)", "found nothing"]
        text += table([*KEYS, *figures], lines) + "\n"
    return text
