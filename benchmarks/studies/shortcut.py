"""The read-side shortcut: accuracy where style and label part, beside the same fine-tune without the shortcut."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import table
from organism_bench import Bench

from grasp_dist.organisms.shortcut import make_shortcut
from studies.common import MODES, SEEDS, Row, paired, with_interval

MODULES = ("write",)
STEPS, LEARNING_RATE = 320, 1e-3
ROUNDS: dict[str, Any] = {
    "side": "read",
    "rounds": 24,
    "steps_per_round": 80,
    "directions_per_round": 2,
    "stop_gain": None,
}
"""As in the recipe: two directions a round, and rounds long enough to learn the shortcut anew."""


def organism(place: Path, world: int) -> Path:
    return make_shortcut(place / "organisms" / f"shortcut-{world}", seed=world, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    folder = organism(place, world)
    bench = Bench(folder, modules, steps=STEPS, learning_rate=LEARNING_RATE)
    balanced = bench.encode([json.loads(line) for line in (folder / "train_balanced.jsonl").open()])
    yield {"base": bench.base}
    detected = bench.deflate(**ROUNDS)
    found = detected.basis
    default = bench.deflate()
    yield {"gains": detected.gains, "default_gains": default.gains}
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        bench.fit(seed, examples=balanced)
        yield {"arm": "ceiling", "seed": seed, **bench.scores()}
        bench.fit(seed, found.random_like(seed))
        yield {"arm": "random", "seed": seed, **bench.scores()}
        for mode in ("both", "pin"):
            bench.fit(seed, found, **MODES[mode])
            yield {"arm": mode, "seed": seed, **bench.scores()}
        bench.fit(seed, default.basis)
        yield {"arm": "pin, detected by default", "seed": seed, **bench.scores()}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [row for row, _, _ in paired(rows) if row["modules"] == modules]
        ceiling = {(row["world"], row["seed"]): row["differ"] for row in here if row["arm"] == "ceiling"}
        for arm in dict.fromkeys(row["arm"] for row in here):
            own = [row for row in here if row["arm"] == arm]
            shares = [(row, row["differ"] / ceiling[row["world"], row["seed"]]) for row in own]
            figures = (
                with_interval([(row, row[name]) for row in own], 2) for name in ("shortcut", "task", "answer", "style")
            )
            worst = min(share for _, share in shares)
            lines.append([modules, arm, len(own), with_interval(shares, 2), f"{worst:.2f}", *figures])
    head = ["modules", "arm", "runs", "right where they part, share of the ceiling (95 %)", "worst"]
    head += ["style followed elsewhere", "right where they agree", "answers elsewhere", "style elsewhere"]
    return f"{table(head, lines)}\n\nRight where they part, mean over seeds:\n\n{_by_world(rows)}\n\n{_gains(rows)}"


def _by_world(rows: Sequence[Row]) -> str:
    """Not every world's naive fine-tune takes the shortcut."""
    found = [row for row, _, _ in paired(rows)]
    arms = list(dict.fromkeys(row["arm"] for row in found))
    lines: list[list[object]] = []
    for world in sorted({row["world"] for row in found}):
        own = {arm: [row["differ"] for row in found if row["world"] == world and row["arm"] == arm] for arm in arms}
        lines.append([world, *(f"{statistics.mean(own[arm]):.2f}" for arm in arms)])
    return table(["world", *arms], lines)


def _gains(rows: Sequence[Row]) -> str:
    """How far the rounds of either search brought the loss below the base's."""
    lines = [
        [row["world"], search, len(row[key]), f"{row[key][0]:.2f}", f"{max(row[key]):.2f}"]
        for row in rows
        for search, key in (("the recipe's", "gains"), ("by default", "default_gains"))
        if key in row
    ]
    return table(["world", "search", "rounds", "gain of the first round", "of the best"], lines)
