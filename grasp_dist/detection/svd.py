"""SVD of a low-rank update from its factors, and what its spectrum says. No (out, in) matrix is ever formed.

Legend: A (r, in), B (out, r), the update dW = s B A (out, in), m = min(r, out, in).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "low_rank_svd", "numerical_rank", "spectrum"]

NUMERICAL_RANK = 1e-6
"""Singular values below this share of the largest are rounding of fp32 factors: their vectors mean nothing."""


@dataclass(frozen=True)
class Spectrum:
    """How concentrated an update is.

    `leading`: share of the energy (squared singular values) in the first direction. `stable_rank`:
    |dW|_F^2 / s_1^2. `effective_rank`: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
    """

    norm: float
    leading: float
    stable_rank: float
    effective_rank: float


def low_rank_svd(A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, m), S (m,) descending, V (in, m) with scale * B @ A = U diag(S) V^T, all fp64 on the CPU.

    B = Q_B R_B and A^T = Q_A R_A by QR; the core scale * R_B R_A^T by SVD; both rotated back. The entry of largest
    magnitude in each column of U is positive, so equal factors give equal vectors. Ours (standard technique).
    """
    q_b, r_b = torch.linalg.qr(B.detach().cpu().double())
    q_a, r_a = torch.linalg.qr(A.detach().cpu().double().mT)
    left, values, right = torch.linalg.svd(scale * r_b @ r_a.mT, full_matrices=False)
    left, right = q_b @ left, q_a @ right.mT
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(left)
    return left * signs, values, right * signs


def numerical_rank(values: Tensor) -> int:
    """How many singular values stand out of the rounding; 0 for an update that is zero."""
    if values.numel() == 0 or not values[0] > 0:
        return 0
    return int((values > NUMERICAL_RANK * values[0]).sum())


def spectrum(values: Tensor) -> Spectrum:
    """Statistics of singular values (k,), in any order; zeros for an update that is zero."""
    values = values.double()
    energy = values.square()
    total, largest = energy.sum().item(), energy.max().item()
    if total == 0:
        return Spectrum(0.0, 0.0, 0.0, 0.0)
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Spectrum(total**0.5, largest / total, total / largest, entropy.exp().item())
