"""Directions that several subspaces share, against what chance gives. Ours.

Legend: R subspaces of (dim, k_i) orthonormal columns, K = k_1 + .. + k_R.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_dist.detection.signs import fix_signs
from grasp_dist.errors import InputError

__all__ = ["Shared", "shared_directions"]

# Null draws: at least so many in all, and so many that are expected beyond the threshold.
_DRAWS, _BEYOND = 10_000, 5
_BATCH = 4096


@dataclass(frozen=True)
class Shared:
    """`directions`: (dim, num_shared) orthonormal, fp64, closest first. `agreement`: (min(K, dim),) mean squared
    cosine of every pooled direction to the R subspaces, descending; (1 + cos) / 2 of the principal angles where R is 2.
    `threshold`: what the largest agreement of random subspaces exceeds with probability `level`."""

    directions: Tensor
    agreement: Tensor
    threshold: float

    @property
    def num_shared(self) -> int:
        return self.directions.shape[1]


def shared_directions(subspaces: Sequence[Tensor], *, level: float = 0.05, num_tests: int = 1, seed: int = 0) -> Shared:
    """The leading eigenvectors of the mean projector of two or more subspaces whose agreement is beyond chance.

    The null: subspaces of the same dimensions drawn at random, independently. Every direction is held against the
    null's *largest* agreement, so `level` bounds the chance of any false direction in this test, and num_tests divides
    it further (Bonferroni). A Monte Carlo test: 1 + the number of draws as extreme, over 1 + all draws, is exact.

    Raises `InputError` for fewer than two subspaces, other dimensions, or subspaces that fill the space, which agree
    whatever they are.
    """
    dims = {subspace.shape[0] for subspace in subspaces}
    if len(subspaces) < 2 or len(dims) != 1:
        raise InputError(f"two or more subspaces of one space are compared, not {[tuple(u.shape) for u in subspaces]}")
    (dim,) = dims
    sizes = tuple(subspace.shape[1] for subspace in subspaces)
    if sum(sizes) > dim:
        raise InputError(
            f"subspaces of {sizes} directions in {dim} dimensions meet by necessity; compare at most {dim} in all"
        )
    stacked = torch.cat([subspace.detach().cpu().double() for subspace in subspaces], dim=1)
    left, values, _ = torch.linalg.svd(stacked / math.sqrt(len(subspaces)), full_matrices=False)
    agreement = values.square()
    draws = max(_DRAWS, math.ceil(_BEYOND * num_tests / level)) - 1
    beyond = int(level / num_tests * (draws + 1) * (1 + 1e-12))
    threshold = float(_largest_null(dim, sizes, draws, seed)[-beyond])
    keep = int((agreement > threshold).sum())
    return Shared(fix_signs(left[:, :keep]), agreement, threshold)


@functools.lru_cache(maxsize=64)
def _largest_null(dim: int, sizes: tuple[int, ...], draws: int, seed: int) -> Tensor:
    """The largest agreement of random subspaces, (draws,) ascending.

    Up to a rotation, Gaussian (dim, K) columns are the triangular factor of their QR, whose entries are known:
    standard normal above the diagonal, chi of dim - i degrees on it (Bartlett, 1933). So no draw is of size dim.
    """
    total = sum(sizes)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        degrees = (dim - torch.arange(total)).double()
        for start in range(0, draws, _BATCH):
            count = min(_BATCH, draws - start)
            upper = torch.randn(count, total, total, dtype=torch.float64).triu(1)
            upper += torch.diag_embed(torch.distributions.Chi2(degrees).sample((count,)).sqrt())
            gram = upper.mT @ upper
            # Orthonormal columns within each subspace: its own block becomes the identity.
            for place, size in zip(starts, sizes, strict=True):
                own = slice(place, place + size)
                lower = torch.linalg.cholesky(gram[:, own, own])
                gram[:, own] = torch.linalg.solve_triangular(lower, gram[:, own], upper=False)
                gram[:, :, own] = gram[:, own].mT
                gram[:, own, own] = torch.eye(size, dtype=gram.dtype)
            found.append(torch.linalg.eigvalsh(gram)[:, -1] / len(sizes))
    return torch.cat(found).sort().values
