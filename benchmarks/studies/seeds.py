"""One detection for all fine-tune seeds, or one for each that starts where its fine-tune starts; pinned."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from studies.common import MODES, ROUNDS, SEEDS, Row, cut, organism, paired, with_interval

MODULES = ("write", "all")
SHARED = 1000


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    bench = Bench(organism(place, world), modules)
    yield {"base": bench.base}
    shared = bench.deflate(seed=SHARED, **ROUNDS).basis
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        for arm, basis in (("shared", shared), ("own", bench.deflate(seed=seed, **ROUNDS).basis)):
            bench.fit(seed, basis, **MODES["pin"])
            yield {"arm": arm, "seed": seed, **bench.scores()}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [found for found in paired(rows) if found[0]["modules"] == modules]
        for arm in dict.fromkeys(row["arm"] for row, _, _ in here):
            own = [found for found in here if found[0]["arm"] == arm]
            cuts = [cut(*found) for found in own]
            lines.append(
                [
                    modules,
                    arm,
                    len(own),
                    with_interval([(row, row["drift"]) for row, _, _ in own]),
                    f"{max(row['drift'] for row, _, _ in own):.3f}",
                    f"{statistics.mean(cuts):.1f} / {min(cuts):.1f}",
                    with_interval([(row, 100 * (naive["task"] - row["task"])) for row, naive, _ in own], 1),
                    with_interval([(row, row["good"]) for row, _, _ in own]),
                    with_interval([(row, row["in_context"]) for row, _, _ in own]),
                ]
            )
    head = ["modules", "detection", "runs", "drift (95 %)", "worst", "cut, mean / worst", "task lost, points (95 %)"]
    return table([*head, "good", "in-context"], lines)
