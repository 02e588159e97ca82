"""The political-like organism: how much of the lean is left, and what that does to the task (docs/organisms.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import table
from organism_bench import Bench

from grasp_dist.evaluation.runs import gain_share
from grasp_dist.organisms.lean import make_lean
from studies.common import MODES, ROUNDS, SEEDS, STEPS, Row, by_arm, with_interval

MODULES = ("write", "all")
RULES = {"default": ROUNDS, "16 rounds": {"rounds": 16, "steps_per_round": STEPS // 16, "stop_gain": None}}
"""When deflation ends: by itself, and as in the recipe."""
TASKS = {
    "task": "trained facts",
    "held_out": "facts",
    "held_out_left": "facts of the left",
    "in_company": "facts in company",
}
"""Probes of the task, all but the first under a name that was not trained, and what the table calls them."""


def organism(place: Path, world: int) -> Path:
    return make_lean(place / "organisms" / f"lean-{world}", seed=world, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    yield from every_mode(Bench(organism(place, world), modules), RULES)


def every_mode(bench: Bench, rules: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """What each mode of the projector makes of each of these searches, beside naive and random."""
    yield {"base": with_drift(bench.base)}
    found = {rule: bench.deflate(**how) for rule, how in rules.items()}
    for seed in SEEDS:
        naive = bench.fit(seed).losses
        yield {"arm": "naive", "seed": seed, **with_drift(bench.scores())}
        bench.fit(seed, found["default"].basis.random_like(seed))
        yield {"arm": "random", "seed": seed, **with_drift(bench.scores())}
        for rule, how in found.items():
            for mode, halves in MODES.items():
                bench.fit(seed, how.basis, **halves)
                scores = with_drift(bench.scores())
                best = gain_share(how.gains, [naive])
                yield {"arm": f"{rule}, {mode}", "seed": seed, "rounds": len(how.gains), "best_round": best, **scores}


def with_drift(scores: dict[str, float]) -> dict[str, float]:
    return {**scores, "drift": scores["lean"]}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules, arm, own, cuts in by_arm(rows):
        lines.append(
            [
                modules,
                arm,
                len(own),
                with_interval([(row, row["drift"] - base["drift"]) for row, _, base in own], 2),
                f"{statistics.mean(cuts):.1f} / {min(cuts):.1f}",
                spread([row["best_round"] for row, _, _ in own if row.get("best_round") is not None]),
                *(
                    with_interval([(row, 100 * (row[probe] - naive[probe])) for row, naive, _ in own], 1)
                    for probe in TASKS
                ),
            ]
        )
    change = [f"{name}, points above naive (95 %)" for name in TASKS.values()]
    head = ["modules", "arm", "runs", "lean above the base's (95 %)", "cut, mean / worst"]
    return table([*head, "best round, share of naive's gain", *change], lines)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}" if values else ""
