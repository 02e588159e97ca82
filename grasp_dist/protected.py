"""Reach the activations at the weights of a basis: outputs where it blocks writing, inputs where it blocks reading."""

from __future__ import annotations

import difflib

from torch import nn

from grasp_dist.architecture import canonical_name, linear_modules, logical_shape
from grasp_dist.basis import SIDES, SpuriousBasis
from grasp_dist.errors import InputError

__all__ = ["protected_modules"]


def protected_modules(model: nn.Module, basis: SpuriousBasis) -> dict[str, nn.Module]:
    """{weight name: the module to hook} for every weight of the basis.

    Where an adapter wraps the linear module, the wrapper is returned: its output is the sum of both. Raises
    `InputError` for a weight that the model lacks, of another size, or of stacked experts (no module shows theirs).
    """
    shapes = {f"{name}.weight": logical_shape(module) for name, module in linear_modules(model).items()}
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        outermost.setdefault(f"{canonical_name(name)}.weight", module)
    for weight in basis.weights:
        if weight not in shapes:
            near = difflib.get_close_matches(weight, list(shapes), n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise InputError(
                f"the basis names {weight}, which is no linear weight of this model{hint}; use a basis of this model"
            )
        for side, dim in zip(SIDES, shapes[weight], strict=True):
            shape = basis.tensor_shape(weight, side) if side in basis.sides(weight) else (dim, 1)
            if len(shape) != 2 or shape[0] != dim:
                raise InputError(
                    f"the basis has {shape} on the {side} side of {weight}, whose size there is {dim}; "
                    "use a basis that was detected on this model"
                )
    return {weight: outermost[weight] for weight in basis.weights}
