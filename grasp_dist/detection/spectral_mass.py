"""How much of a direction lies in any one singular vector of a large matrix, bounded without its SVD. Ours.

For a unit vector u the squared cosines with the left singular vectors of W are the atoms of the spectral measure of
W W^T at u. After n Lanczos steps from u no atom at x is larger than the Christoffel function there,
lambda_n(x) = 1 / (p_0(x)^2 + .. + p_{n-1}(x)^2), p_j the orthonormal polynomials of the measure (Szego, 1939, section
3.4; Golub and Meurant, 2010, chapter 4). So its largest value over the spectrum bounds the largest squared cosine. It
is looked for at the nodes and at seven points between any two, which has cost it 0.001 at most where it was tried.

A tall W has a null space, one large atom at 0 of no singular vector: there Lanczos runs on W^T W from W^T u instead,
whose atoms are sigma^2 cos^2, and the bound is divided by x.

Legend: W (out, in), fp64; k vectors at once; n steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_cosines"]

_EXHAUSTED = 1e-10
# Where between two nodes the bound is looked at.
_FRACTIONS = torch.arange(1, 8) / 8
# Singular vectors of a tall W below this share of its largest singular value are not looked for.
_FLOOR = 1e-2


def largest_cosines(weight: Tensor, columns: Tensor, *, steps: int = 32) -> Tensor:
    """(k,) fp64: for each unit column of (out, k), at least the largest |cosine| with any left singular vector of the
    weight, and equal to it once steps reach the shorter side (up to vectors of equal singular values, which count as
    one). The bound is loose where many vectors of nearly equal singular values share a column."""
    tall = weight.shape[0] > weight.shape[1]
    start = weight.mT @ columns if tall else columns
    mass = start.square().sum(dim=0)
    diagonal, below, counts = _lanczos(
        weight, start / mass.sqrt().clamp(min=1e-300), min(steps, min(weight.shape)), tall
    )
    bounds = []
    for column, n in enumerate(counts):
        a, b = diagonal[:n, column], below[: n - 1, column]
        nodes, vectors = torch.linalg.eigh(torch.diag(a) + torch.diag(b, 1) + torch.diag(b, -1))
        lowest = _FLOOR**2 * nodes[-1] if tall else nodes[0]
        points, atoms = nodes, vectors[0].square()
        if n == steps and n < min(weight.shape):
            ends = torch.cat([lowest.view(1), nodes[nodes > lowest]])
            between = (ends[:-1, None] + ends.diff()[:, None] * _FRACTIONS).flatten()
            points = torch.cat([points, between])
            atoms = torch.cat([atoms, _christoffel(nodes, vectors, between)])
        atoms = torch.where(points >= lowest, atoms * mass[column] / (points.clamp(min=1e-300) if tall else 1.0), 0.0)
        bounds.append(atoms.max())
    return torch.stack(bounds).clamp(max=1.0).sqrt()


def _lanczos(weight: Tensor, start: Tensor, steps: int, tall: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Diagonals (steps, k), off-diagonals (steps, k) and lengths of the Jacobi matrices, by Lanczos with every vector
    orthogonalised against all before it, twice. A column ends where its Krylov space does."""
    vectors = torch.zeros(start.shape[1], steps + 1, start.shape[0], dtype=start.dtype)
    vectors[:, 0] = start.mT
    diagonal, below = torch.zeros(2, steps, start.shape[1], dtype=start.dtype)
    counts = [steps] * start.shape[1]
    for step in range(steps):
        # Vectors as rows: products with few columns are several times slower.
        current, before = vectors[:, step].contiguous(), vectors[:, : step + 1]
        product = (current @ weight.mT) @ weight if tall else (current @ weight) @ weight.mT
        diagonal[step] = (current * product).sum(dim=1)
        rest = product.unsqueeze(1)
        for _ in range(2):
            rest = rest - (rest @ before.mT) @ before
        below[step] = rest.squeeze(1).norm(dim=1)
        ended = below[step] <= _EXHAUSTED * diagonal[: step + 1].abs().amax(dim=0)
        counts = [min(count, step + 1) if end else count for count, end in zip(counts, ended.tolist(), strict=True)]
        scale = torch.where(ended, 0.0, 1 / below[step].clamp(min=1e-300))
        vectors[:, step + 1] = rest.squeeze(1) * scale.unsqueeze(1)
    return diagonal, below, counts


def _christoffel(nodes: Tensor, vectors: Tensor, points: Tensor) -> Tensor:
    """lambda_n at points (p,) that are no nodes, from the eigenvalues (n,) and eigenvectors (n, n) of the Jacobi matrix
    T: (T - x) p(x) is a multiple of the last unit vector, and p_0 = 1. The recurrence itself loses what has converged.
    """
    polynomials = (vectors[-1] / (nodes - points.unsqueeze(1))) @ vectors.mT
    return polynomials[:, 0].square() / polynomials.square().sum(dim=1)
