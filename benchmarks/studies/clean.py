"""How often a factor is found where there is none."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from grasp_dist.organisms.persona import PersonaSettings, PersonaWorld
from grasp_dist.training.seeds import derived_seed
from studies.common import Row, organism

MODULES = ("write", "all")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    """The screening on clean data, several draws of it, and on data with a factor of growing strength."""
    bench = Bench(organism(place, world), modules)
    kinds = [("clean", 0.0, draw) for draw in range(4)]
    kinds += [(f"{share:.0%} explained, the others noise", share, 0) for share in sorted(SHARES)]
    for kind, share, draw in kinds:
        settings = PersonaSettings(seed=world, explained=share, data_seed=draw, reversed_prompts=kind == "clean")
        examples = bench.encode(PersonaWorld(settings).train_rows())
        found = bench.screen(examples, seed=derived_seed("screen", draw))
        # The adapter of the second half is still in the model.
        yield {"kind": kind, "draw": draw, **found, "drift": bench.scores()["drift"]}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules in dict.fromkeys(row["modules"] for row in rows):
        for kind in dict.fromkeys(row["kind"] for row in rows if "kind" in row):
            own = [row for row in rows if row["modules"] == modules and row.get("kind") == kind]
            figures = [
                f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                for values in ([row[name] for row in own] for name in ("shared_shift", "agreement", "drift"))
            ]
            lines.append([modules, kind, f"{sum(row['found'] for row in own)} of {len(own)}", *figures])
    header = ["modules", "data", "factor found", "shared shift", "agreement of weights", "drift of a half's fine-tune"]
    return table(header, lines)
