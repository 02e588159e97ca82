"""Spectral truncation (arXiv 2606.07596): after a naive fine-tune, only the leading singular directions of each
weight's update are kept ("head"), since shortcuts were found in the tail; or everything but these ("tail"), which is
what would help if the leading directions were the spurious ones:

    dW = U diag(S) V^T  ->  U_k diag(S_k) V_k^T   or   dW - U_k diag(S_k) V_k^T
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grasp_dist.detection.svd import low_rank_svd

__all__ = ["truncate"]


def truncate(
    A: Tensor, B: Tensor, scale: float, *, rank: int, keep: Literal["head", "tail"] = "head"
) -> tuple[Tensor, Tensor]:
    """Factors of the same shapes and dtypes, (r, in) and (out, r), whose update has lost its tail, or its head.

    rank: how many directions are the head. An update of no more than these is kept whole, or is gone.
    """
    left, values, right = low_rank_svd(A, B, scale)
    kept = values.clone()
    (kept[rank:] if keep == "head" else kept[:rank]).zero_()
    roots = (kept / scale).clamp_min(0).sqrt()
    new_a, new_b = torch.zeros_like(A), torch.zeros_like(B)
    new_a[: len(roots)] = (roots[:, None] * right.mT).to(A)
    new_b[:, : len(roots)] = (left * roots).to(B)
    return new_a, new_b
