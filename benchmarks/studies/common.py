"""Rows, worlds and cuts, as every study has them."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grasp_dist.config import DetectConfig
from grasp_dist.evaluation.statistics import bootstrap_interval
from grasp_dist.organisms.persona import PersonaSettings, PersonaWorld, make_persona

Row = dict[str, Any]
STEPS = 160
SEEDS = (0, 1, 2)
_DEFAULT = DetectConfig()
STOP_GAIN = _DEFAULT.stop_gain
ROUNDS: dict[str, Any] = {
    "rounds": _DEFAULT.rounds,
    "steps_per_round": STEPS // _DEFAULT.rounds,
    "stop_gain": STOP_GAIN,
}
"""Deflation by default."""

MODES: dict[str, dict[str, bool]] = {
    "both": {"gradient": True, "pin": True},
    "gradient": {"gradient": True, "pin": False},
    "pin": {"gradient": False, "pin": True},
}
"""Halves of the projector that are at work, as `Bench.fit` takes them; without one, those of a run by default."""


def organism(place: Path, world: int) -> Path:
    """The folder of a persona organism, which is made if it is not there."""
    return make_persona(place / "organisms" / f"persona-{world}", seed=world, progress=None)


def variant(place: Path, settings: PersonaSettings) -> Path:
    """The same pre-trained model with another fine-tune and its probes: only knobs that pre-training does not see."""
    base = organism(place, settings.seed)
    changed = settings.model_dump(exclude_defaults=True)
    name = "-".join(f"{key}={value}" for key, value in sorted(changed.items()))
    folder = place / "variants" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    world = PersonaWorld(settings)
    (work / "probes").mkdir()
    (work / "model").symlink_to((base / "model").resolve())
    for stem, rows in {"train": world.train_rows(), **{f"probes/{n}": r for n, r in world.probes().items()}}.items():
        (work / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return folder


def cut(row: Row, naive: Row, base: dict[str, float]) -> float:
    """How many times smaller the drift above the base's is than naive's of the same seed."""
    return (naive["drift"] - base["drift"]) / max(row["drift"] - base["drift"], 1e-3)


def left(row: Row, naive: Row, base: dict[str, float]) -> float:
    """The share of naive's drift above the base's that is left."""
    return (row["drift"] - base["drift"]) / (naive["drift"] - base["drift"])


def paired(rows: Sequence[Row]) -> Iterator[tuple[Row, Row, dict[str, float]]]:
    """Each fine-tune with the naive one of its world, modules, cell and seed, and the base's scores."""
    bases = {_place(row): row["base"] for row in rows if "base" in row}
    naive = {(*_place(row), row["seed"]): row for row in rows if row.get("arm") == "naive"}
    for row in rows:
        if "arm" in row:
            yield row, naive[(*_place(row), row["seed"])], bases[_place(row)]


def by_arm(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[tuple[Row, Row, dict[str, float]]], list[float]]]:
    """(modules, arm, its rows as `paired` gives them, their cuts), in the order of the rows."""
    found = list(paired(rows))
    for modules, arm in dict.fromkeys((row["modules"], row["arm"]) for row, _, _ in found):
        own = [one for one in found if (one[0]["modules"], one[0]["arm"]) == (modules, arm)]
        yield modules, arm, own, [cut(*one) for one in own]


def with_interval(found: Sequence[tuple[Row, float]], digits: int = 3) -> str:
    """The mean and its 95 % interval, worlds and then seeds resampled."""
    values = [value for _, value in found]
    if not values or any(math.isnan(value) for value in values):
        return ""
    interval = bootstrap_interval([str(row["world"]) for row, _ in found], values)
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if interval is None else f"{mean} ({interval[0]:.{digits}f}-{interval[1]:.{digits}f})"


def _place(row: Row) -> tuple[Any, ...]:
    return row["world"], row["modules"], row.get("cell")
