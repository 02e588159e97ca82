"""Mathematics of orthonormal columns: check, draw, join, compare. Plain tensors in, plain tensors out.

Legend: a subspace is a tensor (..., dim, k) with orthonormal columns; the leading axis, where there is one, counts
stacked experts.
"""

import hashlib
import math

import torch
from torch import Tensor

__all__ = [
    "DEPENDENCE_TOLERANCE",
    "ORTHONORMAL_TOLERANCE",
    "angles_between",
    "independent_columns",
    "orthonormal_error",
    "orthonormalise",
    "random_columns",
]

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest entry of |Q^T Q - I| that a basis may have: a hundred times what fp32 leaves, a tenth of what fp16 does."""

DEPENDENCE_TOLERANCE = 1e-3
"""A column whose part outside the span of the others is shorter than this adds no direction, only its rounding."""


def orthonormal_error(columns: Tensor) -> float:
    """Largest entry of |Q^T Q - I|, accumulated in fp64; 0.0 for an empty tensor."""
    if columns.numel() == 0:
        return 0.0
    wide = columns.double()
    gram = wide.mT @ wide
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().max().item()


def orthonormalise(columns: Tensor) -> Tensor:
    """Orthonormal columns of the same nested spans (..., dim, k), fp64: QR with the diagonal of R positive.

    The first j columns span what the first j given columns span, and an orthonormal input comes back as it is.
    """
    q, r = torch.linalg.qr(columns.double())
    signs = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return q * signs.unsqueeze(-2)


def random_columns(shape: tuple[int, ...], seed: int, key: str) -> Tensor:
    """A uniformly random subspace (..., dim, k) in fp32, fixed by seed and key alone.

    Every column has a generator of its own, so that the first j columns do not depend on k.
    """
    *rows, k = shape
    gaussian = torch.empty(*rows, k, dtype=torch.float64)
    for column in range(k):
        digest = hashlib.sha256(f"{seed}:{column}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        gaussian[..., column] = torch.randn(rows, generator=generator, dtype=torch.float64)
    return orthonormalise(gaussian).float()


def independent_columns(
    first: Tensor, second: Tensor, tolerance: float = DEPENDENCE_TOLERANCE
) -> tuple[Tensor, list[int]]:
    """What `second` (dim, k2) adds to the span of `first` (dim, k1): orthonormal columns, fp64, and which of its
    columns they came from.

    Gram-Schmidt in the order of `second`, each column swept twice; a column whose part outside of what is already
    there is shorter than `tolerance` (relative to its length) is dropped.
    """
    span = first.double()
    kept = []
    for index, column in enumerate(second.double().unbind(1)):
        length = column.norm()
        residual = column
        for _ in range(2):
            residual = residual - span @ (span.T @ residual)
        if residual.norm() > tolerance * length:
            span = torch.cat([span, (residual / residual.norm()).unsqueeze(1)], dim=1)
            kept.append(index)
    return span[:, first.shape[1] :], kept


def angles_between(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles in radians, ascending, fp64, (..., min(k1, k2)).

    Cosines (singular values of U1^T U2) lose half of the digits near 0, so angles below 45 degrees come from the sines:
    the singular values of (I - U1 U1^T) U2 (Bjorck and Golub, 1973).
    """
    wide, narrow = (first, second) if first.shape[-1] >= second.shape[-1] else (second, first)
    wide, narrow = orthonormalise(wide), orthonormalise(narrow)
    overlap = wide.mT @ narrow
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(narrow - wide @ overlap).flip(-1).clamp(max=1.0)
    return torch.where(cosines > math.sqrt(0.5), torch.asin(sines), torch.acos(cosines))
