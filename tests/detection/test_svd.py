"""The factored SVD against torch.linalg.svd of the dense update; the spectrum's statistics against known answers."""

import math
import time

import pytest
import torch
from largest_tensor import LargestTensor

from grasp_dist.detection.svd import low_rank_svd, numerical_rank, spectrum


def _factors(out: int, into: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, into, generator=generator, dtype=torch.float64)
    return a, torch.randn(out, r, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("out", "into", "r"), [(17, 11, 3), (11, 17, 1), (6, 40, 9), (40, 6, 9), (5, 5, 5)])
def test_against_the_dense_svd(out: int, into: int, r: int) -> None:
    a, b = _factors(out, into, r)
    left, values, right = low_rank_svd(a, b, -0.7)
    m = min(out, into, r)
    assert (left.shape, values.shape, right.shape) == ((out, m), (m,), (into, m))
    dense = -0.7 * b @ a
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    assert torch.allclose(values, s[:m], rtol=1e-12)
    assert torch.allclose(left @ torch.diag(values) @ right.T, dense, atol=1e-12)
    for found, expected in ((left, u), (right, vh.T)):
        assert torch.allclose((found * expected[:, :m]).sum(0).abs(), torch.ones(m).double(), atol=1e-10)


def test_signs_are_fixed_by_the_largest_entry_and_independent_of_the_factorisation() -> None:
    a, b = _factors(13, 9, 3)
    left, _, right = low_rank_svd(a, b)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    same_left, _, same_right = low_rank_svd(torch.linalg.solve(mix, a), b @ mix)
    assert torch.allclose(left, same_left, atol=1e-10)
    assert torch.allclose(right, same_right, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_widened_before_the_arithmetic(dtype: torch.dtype) -> None:
    a, b = (factor.to(dtype) for factor in _factors(20, 15, 4))
    _, values, _ = low_rank_svd(a, b)
    assert values.dtype == torch.float64
    assert torch.allclose(values, torch.linalg.svdvals(b.double() @ a.double())[:4], rtol=1e-12)


def test_no_matrix_of_the_weights_size_is_made() -> None:
    out, into, r = 600, 500, 4
    a, b = _factors(out, into, r)
    with LargestTensor() as seen:
        low_rank_svd(a, b, 2.0)
    assert 0 < seen.nbytes <= 8 * r * max(out, into)
    with LargestTensor() as seen:
        torch.linalg.svdvals(b @ a)
    assert seen.nbytes >= 8 * out * into  # the mode does see what is made


def test_numerical_rank() -> None:
    a, b = _factors(30, 20, 6)
    b[:, 4:] = b[:, :2]
    assert numerical_rank(low_rank_svd(a, b)[1]) == 4
    assert numerical_rank(low_rank_svd(a, torch.zeros_like(b))[1]) == 0
    assert numerical_rank(torch.empty(0)) == 0


def test_spectrum_of_known_values() -> None:
    flat = spectrum(torch.full((5,), 2.0))
    assert (flat.leading, flat.stable_rank) == (0.2, 5.0)
    assert flat.effective_rank == pytest.approx(5.0)
    assert flat.norm == pytest.approx(math.sqrt(20))
    single = spectrum(torch.tensor([3.0, 0.0]))
    assert (single.leading, single.stable_rank, single.effective_rank) == (1.0, 1.0, 1.0)
    two = spectrum(torch.tensor([3.0, 1.0]))
    assert two.leading == pytest.approx(0.9)
    assert two.stable_rank == pytest.approx(10 / 9)
    assert two.effective_rank == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert spectrum(torch.zeros(3)).norm == 0.0


@pytest.mark.slow
def test_a_hundred_times_faster_than_the_dense_svd() -> None:
    """At half of a 7B model's width, where the advantage is a quarter; benchmarks/detection.py has the full size."""
    a, b = (factor.float() for factor in _factors(2048, 2048, 32))
    low_rank_svd(a, b)
    start = time.perf_counter()
    for _ in range(10):
        low_rank_svd(a, b)
    factored = (time.perf_counter() - start) / 10
    start = time.perf_counter()
    torch.linalg.svd(b @ a, full_matrices=False)
    assert time.perf_counter() - start > 100 * factored
