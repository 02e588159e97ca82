"""What to choose from a sweep: one combination, with the reason. Ours.

The rule of the recommendation, which the page prints:

1. The combinations that keep the task: at most a tolerance below naive. If none does, those that are within the
   tolerance of the best.
2. Of these, the least drift, which is on the front, and every one whose drift is larger by no more than one standard
   error: the seeds' own scatter (after the one-standard-error rule of Breiman et al., Classification and Regression
   Trees, 1984). So one that another beats by less than what seeds make may be chosen.
3. Of these, the smallest rank; one side before both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "Outcome", "recommend", "standard_error"]


@dataclass(frozen=True)
class Outcome:
    """What one combination reached, over its seeds."""

    name: str
    side: str
    rank: int
    task: float
    """Mean, turned so that more is better."""
    drift: float
    """Distance of the mean from the base: less is better."""
    seeds: int
    drift_sd: float | None = None
    """Standard deviation over seeds; None for a single one."""


@dataclass(frozen=True)
class Choice:
    """The recommended combination, and what decided."""

    name: str
    keeps_task: bool
    """Whether it is within the tolerance of the task to be kept."""
    compared: tuple[str, ...]
    """All that were looked at for their drift: those within the tolerance."""
    tied: tuple[str, ...]
    """Of larger rank, or with both sides, and less drift: by no more than the seeds' scatter."""
    least: str
    """The one with the least drift among those that were compared."""
    noise: float | None
    """One standard error of the difference between its drift and the least one's; None: not known (single seeds)."""


def standard_error(first: Outcome, second: Outcome, pool: Sequence[Outcome]) -> float | None:
    """Standard error of the difference between two mean drifts, from the scatter of seeds pooled over `pool`; None if
    no combination has two seeds."""
    known = [(one.drift_sd, one.seeds - 1) for one in pool if one.drift_sd is not None and one.seeds > 1]
    if not known:
        return None
    variance = sum(sd**2 * free for sd, free in known) / sum(free for _, free in known)
    return math.sqrt(variance * (1 / first.seeds + 1 / second.seeds))


def recommend(outcomes: Sequence[Outcome], *, naive: float | None, tolerance: float) -> Choice | None:
    """The combination to use, by the rule at the top; None if none has finite figures.

    naive: its task, turned so that more is better; None: the best of all is in its place.
    """
    finite = [one for one in outcomes if math.isfinite(one.task) and math.isfinite(one.drift)]
    if not finite:
        return None
    best = max(one.task for one in finite)
    keeping = [one for one in finite if one.task >= (best if naive is None else naive) - tolerance]
    pool = keeping or [one for one in finite if one.task >= best - tolerance]
    least = min(pool, key=lambda one: (one.drift, -one.task, _size(one)))

    def near(one: Outcome) -> bool:
        noise = standard_error(one, least, pool)
        return one.drift - least.drift <= (noise or 0.0)

    chosen = min((one for one in pool if near(one)), key=_size)
    tied = tuple(one.name for one in pool if near(one) and one.drift < chosen.drift)
    return Choice(
        name=chosen.name,
        keeps_task=bool(keeping),
        compared=tuple(one.name for one in pool),
        tied=tied,
        least=least.name,
        noise=standard_error(chosen, least, pool),
    )


def _size(one: Outcome) -> tuple[int, bool, float]:
    return one.rank, one.side == "both", one.drift
