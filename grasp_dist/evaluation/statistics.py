"""Means, spread and drift cuts over runs and fine-tune seeds. Plain numbers in and out; ours, except where named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "Key",
    "bootstrap_interval",
    "compare",
    "estimate",
    "higher_is_worse",
    "holm",
    "paired_difference",
    "remaining_shares",
    "summarise",
]

Key = tuple[str, int]
"""(run, fine-tune seed): one unit of replication."""

RESAMPLES = 4000
LEVEL = 0.95


def higher_is_worse(role: str, kind: str) -> bool:
    """Which end of a probe's values is the worst: for drift the most factor-consistent, else the least that is kept."""
    lower_is_more = kind == "loss"
    if kind == "kl":
        return True
    return not lower_is_more if role == "drift" else lower_is_more


def summarise(values: Sequence[float], *, worst_is_high: bool) -> dict[str, Any]:
    """{"mean", "sd" (n - 1 in the denominator; None for one value), "worst", "n"}."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "worst": max(values) if worst_is_high else min(values),
        "n": len(values),
    }


def estimate(found: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """{"mean", "interval" (95 % bootstrap; None below three), "n"} of a figure, (run, value) for each fine-tune."""
    runs, values = zip(*found, strict=True)
    return {"mean": statistics.fmean(values), "interval": bootstrap_interval(runs, values), "n": len(values)}


def remaining_shares(
    base: Mapping[str, float], naive: Mapping[Key, float], arm: Mapping[Key, float]
) -> list[dict[str, Any]]:
    """Per run and seed that has all three: {"run", "seed", "base", "naive", "arm", "remaining", "cut"}.

    remaining = (arm - base) / (naive - base): 1 is as naive, 0 as the base, below 0 beyond it. cut = 1 / remaining,
    None where nothing remains (<= 0). Both are None where naive did not drift to the side of the mean naive drift.
    """
    keys = sorted(key for key in arm if key in naive and key[0] in base)
    if not keys:
        return []
    side = math.copysign(1.0, statistics.fmean(naive[key] - base[key[0]] for key in keys))
    rows = []
    for run, seed in keys:
        drift, left = naive[run, seed] - base[run], arm[run, seed] - base[run]
        remaining = left / drift if drift * side > 0 else None
        cut = 1 / remaining if remaining is not None and remaining > 0 else None
        rows.append(
            {
                "run": run,
                "seed": seed,
                "base": base[run],
                "naive": naive[run, seed],
                "arm": arm[run, seed],
                "remaining": remaining,
                "cut": cut,
            }
        )
    return rows


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What `remaining_shares` says in sum; None for no rows.

    "remaining" and "cut": of the means, sum(naive - base) / sum(arm - base), the figure to quote. "mean_of_cuts": the
    mean of the single cuts, which one lucky run dominates; None if any run has no finite cut. "worst_remaining",
    "worst_cut" and "worst" (run, seed): the run with the most left. "interval": 95 % bootstrap of "remaining" and
    "cut", None below three runs and seeds. "undrifted": runs that are left out because naive did not drift.
    """
    valid = [row for row in rows if row["remaining"] is not None]
    if not valid:
        return None
    left = [row["arm"] - row["base"] for row in valid]
    drift = [row["naive"] - row["base"] for row in valid]
    remaining = sum(left) / sum(drift)
    cuts = [row["cut"] for row in valid]
    worst = max(valid, key=lambda row: row["remaining"])
    low_high = bootstrap_interval([row["run"] for row in valid], left, drift)
    return {
        "n": len(valid),
        "undrifted": len(rows) - len(valid),
        "remaining": remaining,
        "cut": 1 / remaining if remaining > 0 else None,
        "mean_of_cuts": statistics.fmean(cuts) if all(cut is not None for cut in cuts) else None,
        "worst_remaining": worst["remaining"],
        "worst_cut": worst["cut"],
        "worst": {"run": worst["run"], "seed": worst["seed"]},
        "interval": low_high and {"remaining": low_high, "cut": [1 / x if x > 0 else None for x in reversed(low_high)]},
    }


def bootstrap_interval(
    runs: Sequence[str], numerator: Sequence[float], denominator: Sequence[float] | None = None
) -> list[float] | None:
    """95 % percentile interval of sum(numerator) / sum(denominator) (default: of the mean), an entry per run and seed.

    Runs are resampled, then the seeds within each (the two-stage cluster bootstrap of Davison and Hinkley, 1997,
    section 3.8). None below three entries: two say nothing about spread. Fixed seed.
    """
    if len(runs) < 3:
        return None
    import numpy as np

    generator = np.random.default_rng(0)
    groups = [[place for place, run in enumerate(runs) if run == name] for name in dict.fromkeys(runs)]
    drawn = generator.multinomial(len(groups), [1 / len(groups)] * len(groups), size=RESAMPLES)
    times = np.zeros((RESAMPLES, len(runs)))
    for group, count in zip(groups, drawn.T, strict=True):
        times[:, group] = generator.multinomial(count * len(group), [1 / len(group)] * len(group))
    below = times @ np.asarray([1.0] * len(runs) if denominator is None else denominator)
    low, high = np.quantile(times @ np.asarray(numerator) / below, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def paired_difference(one: Mapping[Key, float], other: Mapping[Key, float]) -> dict[str, Any] | None:
    """{"n", "mean", "interval", "p"} of one - other over the runs and seeds that both have; None if there are none.

    interval: 95 % bootstrap, None below three. p: that of the two-sided sign-flip test, which takes each pair's sign as
    a coin's under the null; exact for up to 13 pairs. It cannot be below 2 / 2^n: three pairs say .25 at best.
    """
    keys = sorted(one.keys() & other.keys())
    if not keys:
        return None
    from scipy.stats import permutation_test

    differences = [one[key] - other[key] for key in keys]
    p = 1.0
    if len(keys) > 1 and any(differences):
        found = permutation_test(
            (differences,),
            lambda sample, axis: sample.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=0,
        )
        p = float(found.pvalue)
    return {
        "n": len(keys),
        "mean": statistics.fmean(differences),
        "interval": bootstrap_interval([run for run, _ in keys], differences),
        "p": p,
    }


def holm(values: Sequence[float]) -> list[float]:
    """p-values, each raised so that the chance of any false finding among all of them is bounded (Holm, 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
