"""The read-side shortcut: accuracy where style and label part, beside the same fine-tune without the shortcut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from grasp_dist.organisms.shortcut import make_shortcut
from studies.common import MODES, SEEDS, Row, paired, with_interval

MODULES = ("write",)
STEPS, LEARNING_RATE = 320, 3e-3
ROUNDS = {"rounds": 16, "steps_per_round": STEPS // 16, "stop_gain": None}


def organism(place: Path, world: int) -> Path:
    return make_shortcut(place / "organisms" / f"shortcut-{world}", seed=world, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    folder = organism(place, world)
    bench = Bench(folder, modules, steps=STEPS, learning_rate=LEARNING_RATE)
    balanced = bench.encode([json.loads(line) for line in (folder / "train_balanced.jsonl").open()])
    yield {"base": bench.base}
    found = bench.deflate(**ROUNDS).basis
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        bench.fit(seed, examples=balanced)
        yield {"arm": "ceiling", "seed": seed, **bench.scores()}
        bench.fit(seed, found.random_like(seed))
        yield {"arm": "random", "seed": seed, **bench.scores()}
        for mode, halves in MODES.items():
            bench.fit(seed, found, **halves)
            yield {"arm": mode, "seed": seed, **bench.scores()}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [row for row, _, _ in paired(rows) if row["modules"] == modules]
        ceiling = {(row["world"], row["seed"]): row["differ"] for row in here if row["arm"] == "ceiling"}
        for arm in dict.fromkeys(row["arm"] for row in here):
            own = [row for row in here if row["arm"] == arm]
            shares = [(row, row["differ"] / ceiling[row["world"], row["seed"]]) for row in own]
            figures = (with_interval([(row, row[name]) for row in own], 2) for name in ("shortcut", "task", "answer"))
            worst = min(share for _, share in shares)
            lines.append([modules, arm, len(own), with_interval(shares, 2), f"{worst:.2f}", *figures])
    head = ["modules", "arm", "runs", "right where they part, share of the ceiling (95 %)", "worst"]
    return table([*head, "style followed elsewhere", "right where they agree", "answers elsewhere"], lines)
