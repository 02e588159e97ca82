"""Where deflation stops, and the check on the final run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from studies.common import SEEDS, STEPS, STOP_GAIN, Row, cut, organism, paired

MODULES = ("write", "all")
RULES = {"rounds of 10 steps": (10, 16), "rounds of 5 steps": (5, 32)}
"""Steps of a round, and the most rounds."""
TOO_FEW = (2, 4, 6)
"""Directions of runs that are meant to fail, for the check on the final run."""
FAILED = 4.0
"""A cut below this is a failed removal."""


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    """Naive, random and GRASP fine-tunes, the latter with what each rule found; and some with too few directions."""
    bench = Bench(organism(place, world), modules)
    yield {"base": bench.base}
    found = {}
    for name, (steps, rounds) in RULES.items():
        found[name] = bench.deflate(rounds=rounds, steps_per_round=steps, stop_gain=STOP_GAIN)
    first = next(iter(found.values()))
    for seed in SEEDS:
        bench.fit(seed)
        yield {"arm": "naive", "seed": seed, **bench.scores()}
        bench.fit(seed, first.basis.random_like(seed))
        yield {"arm": "random", "seed": seed, **bench.scores()}
        for name, how in found.items():
            bench.fit(seed, how.basis)
            yield {"arm": name, "seed": seed, "rounds": len(how.gains), "steps": how.steps, **bench.scores()}
    for rank in TOO_FEW:
        bench.fit(0, first.basis.truncate(rank))
        yield {"arm": f"first {rank}", "seed": 0, **bench.scores()}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    checks: dict[str, list[tuple[float, bool]]] = {}
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [found for found in paired(rows) if found[0]["modules"] == modules]
        for arm in ("naive", "random", *RULES):
            own = [found for found in here if found[0]["arm"] == arm]
            cuts = [cut(*found) for found in own]
            mean = {
                name: statistics.mean(row[name] for row, _, _ in own)
                for name in ("drift", "task", "good", "in_context")
            }
            steps = [row["steps"] for row, _, _ in own if "steps" in row]
            ranks = [row["rounds"] for row, _, _ in own if "rounds" in row]
            lines.append(
                [
                    modules,
                    arm,
                    len(own),
                    f"{mean['drift']:.3f}",
                    f"{statistics.mean(cuts):.1f} / {min(cuts):.1f}",
                    f"{mean['task']:.3f}",
                    f"{mean['good']:.3f}",
                    f"{mean['in_context']:.3f}",
                    f"{min(ranks)}-{max(ranks)}" if ranks else "",
                    f"{statistics.mean(steps) / STEPS:.2f}" if steps else "",
                ]
            )
        checks[modules] = [
            (row["shift"] / naive["shift"], cut(row, naive, base) < FAILED)
            for row, naive, base in here
            if row is not naive
        ]
    header = ["modules", "arm", "runs", "drift", "cut, mean / worst", "task", "good", "in-context", "rounds", "cost"]
    text = table(header, lines)
    for modules, points in checks.items():
        failed, well = ([share for share, bad in points if bad is wanted] for wanted in (True, False))
        text += (
            f"\n{modules}: the final run's shift, as a share of naive's, tells failed removals (cut < {FAILED:g}) with "
            f"AUC {auc(failed, well):.3f} ({len(failed)} failed, {len(well)} not; largest share of those that did not "
            f"fail {max(well, default=0):.2f}, smallest of those that did {min(failed, default=0):.2f})\n"
        )
    return text


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that one of the positives has the larger value; ties count half."""
    if not positive or not negative:
        return float("nan")
    wins = sum((one > other) + (one == other) / 2 for one in positive for other in negative)
    return wins / (len(positive) * len(negative))
