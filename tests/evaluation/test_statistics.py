"""Statistics against numbers worked out by hand."""

import pytest

from grasp_dist.evaluation.statistics import bootstrap_interval, compare, higher_is_worse, remaining_shares, summarise

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
