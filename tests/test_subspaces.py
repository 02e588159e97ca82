"""Orthonormal columns against dense fp64 linear algebra and known answers."""

import math

import pytest
import torch

from grasp_dist.subspaces import (
    angles_between,
    independent_columns,
    orthonormal_error,
    orthonormalise,
    random_columns,
)


def _columns(dim: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, k, generator=generator, dtype=torch.float64)


def test_orthonormalise_keeps_nested_spans_and_what_is_orthonormal_already() -> None:
    given = _columns(11, 4, seed=0)
    found = orthonormalise(given)
    assert orthonormal_error(found) < 1e-14
    for j in range(1, 5):
        projected = found[:, :j] @ (found[:, :j].T @ given[:, :j])
        assert torch.allclose(projected, given[:, :j], atol=1e-13)
    assert torch.allclose(orthonormalise(found), found, atol=1e-14)


@pytest.mark.parametrize("angle", [1e-8, 1e-5, 1e-3, 0.1, 0.7, math.pi / 4, 0.8, 1.5, math.pi / 2])
def test_known_angles(angle: float) -> None:
    """One plane shared, one direction turned by a known angle; cosines alone would lose 1e-8 altogether."""
    frame = orthonormalise(_columns(9, 4, seed=1))
    first = frame[:, :2]
    second = torch.stack([frame[:, 0], math.cos(angle) * frame[:, 1] + math.sin(angle) * frame[:, 2]], dim=1)
    found = angles_between(first, second)
    assert found[0] < 1e-14
    assert found[1].item() == pytest.approx(angle, rel=1e-6, abs=1e-15)
    assert torch.allclose(angles_between(second, first), found, rtol=1e-6, atol=1e-14)


def test_angles_of_different_ranks_against_the_projectors() -> None:
    first, second = orthonormalise(_columns(10, 5, seed=2)), orthonormalise(_columns(10, 3, seed=3))
    found = angles_between(first, second)
    expected = torch.linalg.svdvals(first @ first.T @ second @ second.T)[:3].clamp(max=1).acos()
    assert found.shape == (3,)
    assert torch.allclose(found, expected, atol=1e-7)


def test_independent_columns_adds_only_what_is_new() -> None:
    first = orthonormalise(_columns(12, 3, seed=4))
    fresh = _columns(12, 1, seed=5)
    second = torch.cat([first[:, :1] + 1e-5 * fresh, 7 * fresh, fresh - first[:, 1:2]], dim=1)
    added, kept = independent_columns(first, second, tolerance=1e-3)
    assert kept == [1]  # the first is in the span but for 1e-5, the third follows from the second
    joined = torch.cat([first, added], dim=1)
    assert orthonormal_error(joined) < 1e-13
    assert torch.linalg.matrix_rank(torch.cat([joined, fresh], dim=1)) == 4


def test_random_columns_depend_on_seed_and_key_and_nest() -> None:
    wide = random_columns((30, 6), 5, "a")
    assert torch.allclose(wide[:, :3], random_columns((30, 3), 5, "a"), atol=1e-6)
    assert orthonormal_error(wide) < 1e-6
    assert not torch.allclose(wide, random_columns((30, 6), 5, "b"))
    assert not torch.allclose(wide, random_columns((30, 6), 6, "a"))
    assert orthonormal_error(random_columns((3, 8, 2), 0, "stacked")) < 1e-6


def test_random_columns_are_uniform() -> None:
    """E[q q^T] = I / dim for a uniform direction: no preferred axis."""
    mean = sum(column @ column.T for column in (random_columns((4, 1), s, "k") for s in range(600))) / 600
    assert torch.allclose(mean, torch.eye(4) / 4, atol=0.05)
