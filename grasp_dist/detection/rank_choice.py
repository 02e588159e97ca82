"""How many directions of an update stand out: rules on its singular values or its factors.

Legend: dW = s B A (out, in), A (r, in), B (out, r); m = min(r, out, in) singular values, descending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from grasp_dist.detection.adapter import LowRankUpdate
from grasp_dist.detection.shared_directions import shared_directions
from grasp_dist.detection.svd import NUMERICAL_RANK, low_rank_svd, numerical_rank
from grasp_dist.errors import InputError

__all__ = [
    "RankRule",
    "above_null",
    "check_rule",
    "choose_rank",
    "hard_threshold",
    "sign_flip_null",
    "spectral_gap",
]

RankRule = int | Literal["gap", "gavish_donoho", "parallel"]
"""A count, or a rule that needs one update."""

_RULES = get_args(get_args(RankRule)[1])
_DRAWS = 99
_LEVEL = 0.05


def choose_rank(
    update: LowRankUpdate | Sequence[LowRankUpdate], rule: RankRule | Literal["agreement"], *, seed: int = 0
) -> int:
    """The number of leading directions to keep, from 0 to the update's numerical rank.

    rule: a count (capped by the numerical rank); "gap": `spectral_gap`; "gavish_donoho": `hard_threshold` with
    beta = r / out; "parallel": `above_null` of `sign_flip_null`; "agreement": the write directions that two or more
    runs' updates of one weight share (`shared_directions` at level 0.05, whole column spaces compared).

    Raises `InputError` for another rule, and for "agreement" of fewer than two updates, or another of several.
    """
    updates = [update] if isinstance(update, LowRankUpdate) else list(update)
    if rule == "agreement":
        if len(updates) < 2:
            raise InputError(f"rank rule 'agreement' needs the updates of two or more runs, not {len(updates)}")
        found = [low_rank_svd(one.A, one.B, one.scale) for one in updates]
        kept = [left[:, : numerical_rank(values)] for left, values, _ in found]
        return shared_directions(kept, level=_LEVEL, seed=seed).num_shared if all(u.shape[1] for u in kept) else 0
    check_rule(rule)
    if len(updates) != 1:
        raise InputError(f"rank rule {rule!r} is for one update, not {len(updates)}; use 'agreement' for several")
    (one,) = updates
    _, values, _ = low_rank_svd(one.A, one.B, one.scale)
    most = numerical_rank(values)
    if isinstance(rule, int):
        return min(rule, most)
    if rule == "gap":
        return spectral_gap(values)
    if rule == "gavish_donoho":
        return min(hard_threshold(values, values.numel() / one.shape[0]), most)
    return min(above_null(values, sign_flip_null(one, seed=seed)), most)


def check_rule(rule: object) -> None:
    """Raise `InputError` unless `rule` is a count of at least 1 or the name of a rule."""
    if isinstance(rule, bool) or not ((isinstance(rule, int) and rule >= 1) or rule in _RULES):
        raise InputError(f"rank {rule!r} is not a count of at least 1 or one of {', '.join(map(repr, _RULES))}")


def spectral_gap(values: Tensor) -> int:
    """The count before the largest ratio of consecutive values (m,); what is below the numerical rank counts as its
    floor, so that an update of exact rank k gives k. 0 for an update that is zero. Ours (a common heuristic)."""
    most = numerical_rank(values)
    if (most < 2 and values.numel() < 2) or most == 0:
        return most
    floored = values.double().clamp(min=NUMERICAL_RANK * values[0].item())
    return int((floored[:-1] / floored[1:]).argmax()) + 1


def hard_threshold(values: Tensor, beta: float) -> int:
    """How many values exceed omega(beta) * median(values): the optimal hard threshold for a matrix in white noise of
    unknown level, sides m <= n, beta = m / n (Gavish and Donoho, 2014, equations 4 and 5; omega by their cubic fit).

    A LoRA update has r singular values only: it is read as the (out, r) matrix that it is within its row space, so
    beta = r / out, and the median is of those r. The rule therefore assumes that fewer than half of the r directions
    are signal and the others white noise. Raises `InputError` unless 0 < beta <= 1.
    """
    if not 0 < beta <= 1:
        raise InputError(f"beta {beta} must be above 0 and at most 1: the shorter side over the longer one")
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int((values > omega * values.double().quantile(0.5)).sum())


def sign_flip_null(update: LowRankUpdate, *, draws: int = _DRAWS, seed: int = 0) -> Tensor:
    """Singular values (draws, m), fp64, of s (B * R) A with independent random signs R (out, r).

    Signflip parallel analysis (Hong, Sheng and Dobriban, 2020) applied to the factor B, given A: of the update itself
    it would need a dense matrix. The null says that B's entries are independent and symmetric about 0, with the
    magnitudes that they have; it destroys directions that several columns of B share. It depends on the pair of
    factors, not on their product alone: it is meant for factors as LoRA trained them, not for rotated ones.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = update.B.detach().cpu().double()
    flipped = [
        low_rank_svd(update.A, wide * (2.0 * torch.randint(2, wide.shape, generator=generator) - 1.0), update.scale)[1]
        for _ in range(draws)
    ]
    return torch.stack(flipped)


def above_null(values: Tensor, null: Tensor, *, level: float = _LEVEL) -> int:
    """How many leading values (m,) each exceed the 1 - level quantile of their own place in null (draws, m); counting
    ends at the first that does not (Buja and Eyuboglu, 1992)."""
    above = values.double() > null.quantile(1 - level, dim=0)
    return int(above.int().cumprod(dim=0).sum())
