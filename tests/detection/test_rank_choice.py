"""Rules for the number of directions, on spectra and factors whose answer is known."""

import pytest
import torch
from planted import generator

from grasp_dist.detection.adapter import LowRankUpdate
from grasp_dist.detection.rank_choice import above_null, choose_rank, hard_threshold, sign_flip_null, spectral_gap
from grasp_dist.detection.svd import low_rank_svd
from grasp_dist.errors import InputError


def _update(strengths: list[float], seed: int, *, rank: int = 16, out: int = 300, into: int = 200) -> LowRankUpdate:
    """White noise in B (singular values near 1), plus directions that all columns of B share in different mixtures."""
    noise = generator(seed)
    a = torch.linalg.qr(torch.randn(into, rank, generator=noise))[0].mT
    b = torch.randn(out, rank, generator=noise) / out**0.5
    left = torch.linalg.qr(torch.randn(out, len(strengths) or 1, generator=noise))[0]
    mixture = torch.linalg.qr(torch.randn(rank, len(strengths) or 1, generator=noise))[0]
    for place, strength in enumerate(strengths):
        b = b + strength * torch.outer(left[:, place], mixture[:, place])
    return LowRankUpdate(a, b, 1.0, False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9.0, 8.0, 1.0, 0.9], 2),
        ([5.0, 1.0], 1),
        ([3.0, 2.0, 0.0, 0.0], 2),
        ([1.0], 1),
        ([0.0, 0.0], 0),
        ([2.0, 1.9], 1),
    ],
)
def test_spectral_gap(values: list[float], expected: int) -> None:
    assert spectral_gap(torch.tensor(values)) == expected


def test_hard_threshold_is_the_papers() -> None:
    """2.858 times the median for a square matrix; the cubic fit is off by 0.02 at most (Gavish and Donoho, figure)."""
    values = torch.tensor([2.9, 2.84, 1.0, 1.0, 1.0, 0.5, 0.5])
    assert hard_threshold(values, 1.0) == 1
    with pytest.raises(InputError, match="beta"):
        hard_threshold(values, 1.5)


@pytest.mark.parametrize("strengths", [[], [4.0], [5.0, 4.0, 3.0]])
@pytest.mark.parametrize("rule", ["gavish_donoho", "parallel"])
def test_planted_ranks_are_found(rule: str, strengths: list[float]) -> None:
    found = [choose_rank(_update(strengths, seed), rule) for seed in range(10)]
    assert sum(count == len(strengths) for count in found) >= 9


def test_the_sign_flip_null_keeps_magnitudes_and_scale() -> None:
    update = _update([6.0], 1)
    null = sign_flip_null(update, draws=5, seed=3)
    assert torch.equal(null, sign_flip_null(update, draws=5, seed=3))
    assert not torch.equal(null, sign_flip_null(update, draws=5, seed=4))
    # A has orthonormal rows here, so that flips keep the norm.
    norms = null.square().sum(dim=1).sqrt()
    assert norms.allclose(update.B.double().norm(), rtol=1e-5)
    doubled = LowRankUpdate(update.A, update.B, 2.0, False)
    assert sign_flip_null(doubled, draws=5, seed=3).allclose(2 * null)
    _, values, _ = low_rank_svd(update.A, update.B)
    assert values[0] > 1.5 * null[:, 0].max()


def test_counting_ends_at_the_first_that_does_not_stand_out() -> None:
    null = torch.ones(20, 4, dtype=torch.float64)
    assert above_null(torch.tensor([3.0, 2.0, 0.5, 2.0]), null) == 2
    assert above_null(torch.tensor([0.5, 0.4, 0.3, 0.2]), null) == 0


def test_agreement_of_runs() -> None:
    first, second = _update([], 1, rank=4), _update([], 2, rank=6)
    shared = torch.linalg.qr(torch.randn(300, 2, generator=generator(9)))[0]
    assert choose_rank([first, second], "agreement") == 0
    for update in (first, second):
        update.B[:, :2] += 8 * shared
    assert choose_rank([first, second], "agreement") == 2


def test_counts_and_what_is_refused() -> None:
    update = _update([3.0], 1, rank=4)
    assert choose_rank(update, 2) == 2
    assert choose_rank(update, 9) == 4
    with pytest.raises(InputError, match="'agreement' needs the updates of two or more runs, not 1"):
        choose_rank(update, "agreement")
    with pytest.raises(InputError, match="'gap' is for one update, not 2"):
        choose_rank([update, update], "gap")
    with pytest.raises(InputError, match="rank True"):
        choose_rank(update, True)
    with pytest.raises(InputError, match="'elbow' is not a count"):
        choose_rank(update, "elbow")
