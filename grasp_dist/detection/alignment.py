"""How much pretrained content a basis has: the base weights along its directions, against random ones. Ours."""

from __future__ import annotations

from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.errors import InputError

__all__ = ["base_alignment"]


def base_alignment(basis: SpuriousBasis, base: BaseWeights) -> dict[str, Tensor]:
    """{"<weight>.<side>": (k,) fp64} per direction: out |W^T u|^2 / |W|_F^2 of write, in |W v|^2 / |W|_F^2 of read.

    1 is what a random direction has on average; near 0 the base model hardly writes (reads) along it, and at most it is
    out (in), of a weight of rank one. Weights are read one at a time. Raises `InputError` for a weight that the base
    does not have or has in another shape, and for stacked experts.
    """
    found = {}
    for weight in basis.weights:
        matrix = base.read(weight)
        norm = matrix.square().sum()
        for side in basis.sides(weight):
            columns = basis.tensor(weight, side).double()
            content = matrix.mT if side == "write" else matrix
            if matrix.ndim != 2 or columns.ndim != 2 or columns.shape[0] != content.shape[1]:
                raise InputError(
                    f"the basis has {tuple(columns.shape)} for {weight!r} ({side}), which the base model has as "
                    f"{tuple(matrix.shape)}; they are of different models, or of stacked experts"
                )
            found[f"{weight}.{side}"] = columns.shape[0] * (content @ columns).square().sum(dim=0) / norm
    return found
