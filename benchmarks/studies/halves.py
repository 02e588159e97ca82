"""The two halves of the projector, gradient and pin, one by one and together; and several probes a round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import table
from organism_bench import Bench

from studies.common import MODES, ROUNDS, SEEDS, STEPS, Row, by_arm, organism, with_interval

MODULES = ("write", "all")
RESTARTED: dict[str, Any] = {"method": "restarted", "rounds": 12, "steps_per_round": 60}
"""As many directions as the warm search finds. Its gains do not fall, so that nothing would stop it."""
DETECTIONS: dict[str, dict[str, Any]] = {
    "warm": ROUNDS,
    "restarted, 1 probe": RESTARTED,
    "restarted, 3 probes": {**RESTARTED, "probe_seeds": 3},
}
MEASURES = {"good": "good", "in_context": "in-context"}


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    bench = Bench(organism(place, world), modules)
    yield {"base": bench.base}
    found = {name: bench.deflate(**how) for name, how in DETECTIONS.items()}
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        bench.fit(seed, found["warm"].basis.random_like(seed))
        yield {"arm": "random", "seed": seed, **bench.scores()}
        for name, how in found.items():
            if not len(how.basis):
                continue
            ranks = [how.basis.basis_rank(weight, side) for weight in how.basis.weights for side in ("write", "read")]
            more = {"rounds": len(how.gains), "steps": how.steps, "directions": statistics.fmean(ranks)}
            for mode in MODES if name == "warm" else ("both",):
                bench.fit(seed, how.basis, **MODES[mode])
                yield {"arm": f"{name}, {mode}", "seed": seed, **more, **bench.scores()}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules, arm, own, cuts in by_arm(rows):
        lines.append(
            [
                modules,
                arm,
                len(own),
                with_interval([(row, row["drift"]) for row, _, _ in own]),
                f"{statistics.mean(cuts):.1f} / {min(cuts):.1f}",
                with_interval([(row, 100 * (naive["task"] - row["task"])) for row, naive, _ in own], 1),
                *(with_interval([(row, row[name]) for row, _, _ in own]) for name in MEASURES),
                *(_mean(own, name) for name in ("rounds", "directions")),
                _mean(own, "steps", STEPS),
            ]
        )
    head = ["modules", "arm", "runs", "drift (95 %)", "cut, mean / worst", "task lost, points (95 %)"]
    return table([*head, *MEASURES.values(), "rounds", "directions", "cost"], lines)


def _mean(own: Sequence[tuple[Row, Row, dict[str, float]]], name: str, unit: float = 1) -> str:
    values = [row[name] / unit for row, _, _ in own if name in row]
    return f"{statistics.mean(values):.1f}" if values else ""
