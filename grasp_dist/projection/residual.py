"""How far parameters are off their pins, over all ranks; and the check of an adapter's start that rests on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import Framework
from grasp_dist.projection.pins import Pins
from grasp_dist.projection.plan import Plan, sum_over_groups
from grasp_dist.projection.runtime import Runtime

__all__ = ["check_start", "relative_residuals"]

_Term = tuple[dist.ProcessGroup | None, Tensor]

# |U^T B| / |B| up to which a continued adapter counts as pinned: a hundred times fp32 rounding, or that of the format.
_START_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}


def relative_residuals(plan: Plan, runtime: Runtime, weights: Sequence[Tensor], pins: Pins | None) -> list[float]:
    """max(|P^T M - C0|, |M Q - D0|) / |M| of every entry, Frobenius norms over the whole stack, 0 for 0 / 0;
    collective, equal on all ranks that share it.

    weights: the local pieces; pins None: zero.
    """
    deltas = runtime.sketch(weights, None if pins is None else pins.flats)
    terms: list[_Term] = []
    for entry, weight in zip(plan.entries, weights, strict=True):
        terms.append((entry.tile_group, _square(weight)))
        for where in ("left", "right"):
            owned = [piece.view.of(deltas) for piece in entry.pieces.get(where, ()) if piece.owned]
            total = torch.stack([_square(view) for view in owned]).sum() if owned else _square(weight[:0])
            terms.append((entry.tile_group, total))
    norms = [value.item() ** 0.5 for value in sum_over_groups(terms)]
    triples = zip(norms[0::3], norms[1::3], norms[2::3], strict=True)
    return [_ratio(max(left, right), norm) for norm, left, right in triples]


def check_start(plan: Plan, runtime: Runtime, weights: Sequence[Tensor], framework: Framework) -> None:
    """Raise `InputError` for a LoRA adapter that starts with an update along the blocked directions; collective.

    A may be anything where B is zero: to project it then changes no output.
    """
    terms: list[_Term] = []
    for entry in plan.entries:
        partner = entry.target.partner
        if partner is None:
            terms.append((None, torch.tensor(torch.inf, dtype=torch.float64)))
        else:
            fragment = framework.fragment(entry.target.name, partner)
            terms.append((fragment.tile_group, _square(fragment.storage.weight())))
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
    wide = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return torch.linalg.vector_norm(tensor, dtype=wide).double().square()


def _ratio(off: float, norm: float) -> float:
    if off == 0:
        return 0.0
    return off / norm if norm > 0 else torch.inf
