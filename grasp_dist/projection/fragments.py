"""Fragments: which piece of which stored matrix this rank holds, and over whom a contraction must be summed.

The only kind so far is the block. The sketches of a matrix M (rows, columns) with a left basis P (rows, k_l) and a
right basis Q (columns, k_r) are C = P^T M, (k_l, columns), and D^T = Q^T M^T, (k_r, rows): directions first, so that
the two sides are the same operation on M and on M^T. C sums over rows, D over columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["Block", "as_matrix"]


@dataclass(frozen=True)
class Block:
    """Rows `rows` and columns `columns` (start, stop) of a stored matrix of shape `shape`; may be empty.

    Made by an adapter, which alone knows the framework. Blocks of all ranks of a group tile the matrix.
    """

    shape: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    row_group: dist.ProcessGroup | None
    """Ranks that hold the other rows of these columns; None where every row is here."""
    column_group: dist.ProcessGroup | None
    """Ranks that hold the other columns of these rows; None where every column is here."""
    check_group: dist.ProcessGroup | None
    """Ranks that must have planned the same; None in a single process."""
    local: Callable[[Tensor], Tensor]
    """A parameter, its gradient or a tensor sharded like it -> this rank's piece of it, a 2-D view."""
    distribute: Callable[[Tensor, int], Tensor] | None
    """A sketch's columns that are here, (k, piece), and how many there are in all -> a tensor (k, all) that
    torch.distributed.checkpoint can save and reshard; None where sketches are whole."""

    @property
    def size(self) -> tuple[int, int]:
        """Local rows and columns."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def as_matrix(tensor: Tensor) -> Tensor:
    """A bias (out,) is the matrix (out, 1)."""
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(1)
