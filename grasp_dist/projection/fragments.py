"""Fragments: which piece of which stored matrix this rank holds, and over whom a contraction must be summed.

A parameter is a stack of E stored matrices M (R, C): experts, rows, columns. An ordinary weight is a stack of one, and
a bias (out,) is the stack (1, out, 1). The sketches of M with a left basis P (R, k_l) and a right basis Q (C, k_r) are
C = P^T M, (k_l, C), and D^T = Q^T M^T, (k_r, R): directions first, so that the two sides are the same operation on M
and on M^T. C sums over rows, D over columns.

There are two kinds, both made by adapters, which alone know the framework: a `Block` is a box of the stack, an
`Interval` a run of the flattened stack, which may cut rows; `Interval.boxes` takes it apart into boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

__all__ = ["Block", "Box", "Fragment", "Interval", "Span", "Storage", "stack_shape"]

Span = tuple[int, int]
"""(start, stop)."""


@dataclass(frozen=True)
class Box:
    """Experts x rows x columns of a stack."""

    experts: Span
    rows: Span
    columns: Span

    @property
    def size(self) -> tuple[int, int, int]:
        experts, rows, columns = (stop - start for start, stop in (self.experts, self.rows, self.columns))
        return experts, rows, columns

    @property
    def numel(self) -> int:
        experts, rows, columns = self.size
        return experts * rows * columns


@dataclass(frozen=True)
class Storage:
    """Where a fragment's numbers are. Resolved anew at each pass: frameworks replace and relink their tensors.

    `weight` and `gradient` return tensors that share memory with the framework's own, of the fragment's numel (empty
    ones where the rank holds nothing).
    """

    weight: Callable[[], Tensor]
    """The piece that the optimizer steps: the fp32 master where there is one."""
    gradient: Callable[[], Tensor | None]
    """Its gradient, unscaled wherever the framework keeps it so; None: this rank has none."""
    like: Callable[[Tensor], Tensor]
    """A tensor sharded like the parameter, or one of its whole shape, -> this rank's piece of it."""
    publish: Callable[[], None] | None = None
    """Where `weight` is a master: copy it to the piece that the forward pass uses, outside of a step."""
    copies: Callable[[], list[Tensor]] = list
    """Whole copies of the parameter that this rank holds for the forward pass beside `weight`, and that the framework
    refreshes only at the next step."""


@dataclass(frozen=True)
class Block:
    """A box of the stack. The boxes of `tile_group`'s ranks tile it."""

    shape: tuple[int, int, int]
    box: Box
    row_group: dist.ProcessGroup | None
    """Ranks that hold the other rows of these experts and columns; None where every row is here."""
    column_group: dist.ProcessGroup | None
    """Ranks that hold the other columns of these experts and rows; None where every column is here."""
    both_group: dist.ProcessGroup | None
    """Where rows and columns are both cut: the ranks that hold the other pieces of these experts; else None."""
    tile_group: dist.ProcessGroup | None
    """The ranks that share the stack; None where it is whole on this rank."""
    check_group: dist.ProcessGroup | None
    """Every rank that holds a piece or a copy, and must have planned the same; None in a single process."""
    storage: Storage
    unit: int = 0
    """Which of the steps that the optimizer takes one after the other moves it (ZeRO's groups); equal on all ranks."""
    distribute: Callable[[Tensor, int], Tensor] | None = None
    """This rank's piece (experts, k, length) of a sketch, and the dimension of the stack that its length runs along
    (1 rows, 2 columns) -> a tensor (experts, k, whole length), or (k, whole length) of a stack of one, that
    torch.distributed.checkpoint can save and reshard; None where sketches are whole."""


@dataclass(frozen=True)
class Interval:
    """Numbers start:stop of the row-major flattened stack. The intervals of `group`'s ranks tile it."""

    shape: tuple[int, int, int]
    span: Span
    """(start, stop); empty where the rank holds nothing."""
    cuts: tuple[int, ...]
    """Flat positions, 0 < position < numel, ascending, at which one rank's interval ends and the next begins; the same
    on every rank of `group`."""
    group: dist.ProcessGroup | None
    """The ranks that share the stack; None where it is whole on this rank."""
    check_group: dist.ProcessGroup | None
    """Every rank that holds a piece or a copy, and must have planned the same; None in a single process."""
    storage: Storage
    unit: int = 0
    """As for a block."""

    @property
    def tile_group(self) -> dist.ProcessGroup | None:
        """As for a block."""
        return self.group

    @cached_property
    def cut_experts(self) -> tuple[int, ...]:
        """Experts that lie on several ranks."""
        _, rows, columns = self.shape
        return tuple(sorted({cut // (rows * columns) for cut in self.cuts if cut % (rows * columns)}))

    @cached_property
    def cut_rows(self) -> tuple[int, ...]:
        """Rows, counted over the whole stack, that lie on several ranks."""
        columns = self.shape[2]
        return tuple(sorted({cut // columns for cut in self.cuts if cut % columns}))

    def boxes(self) -> list[Box]:
        """The boxes that the interval consists of, in storage order: at most five (head row, body and tail row of the
        experts at either end, and the whole experts between them)."""
        _, rows, columns = self.shape
        size = rows * columns
        start, stop = self.span
        if start == stop:
            return []
        first, last = -(-start // size), stop // size
        if first > last:  # inside one expert
            return _rows_of(start // size, start % size, stop - last * size, columns)
        boxes = _rows_of(first - 1, start % size, size, columns) if start % size else []
        if first < last:
            boxes.append(Box((first, last), (0, rows), (0, columns)))
        return boxes + (_rows_of(last, 0, stop % size, columns) if stop % size else [])


def _rows_of(expert: int, start: int, stop: int, columns: int) -> list[Box]:
    """Numbers start:stop of one expert."""
    one = (expert, expert + 1)
    (top, left), (bottom, right) = divmod(start, columns), divmod(stop, columns)
    if top == bottom:
        return [Box(one, (top, top + 1), (left, right))]
    boxes = []
    if left:
        boxes.append(Box(one, (top, top + 1), (left, columns)))
        top += 1
    if top < bottom:
        boxes.append(Box(one, (top, bottom), (0, columns)))
    if right:
        boxes.append(Box(one, (bottom, bottom + 1), (0, right)))
    return boxes


Fragment = Block | Interval


def stack_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(experts, rows, columns) of a parameter's shape: (out,), (rows, columns) or (experts, rows, columns)."""
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    experts, rows, columns = shape
    return experts, rows, columns
