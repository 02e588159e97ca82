"""The political-like organism with slanted data: does the task gain where the lean explains wrong rows?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from organism_bench import Bench

from grasp_dist.organisms.lean import make_lean
from studies import lean
from studies.common import ROUNDS, Row

MODULES = lean.MODULES
show = lean.show


def organism(place: Path, world: int) -> Path:
    return make_lean(place / "organisms" / f"slanted-{world}", seed=world, skew=0.7, slanted=1.0, progress=None)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    yield from lean.every_mode(Bench(organism(place, world), modules), {"default": ROUNDS})
