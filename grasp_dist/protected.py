"""Which modules a basis protects: does it fit the model, and where its activations can be reached."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import nn

from grasp_dist.architecture import canonical_name, linear_modules, logical_shape
from grasp_dist.basis import SIDES, SpuriousBasis
from grasp_dist.errors import InputError

__all__ = ["check_basis", "protected_modules"]


def protected_modules(model: nn.Module, basis: SpuriousBasis) -> dict[str, nn.Module]:
    """{weight name: the module to hook} for every weight of the basis.

    Where an adapter wraps the linear module, the wrapper is returned: its output is the sum of both. Raises
    `InputError` for a weight that the model lacks, of another size, or of stacked experts (no module shows theirs).
    """
    shapes = {f"{name}.weight": logical_shape(module) for name, module in linear_modules(model).items()}
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        outermost.setdefault(f"{canonical_name(name)}.weight", module)
    check_basis(basis, shapes, where="the basis")
    return {weight: outermost[weight] for weight in basis.weights}


def check_basis(basis: SpuriousBasis, shapes: Mapping[str, tuple[int, int]], *, where: str) -> None:
    """Raise `InputError` unless every weight of the basis is one of the model's linear weights, with the right size.

    shapes: logical (out, in) by weight name. where: what the message calls the basis.
    """
    for weight in basis.weights:
        if weight not in shapes:
            near = difflib.get_close_matches(weight, list(shapes), n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise InputError(
                f"{where} names {weight}, which is no linear weight of this model{hint}; detect a basis for this model"
            )
        for side, dim in zip(SIDES, shapes[weight], strict=True):
            shape = basis.tensor_shape(weight, side) if side in basis.sides(weight) else (dim, 1)
            if len(shape) != 2 or shape[0] != dim:
                raise InputError(
                    f"{where} has {shape} on the {side} side of {weight}, whose size there is {dim}; it belongs to "
                    "another model: use a basis that was detected on this one"
                )
