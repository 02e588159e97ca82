"""Whether the directions are those of another LoRA rank or seed, and whether they work there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.shared_directions import shared_directions
from studies.common import ROUNDS, Row, cut, organism, paired

MODULES = ("write", "all")
LORA_RANKS = (8, 16, 32)
COUNTS = (1, 2, 4)
"""Directions of the smaller set in a comparison."""
SEEDS = (0, 1)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    """Bases of other LoRA ranks (alpha = 2 r) and of another seed beside those of r = 8, and fine-tunes of r = 8."""
    folder = organism(place, world)
    found: dict[str, dict[str, SpuriousBasis]] = {"deflation": {}, "leading": {}}
    for rank in LORA_RANKS:
        bench = Bench(folder, modules, rank=rank)
        found["deflation"][f"r = {rank}"] = bench.deflate(**ROUNDS).basis
        bench.fit(100)
        found["leading"][f"r = {rank}"] = bench.leading("both", 8)
    bench = Bench(folder, modules, rank=8)
    found["deflation"]["r = 8, another seed"] = bench.deflate(1001, **ROUNDS).basis
    bench.fit(101)
    found["leading"]["r = 8, another seed"] = bench.leading("both", 8)
    one, other = found["deflation"]["r = 8"], found["deflation"]["r = 8, another seed"]
    found["deflation"]["r = 8, two seeds: all"] = one.union(other)
    found["deflation"]["r = 8, two seeds: shared"] = agreed(one, other)
    yield {"base": bench.base}
    for method, bases in found.items():
        first = bases["r = 8"]
        for name, basis in {**bases, "random": first.random_like(0)}.items():
            if "two seeds" in name:
                continue
            for side in ("write", "read"):
                for count in COUNTS:
                    yield {
                        "compared": name,
                        "method": method,
                        "side": side,
                        "count": count,
                        "into all": angles(first.select(side).truncate(count), basis.select(side)),
                    }
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        for method, bases in found.items():
            for name, basis in bases.items():
                bench.fit(seed, basis)
                yield {"arm": "grasp", "method": method, "from": name, "seed": seed, **bench.scores()}


def agreed(first: SpuriousBasis, second: SpuriousBasis) -> SpuriousBasis:
    """What two detections share beyond chance, weight by weight."""
    keys = [(weight, side) for weight in first.weights for side in first.sides(weight)]
    tensors = {
        f"{weight}.{side}": shared_directions(
            [basis.tensor(weight, side) for basis in (first, second)], num_tests=len(keys)
        ).directions
        for weight, side in keys
    }
    kept = {key: columns for key, columns in tensors.items() if columns.shape[1]}
    return SpuriousBasis.from_tensors(kept, provenance=first.provenance)


def angles(first: SpuriousBasis, second: SpuriousBasis) -> list[float]:
    """The largest principal angle of each weight, in degrees."""
    return [math.degrees(float(found[-1])) for found in first.principal_angles(second).values()]


def show(rows: Sequence[Row], place: Path) -> str:
    compared = [row for row in rows if "compared" in row]
    lines: list[list[object]] = []
    runs = [found for found in paired(rows) if found[0]["arm"] == "grasp"]
    for modules in dict.fromkeys(row["modules"] for row in rows):
        for method in ("deflation", "leading"):
            names = [row["compared"] for row in compared] + [
                found[0]["from"] for found in runs if found[0]["method"] == method
            ]
            for name in dict.fromkeys(names):
                line: list[object] = [modules, method, name]
                for side in ("write", "read"):
                    for count in COUNTS:
                        own = [
                            row
                            for row in compared
                            if (row["modules"], row["method"], row["compared"], row["side"], row["count"])
                            == (modules, method, name, side, count)
                        ]
                        into = [angle for row in own for angle in row["into all"]]
                        line.append(f"{statistics.fmean(into):.0f}" if into else "")
                cuts = [
                    cut(*found)
                    for found in runs
                    if (found[0]["modules"], found[0]["method"], found[0]["from"]) == (modules, method, name)
                ]
                line.append(f"{statistics.fmean(cuts):.1f} / {min(cuts):.1f}" if cuts else "")
                lines.append(line)
    sides = [f"{side}, first {count}" for side in ("write", "read") for count in COUNTS]
    return table(["modules", "method", "found with", *sides, "cut of an r = 8 run, mean / worst"], lines)
