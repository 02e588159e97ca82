"""One sign convention for directions, so that equal inputs give equal bits."""

import torch
from torch import Tensor

__all__ = ["fix_signs"]


def fix_signs(columns: Tensor) -> Tensor:
    """The same columns (dim, k), each with its entry of largest magnitude positive."""
    if not columns.numel():
        return columns
    peaks = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * torch.where(peaks < 0, -1.0, 1.0).to(columns)
