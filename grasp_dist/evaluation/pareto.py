"""Which of several models no other one beats, in two measures at once. Ours: Ray and Optuna name none for such."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["pareto_front"]


def pareto_front(task: Sequence[float], drift: Sequence[float]) -> np.ndarray:
    """Which points no other point dominates: (n,) of bool.

    A point dominates another if its task is not less and its drift not more, and one of both is better. Equal points
    are all on the front, or none is. A point with a NaN or an infinity is on no front and dominates nothing.
    """
    up, down = np.asarray(task, dtype=float), np.asarray(drift, dtype=float)
    if up.shape != down.shape or up.ndim != 1:
        raise ValueError(f"task and drift must be two lists of one length, got {up.shape} and {down.shape}")
    finite = np.isfinite(up) & np.isfinite(down)
    front = np.zeros(up.shape, dtype=bool)
    if not finite.any():
        return front
    # Per distinct task the least drift there, and the least of all better tasks.
    values, group = np.unique(up[finite], return_inverse=True)
    least = np.full(values.shape, np.inf)
    np.minimum.at(least, group, down[finite])
    better = np.append(np.minimum.accumulate(least[::-1])[::-1][1:], np.inf)
    front[finite] = (down[finite] == least[group]) & (down[finite] < better[group])
    return front
