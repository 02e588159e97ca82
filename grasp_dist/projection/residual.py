"""How far parameters are off their pins, over all ranks; and the check of an adapter's start that rests on it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import make_fragment
from grasp_dist.projection.pins import Pins
from grasp_dist.projection.plan import Plan, sum_over_groups
from grasp_dist.projection.runtime import Runtime

__all__ = ["check_start", "relative_residuals"]

_Term = tuple[dist.ProcessGroup | None, Tensor]

# |U^T B| / |B| up to which a continued adapter counts as pinned: a hundred times fp32 rounding, or that of the format.
_START_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}


def relative_residuals(plan: Plan, runtime: Runtime, weights: list[Tensor], pins: Pins | None) -> list[float]:
    """max(|P^T M - C0|, |M Q - D0|) / |M| of every entry, Frobenius norms, 0 for 0 / 0; collective, equal on all ranks.

    weights: the local pieces; pins None: zero.
    """
    deltas = runtime.sketch(weights, None if pins is None else pins.flats)
    terms: list[_Term] = []
    for entry, weight in zip(plan.entries, weights, strict=True):
        rows, columns = entry.block.row_group, entry.block.column_group
        terms.append((rows or columns, _square(weight)))
        # A sketch is whole along what it was summed over, and cut like the matrix along its own dimension.
        for slot, group in ((entry.left_slot, columns), (entry.right_slot, rows)):
            terms.append((group, _square(weight[:0] if slot is None else slot.view(deltas))))
    norms = [value.item() ** 0.5 for value in sum_over_groups(terms)]
    triples = zip(norms[0::3], norms[1::3], norms[2::3], strict=True)
    return [_ratio(max(left, right), norm) for norm, left, right in triples]


def check_start(plan: Plan, runtime: Runtime, weights: list[Tensor]) -> None:
    """Raise `InputError` for a LoRA adapter that starts with an update along the blocked directions; collective.

    A may be anything where B is zero: to project it then changes no output.
    """
    terms: list[_Term] = []
    for entry in plan.entries:
        partner = entry.target.partner
        if partner is None:
            terms.append((None, torch.tensor(torch.inf)))
        else:
            block = make_fragment(entry.target.name, partner)
            terms.append((block.row_group or block.column_group, _square(block.local(partner))))
    partners = [value.item() for value in sum_over_groups(terms)]
    residuals = relative_residuals(plan, runtime, weights, None)
    for entry, off, partner_norm in zip(plan.entries, residuals, partners, strict=True):
        target = entry.target
        tolerance = _START_TOLERANCE.get(target.parameter.dtype, 1e-5)
        if target.is_factor and partner_norm > 0 and not off <= tolerance:
            raise InputError(
                f"the adapter of {target.weight!r} does not start from zero along the blocked directions ({off:.1e} of "
                f"{target.name!r} lies in them); start from a fresh adapter with lora_B = 0, or continue one that was "
                "trained with this basis"
            )


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).double().square()


def _ratio(off: float, norm: float) -> float:
    if off == 0:
        return 0.0
    return off / norm if norm > 0 else torch.inf
