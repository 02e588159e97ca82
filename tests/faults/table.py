"""What the kinds of faults share: where they work, how many of the injections they make, and the rows they report."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

__all__ = ["Bench", "Row", "markdown"]

T = TypeVar("T")


@dataclass
class Row:
    """One line of the table; a bar that does not hold is a failure."""

    fault: str
    injected: int = 0
    lost: int | None = 0
    """States that had been saved and could not be had again; None where no state is at stake."""
    replayed: int | None = None
    """Steps that were done again, at most; None where that says nothing."""
    outcome: str = ""
    """What happened, in all injections."""
    skipped: str = ""
    """Why nothing could be injected here."""
    failures: list[str] = field(default_factory=list)

    def check(self, held: object, what: str) -> bool:
        """Note a failure unless `held`."""
        if not held:
            self.failures.append(what)
        return bool(held)

    def replay(self, steps: int) -> None:
        self.replayed = max(self.replayed or 0, steps)


class Bench:
    """A folder to work in, a model to train, and a seeded share of all injections."""

    def __init__(self, folder: Path, model: Path, *, share: float, seed: int) -> None:
        self.folder, self.model, self.share, self.seed = folder, model, share, seed
        folder.mkdir()
        self._count = 0

    def pick(self, injections: Sequence[T]) -> list[T]:
        """The share of them that is to be made, at least one, in their order."""
        if self.share >= 1:
            return list(injections)
        chosen = self.random("pick", len(injections)).sample(
            range(len(injections)), max(1, math.ceil(len(injections) * self.share))
        )
        return [injections[index] for index in sorted(chosen)]

    def random(self, *what: object) -> random.Random:
        """A generator that depends on the seed and on what it is for."""
        return random.Random(f"{self.seed} {what}")

    def new(self) -> Path:
        """A name for a folder that does not exist yet."""
        self._count += 1
        return self.folder / f"{self._count:05d}"

    def drop(self, *folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def say(self, line: str) -> None:
        print(line, flush=True)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| fault | times injected | states lost | steps replayed at most | outcome |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lost, replayed = ("" if value is None else str(value) for value in (row.lost, row.replayed))
        outcome = f"not run: {row.skipped}" if row.skipped else row.outcome
        if row.failures:
            outcome = f"**{len(row.failures)} failed**: {row.failures[0].splitlines()[0][:300]}"
        lines.append(f"| {row.fault} | {row.injected} | {lost} | {replayed} | {outcome} |")
    return "\n".join(lines)
