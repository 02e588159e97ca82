"""The political-like organism with slanted data: does the task gain where the lean explains wrong rows?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from grasp_dist.organisms.lean import make_lean
from studies import lean
from studies.common import ROUNDS, STOP_GAIN, Row, by_arm, cut

MODULES = lean.MODULES
RULES = {"default": ROUNDS, "rounds of 10 steps": {"rounds": 16, "steps_per_round": 10, "stop_gain": STOP_GAIN}}
"""How long rounds are: rows that contradict each other are not fitted within a few steps."""


def organism(place: Path, world: int) -> Path:
    return make_lean(place / "organisms" / f"slanted-{world}", seed=world, skew=0.7, slanted=1.0, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    yield from lean.every_mode(Bench(organism(place, world), modules), RULES)


def show(rows: Sequence[Row], place: Path) -> str:
    """One world's search may end early: the means do not say which."""
    lines = []
    for modules, arm, own, _ in by_arm(rows):
        for world in dict.fromkeys(row["world"] for row, _, _ in own) if arm.endswith("pin") else ():
            here = [found for found in own if found[0]["world"] == world]
            cuts = sorted(cut(*found) for found in here)
            lines.append([modules, arm, world, here[0][0]["rounds"], f"{cuts[0]:.1f}-{cuts[-1]:.1f}"])
    by_world = table(["modules", "arm", "world", "rounds", "cuts"], lines)
    return f"{lean.show(rows, place)}\n\n{by_world}"
