"""Statistics against numbers worked out by hand."""

from itertools import product

import pytest

from grasp_dist.evaluation.statistics import (
    bootstrap_interval,
    compare,
    higher_is_worse,
    holm,
    paired_difference,
    remaining_shares,
    summarise,
)

BASE = {"w1": 0.1, "w2": 0.0}
NAIVE = {("w1", 0): 0.5, ("w1", 1): 0.6, ("w2", 0): 0.4}
ARM = {("w1", 0): 0.2, ("w1", 1): 0.15, ("w2", 0): 0.1}


def test_summary():
    found = summarise([1.0, 2.0, 4.0], worst_is_high=True)
    assert found == {"mean": pytest.approx(7 / 3), "sd": pytest.approx((7 / 3) ** 0.5), "worst": 4.0, "n": 3}
    assert summarise([1.0, 2.0], worst_is_high=False)["worst"] == 1.0
    assert summarise([1.0], worst_is_high=False)["sd"] is None


@pytest.mark.parametrize(
    ("role", "kind", "high"),
    [
        ("drift", "completion", True),
        ("drift", "pair", True),
        ("drift", "loss", False),
        ("task", "completion", False),
        ("task", "loss", True),
        ("retention", "kl", True),
        ("drift", "kl", True),
    ],
)
def test_the_worst_end(role, kind, high):
    assert higher_is_worse(role, kind) is high


def test_cut_of_means_and_mean_of_cuts():
    rows = remaining_shares(BASE, NAIVE, ARM)
    assert [row["remaining"] for row in rows] == pytest.approx([0.25, 0.1, 0.25])
    assert [row["cut"] for row in rows] == pytest.approx([4, 10, 4])
    found = compare(rows)
    # Drifts .4 + .5 + .4 = 1.3, left .1 + .05 + .1 = .25.
    assert found["cut"] == pytest.approx(1.3 / 0.25)
    assert found["remaining"] == pytest.approx(0.25 / 1.3)
    assert found["mean_of_cuts"] == pytest.approx(6)
    assert found["worst_cut"] == pytest.approx(4)
    low, high = found["interval"]["remaining"]
    assert 0.1 <= low < 0.25 / 1.3 < high <= 0.25 + 1e-9
    assert found["interval"]["cut"] == pytest.approx([1 / high, 1 / low])


def test_a_run_that_reaches_the_base_has_no_cut_but_counts():
    rows = remaining_shares(BASE, NAIVE, ARM | {("w2", 0): -0.02})
    assert rows[2]["cut"] is None
    assert rows[2]["remaining"] == pytest.approx(-0.05)
    found = compare(rows)
    assert found["mean_of_cuts"] is None
    assert found["cut"] == pytest.approx(1.3 / 0.13)
    assert found["worst"] == {"run": "w1", "seed": 0}


def test_a_run_without_naive_drift_is_left_out_and_counted():
    found = compare(remaining_shares(BASE, NAIVE | {("w2", 0): -0.1}, ARM))
    assert (found["n"], found["undrifted"]) == (2, 1)
    assert found["interval"] is None
    assert compare(remaining_shares({"w1": 0.5}, {("w1", 0): 0.5}, {("w1", 0): 0.5})) is None


def test_drift_downwards_is_measured_downwards():
    rows = remaining_shares({"w": 2.0}, {("w", 0): 1.0}, {("w", 0): 1.75})
    assert compare(rows)["cut"] == pytest.approx(4)


def test_units_without_a_partner_are_left_out():
    assert remaining_shares(BASE, NAIVE, {("w3", 0): 0.1, ("w1", 9): 0.2}) == []


def test_bootstrap_resamples_runs_not_only_rows():
    """Within runs nothing varies: only resampling of runs can give an interval, and it reaches both of them."""
    assert bootstrap_interval(["a"] * 8 + ["b"] * 8, [0.0] * 8 + [1.0] * 8) == [0.0, 1.0]


def test_bootstrap_of_a_mean_is_about_two_standard_errors():
    values = [float(i) for i in range(40)]
    low, high = bootstrap_interval(["a"] * 40, values)
    error = (sum((value - 19.5) ** 2 for value in values) / 40) ** 0.5 / 40**0.5
    assert (low, high) == pytest.approx((19.5 - 1.96 * error, 19.5 + 1.96 * error), rel=0.03)


def test_bootstrap_of_a_ratio_is_one_where_numerator_and_denominator_agree():
    assert bootstrap_interval(["a", "a", "b"], [1.0, 2.0, 5.0], [1.0, 2.0, 5.0]) == pytest.approx([1, 1])


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3], [1.0, -0.5, 0.25, 2.0, 0.1], [0.3, -0.3], [0.1] * 10])
def test_paired_differences_against_every_flip_of_their_signs(values):
    one = {("w", seed): 5.0 + value for seed, value in enumerate(values)}
    other = {("w", seed): 5.0 for seed in range(len(values))} | {("elsewhere", 0): 1.0}
    found = paired_difference(one, other)
    seen = abs(sum(values))
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    assert found["p"] == pytest.approx(sum(flip >= seen - 1e-9 for flip in flips) / len(flips))
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    assert found["n"] == len(values)
    assert (found["interval"] is None) == (len(values) < 3)


def test_pairs_that_do_not_differ_or_are_not_there():
    assert paired_difference({("w", 0): 1.0}, {("v", 0): 1.0}) is None
    assert paired_difference({("w", 0): 1.0, ("w", 1): 2.0}, {("w", 0): 1.0, ("w", 1): 2.0})["p"] == 1.0
    assert paired_difference({("w", 0): 1.0}, {("w", 0): 0.0})["p"] == 1.0


def test_holm_by_hand():
    # .01 x 4, then .02 x 3, then .03 x 2 = .06 again, and .5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []
