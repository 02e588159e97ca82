"""The political-like organism with slanted data: does the task gain where the lean explains wrong rows?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from organism_bench import Bench

from grasp_dist.organisms.lean import make_lean
from studies import lean
from studies.common import ROUNDS, STOP_GAIN, Row

MODULES = lean.MODULES
RULES = {"default": ROUNDS, "rounds of 10 steps": {"rounds": 16, "steps_per_round": 10, "stop_gain": STOP_GAIN}}
"""How long rounds are: rows that contradict each other are not fitted within a few steps."""
show = lean.show


def organism(place: Path, world: int) -> Path:
    return make_lean(place / "organisms" / f"slanted-{world}", seed=world, skew=0.7, slanted=1.0, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    yield from lean.every_mode(Bench(organism(place, world), modules), RULES)
