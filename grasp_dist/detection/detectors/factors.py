"""The updates of a run as singular vectors and values, weight by weight.

Legend: dW = U diag(S) V^T of (out, in), m singular values above the numerical rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.svd import NUMERICAL_RANK, low_rank_svd, numerical_rank
from grasp_dist.errors import InputError

__all__ = ["Factors", "energy_shares", "factorise"]


@dataclass(frozen=True)
class Factors:
    """U (out, m), S (m,) descending, V (in, m), fp64."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def energy(self) -> float:
        """|dW|_F^2."""
        return self.values.square().sum().item()

    def vectors(self, side: str) -> Tensor:
        """U for "write", V for "read"."""
        return self.left if side == "write" else self.right

    def captured(self, columns: Tensor, side: str) -> float:
        """|Q^T dW|_F^2 (write) or |dW Q|_F^2 (read) of orthonormal columns Q (dim, k)."""
        return (self.values.unsqueeze(1) * (self.vectors(side).mT @ columns.double())).square().sum().item()


def factorise(run: AdapterUpdate) -> dict[str, Factors]:
    """The SVD of every weight's update, without what is rounding: next to the weight's own largest singular value, and
    next to the largest of all weights. Raises `InputError` if nothing is left."""
    found = {}
    for name, update in run.weights.items():
        left, values, right = low_rank_svd(update.A, update.B, update.scale)
        keep = numerical_rank(values)
        found[name] = Factors(left[:, :keep], values[:keep], right[:, :keep])
    largest = max((one.values[0].item() for one in found.values() if one.values.numel()), default=0.0)
    kept = {n: one for n, one in found.items() if one.values.numel() and one.values[0] > NUMERICAL_RANK * largest}
    if not kept:
        raise InputError("the adapter changed no weight; train it longer")
    return kept


def energy_shares(factors: Mapping[str, Factors]) -> dict[str, float]:
    """Each weight's share of |dW|_F^2 over all weights."""
    total = torch.tensor([one.energy for one in factors.values()]).sum().item()
    return {name: one.energy / total for name, one in factors.items()}
