"""The Pareto front against a brute-force one, and the recommendation's rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_dist.evaluation.pareto import pareto_front
from grasp_dist.launch.sweep.pareto import Outcome, recommend, standard_error

# A few values, so that ties are common, and everything that a float can be.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, math.nan, math.inf, -math.inf]),
    st.floats(allow_nan=True, allow_infinity=True),
)


def brute_force(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Every point against every other, as the definition says."""

    def usable(point: tuple[float, float]) -> bool:
        return all(math.isfinite(value) for value in point)

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] <= other[1] and (one[0] > other[0] or one[1] < other[1])

    return [
        usable(point) and not any(usable(other) and dominates(other, point) for other in points) for point in points
    ]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(values, values), max_size=40))
def test_the_front_is_that_of_brute_force(points):
    front = pareto_front([task for task, _ in points], [drift for _, drift in points])
    assert front.tolist() == brute_force(points)


@settings(deadline=None)
@given(st.lists(st.tuples(values, values), max_size=20), st.randoms())
def test_the_front_does_not_depend_on_the_order(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    shuffled = pareto_front([points[i][0] for i in order], [points[i][1] for i in order])
    front = pareto_front([task for task, _ in points], [drift for _, drift in points])
    assert shuffled.tolist() == [bool(front[i]) for i in order]


def test_equal_points_are_all_on_the_front():
    assert pareto_front([1, 1, 0, 0], [1, 1, 0, 2]).tolist() == [True, True, True, False]


def test_many_points_at_once():
    generator = np.random.default_rng(0)
    task, drift = generator.integers(0, 60, (2, 600))
    assert pareto_front(task, drift).tolist() == brute_force(list(zip(task, drift, strict=True)))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        pareto_front([1, 2], [1])


def outcome(side: str, rank: int, task: float, drift: float, sd: float | None = None, seeds: int = 3) -> Outcome:
    return Outcome(f"{side}-k{rank}", side, rank, task, drift, seeds, sd)


def test_the_smallest_rank_within_the_seeds_scatter_of_the_least_drift():
    outcomes = [
        outcome("write", 1, 0.99, 0.50, 0.03),
        outcome("write", 4, 0.985, 0.06, 0.03),
        outcome("write", 8, 0.984, 0.05, 0.03),
        outcome("write", 16, 0.98, 0.04, 0.03),
    ]
    choice = recommend(outcomes, naive=0.99, tolerance=0.02)
    assert choice is not None
    assert choice.noise == pytest.approx(0.03 * math.sqrt(2 / 3))
    assert (choice.name, choice.least, choice.tied) == ("write-k4", "write-k16", ("write-k8", "write-k16"))
    # With less scatter the same means differ.
    calm = recommend([outcome(o.side, o.rank, o.task, o.drift, 0.001) for o in outcomes], naive=0.99, tolerance=0.02)
    assert calm is not None
    assert (calm.name, calm.tied) == ("write-k16", ())


def test_the_task_comes_first():
    outcomes = [outcome("write", 4, 0.98, 0.2, 0.01), outcome("write", 8, 0.90, 0.01, 0.01)]
    choice = recommend(outcomes, naive=0.99, tolerance=0.02)
    assert choice is not None
    assert (choice.name, choice.keeps_task) == ("write-k4", True)
    lost = recommend(outcomes, naive=1.5, tolerance=0.02)
    assert lost is not None
    assert (lost.name, lost.keeps_task) == ("write-k4", False)


def test_one_side_comes_before_both_and_noise_on_the_task_does_not_choose_the_larger_rank():
    equal = [outcome("both", 4, 0.98, 0.1), outcome("write", 4, 0.98, 0.1)]
    choice = recommend(equal, naive=0.98, tolerance=0.0)
    assert choice is not None
    assert choice.name == "write-k4"
    plateau = [outcome("write", 2, 0.9800, 0.0502, 0.02), outcome("write", 16, 0.9801, 0.0500, 0.02)]
    choice = recommend(plateau, naive=0.98, tolerance=0.02)
    assert choice is not None
    assert (choice.name, choice.tied) == ("write-k2", ("write-k16",))
    apart = [outcome("write", 2, 0.9800, 0.0502, 1e-5), outcome("write", 16, 0.9801, 0.0500, 1e-5)]
    choice = recommend(apart, naive=0.98, tolerance=0.02)
    assert choice is not None
    assert (choice.name, choice.tied) == ("write-k16", ())


def test_single_seeds_and_missing_figures():
    outcomes = [
        outcome("write", 1, 0.99, 0.11, seeds=1),
        outcome("write", 2, 0.98, 0.1, seeds=1),
        outcome("write", 4, math.nan, 0.0, seeds=1),
        outcome("write", 8, 0.99, math.nan, seeds=1),
    ]
    choice = recommend(outcomes, naive=0.99, tolerance=0.02)
    assert choice is not None
    assert (choice.name, choice.noise) == ("write-k2", None)
    assert recommend(outcomes[2:], naive=0.99, tolerance=0.02) is None
    assert recommend([], naive=None, tolerance=0.02) is None
    without_naive = recommend(outcomes, naive=None, tolerance=0.0)
    assert without_naive is not None
    assert without_naive.name == "write-k1"


def test_scatter_is_pooled_by_degrees_of_freedom():
    two, five = outcome("write", 1, 1, 0, 0.1, seeds=2), outcome("write", 2, 1, 0, 0.2, seeds=5)
    pooled = (0.1**2 * 1 + 0.2**2 * 4) / 5
    assert standard_error(two, five, [two, five]) == pytest.approx(math.sqrt(pooled * (1 / 2 + 1 / 5)))
