"""Layout: where the sketches of one fragment lie in the flat buffers, and which products make and use them.

A fragment is taken apart into `Part`s, dense boxes on which a pass runs matrix products, and its sketches into
`Piece`s, ranges of the whole sketch. Sketches that must be summed over ranks lie in the bucket of their process group,
at the same place on every rank; those that are whole already lie in a local bucket.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection.fragments import Block, Box, Fragment, Interval, Span
from grasp_dist.projection.targets import Target

__all__ = ["BasisRows", "Bucket", "Buckets", "Entry", "Overlap", "Part", "Piece", "Slot", "View", "lay_out_unit"]


@dataclass
class Bucket:
    """One flat buffer: `numel` numbers on `device`, summed over `group` (None: already whole)."""

    group: dist.ProcessGroup | None
    device: torch.device
    numel: int = 0
    units: dict[int, Span] = field(default_factory=dict)
    """Which numbers belong to the fragments of each unit."""
    flag: int | None = None
    """Where the number is by which the group's ranks tell each other of non-finite values."""


@dataclass(frozen=True)
class Slot:
    """Numbers of `bucket` from `start` on, in the shape (experts, directions, length)."""

    bucket: int
    start: int
    shape: tuple[int, int, int]
    by_length: bool = False
    """Whether they lie in the order (experts, length, directions), in which a product with a tall matrix makes them."""

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class View:
    """Experts and length of a slot."""

    slot: Slot
    experts: Span
    length: Span

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """(experts, directions, length)."""
        experts, k, length = self.slot.shape
        numbers = flats[self.slot.bucket].narrow(0, self.slot.start, self.slot.numel)
        whole = numbers.view(experts, length, k).mT if self.slot.by_length else numbers.view(experts, k, length)
        return whole[self.experts[0] : self.experts[1], :, self.length[0] : self.length[1]]


@dataclass(frozen=True)
class Piece:
    """Part of the whole sketch (E, k, length) of one side that is here."""

    view: View
    experts: Span
    length: Span
    owned: bool
    """Whether this rank is the one that counts it, of those that hold it."""


@dataclass(frozen=True)
class Part:
    """A box of the fragment, its basis rows, and where its sketches go. Tensors are (experts or 1, length, k)."""

    box: Box
    offset: int | None
    """First number in the flat local storage; None where the storage is the box."""
    left: Tensor | None
    right: Tensor | None
    left_view: View | None
    """C of the box: (experts, k_l, columns)."""
    right_view: View | None
    """D^T of the box: (experts, k_r, rows)."""


@dataclass(frozen=True)
class Overlap:
    """C <- C - E Q^T, so that what lies on both sides is subtracted once. E, (experts, k_l, k_r), is made of C and Q
    where every column is here, of P and D where every row is, and else of the partial sums, summed in a slot."""

    left_view: View
    right: Tensor
    """Q: (experts or 1, columns, k_r)."""
    left: Tensor | None = None
    """P: (experts or 1, rows, k_l), and with it"""
    right_view: View | None = None
    """D^T, where E is made of them."""
    own: View | None = None
    """E's own slot, where it is summed."""


@dataclass(frozen=True)
class Entry:
    """One protected parameter."""

    target: Target
    fragment: Fragment
    parts: tuple[Part, ...]
    overlaps: tuple[Overlap, ...]
    pieces: dict[str, tuple[Piece, ...]]
    """By "left" and "right"."""

    @property
    def tile_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the stack."""
        return self.fragment.tile_group

    def side(self, where: str) -> str | None:
        """The basis' side behind "left" or "right"."""
        return self.target.left if where == "left" else self.target.right

    def length(self, where: str) -> int:
        """Of the whole sketch: columns for left, rows for right."""
        return self.fragment.shape[2 if where == "left" else 1]


@dataclass
class Buckets:
    """Hands out slots, in the same order on every rank."""

    all: list[Bucket] = field(default_factory=list)
    _index: dict[tuple[dist.ProcessGroup | None, torch.device], int] = field(default_factory=dict)

    def index(self, group: dist.ProcessGroup | None, device: torch.device) -> int:
        index = self._index.setdefault((group, device), len(self.all))
        if index == len(self.all):
            self.all.append(Bucket(group, device))
        return index

    def slot(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        unit: int,
        shape: tuple[int, int, int],
        *,
        by_length: bool = False,
    ) -> Slot:
        index = self.index(group, device)
        bucket = self.all[index]
        slot = Slot(index, bucket.numel, shape, by_length)
        first, _ = bucket.units.get(unit, (bucket.numel, 0))
        bucket.numel += slot.numel
        bucket.units[unit] = (first, bucket.numel)
        return slot


class BasisRows:
    """Rows of the basis on a device, each read once."""

    def __init__(self, basis: SpuriousBasis | None, dtype: torch.dtype) -> None:
        self._basis, self._dtype = basis, dtype
        self._read: dict[tuple[str, str, Span, Span, torch.device], Tensor] = {}

    def read(self, weight: str, side: str | None, experts: Span, rows: Span, device: torch.device) -> Tensor | None:
        """(experts, rows, k); (1, rows, k) where all experts share one basis."""
        if side is None:
            return None
        assert self._basis is not None
        if len(self._basis.tensor_shape(weight, side)) == 2:
            experts = (0, 1)
        key = (weight, side, experts, rows, device)
        if key not in self._read:
            content = self._basis.rows(weight, side, *rows, experts=experts)
            content = content if content.ndim == 3 else content.unsqueeze(0)
            self._read[key] = content.to(device, self._dtype, copy=True, memory_format=torch.contiguous_format)
        return self._read[key]


def lay_out_unit(pairs: Sequence[tuple[Target, Fragment]], rows: BasisRows, buckets: Buckets) -> Iterator[Entry]:
    """The entries of one unit. Raises `InputError` where the basis' content cannot be read."""
    views = _views_of_blocks(pairs, buckets)
    for index, (target, fragment) in enumerate(pairs):
        device = fragment.storage.weight().device
        if isinstance(fragment, Block):
            yield _of_block(target, fragment, rows, views[index], device)
        else:
            yield _of_interval(target, fragment, rows, buckets, device)


def _views_of_blocks(pairs: Sequence[tuple[Target, Fragment]], buckets: Buckets) -> dict[int, dict[str, View]]:
    """By index of the entry, and "left", "right" or "both" (E's own sum), where the sketches lie.

    Those of weights of one shape, summed over the same ranks, lie side by side in one slot, so that small weights can
    be worked on together (`batches.py`). All ranks of a group find the same: they hold the same columns where rows are
    summed, and the same rows where columns are.
    """
    wanted: dict[tuple[Any, ...], list[tuple[int, str, int]]] = {}
    for index, (target, fragment) in enumerate(pairs):
        if not isinstance(fragment, Block):
            continue
        k_left, k_right = target.ranks("left"), target.ranks("right")
        experts, height, width = fragment.box.size
        sizes = {"left": (fragment.row_group, k_left, width), "right": (fragment.column_group, k_right, height)}
        if k_left and k_right and fragment.column_group is not None and fragment.row_group is not None:
            sizes["both"] = fragment.both_group, k_left, k_right
        for where, (group, k, length) in sizes.items():
            if k:
                key = where, group, fragment.storage.weight().device, k, length, fragment.shape, k_left, k_right
                wanted.setdefault(key, []).append((index, where, experts))
    views: dict[int, dict[str, View]] = {}
    for (kind, group, device, k, length, *_), members in wanted.items():
        unit = pairs[0][1].unit
        shape = sum(experts for *_, experts in members), k, length
        slot = buckets.slot(group, device, unit, shape, by_length=kind == "right")
        first = 0
        for index, where, experts in members:
            views.setdefault(index, {})[where] = View(slot, (first, first + experts), (0, length))
            first += experts
    return views


def _of_block(target: Target, block: Block, rows: BasisRows, views: Mapping[str, View], device: torch.device) -> Entry:
    box = block.box
    left = rows.read(target.weight, target.left, box.experts, box.rows, device)
    right = rows.read(target.weight, target.right, box.experts, box.columns, device)
    left_view, right_view = views.get("left"), views.get("right")
    pieces: dict[str, tuple[Piece, ...]] = {}
    if left_view is not None:
        pieces["left"] = (Piece(left_view, box.experts, box.columns, _first_of(block.row_group)),)
    if right_view is not None:
        pieces["right"] = (Piece(right_view, box.experts, box.rows, _first_of(block.column_group)),)
    overlaps = []
    if left is not None and right is not None and left_view is not None:
        if block.column_group is None:
            overlaps.append(Overlap(left_view, right))
        elif block.row_group is None:
            overlaps.append(Overlap(left_view, right, left=left, right_view=right_view))
        else:
            overlaps.append(Overlap(left_view, right, own=views["both"]))
    part = Part(box, None, left, right, left_view, right_view)
    return Entry(target, block, (part,), tuple(overlaps), pieces)


def _of_interval(target: Target, interval: Interval, rows: BasisRows, buckets: Buckets, device: torch.device) -> Entry:
    _, height, width = interval.shape
    weight, unit, group = target.weight, interval.unit, interval.group
    cut_experts, cut_rows = interval.cut_experts, interval.cut_rows
    start, stop = interval.span
    k = {where: target.ranks(where) for where in ("left", "right")}
    pieces: dict[str, list[Piece]] = {where: [] for where, directions in k.items() if directions}
    shared: dict[str, Slot] = {}
    if k["left"] and cut_experts:
        shared["left"] = buckets.slot(group, device, unit, (len(cut_experts), k["left"], width))
        for index in _touched(cut_experts, interval.span, height * width):
            expert = cut_experts[index]
            view = View(shared["left"], (index, index + 1), (0, width))
            owned = start <= expert * height * width < stop
            pieces["left"].append(Piece(view, (expert, expert + 1), (0, width), owned))
    if k["right"] and cut_rows:
        shared["right"] = buckets.slot(group, device, unit, (1, k["right"], len(cut_rows)), by_length=True)
        for index in _touched(cut_rows, interval.span, width):
            row = cut_rows[index]
            view = View(shared["right"], (0, 1), (index, index + 1))
            expert, own = divmod(row, height)
            owned = start <= row * width < stop
            pieces["right"].append(Piece(view, (expert, expert + 1), (own, own + 1), owned))

    parts: list[Part] = []
    overlaps: dict[Span, Overlap] = {}
    whole: dict[Span, View] = {}
    offset = start
    for box in interval.boxes():
        experts, columns = box.experts, box.columns
        left = rows.read(weight, target.left, experts, box.rows, device)
        every = rows.read(weight, target.right, experts, (0, width), device)
        left_view = right_view = None
        if left is not None:
            if experts not in whole:
                if experts[0] in cut_experts:
                    index = cut_experts.index(experts[0])
                    whole[experts] = View(shared["left"], (index, index + 1), (0, width))
                else:
                    shape = experts[1] - experts[0], left.shape[2], width
                    whole[experts] = _whole(buckets.slot(None, device, unit, shape))
                    pieces["left"].append(Piece(whole[experts], experts, (0, width), True))
            left_view = View(whole[experts].slot, whole[experts].experts, columns)
        if every is not None:
            row = experts[0] * height + box.rows[0]
            if box.size[1] == 1 and row in cut_rows:
                index = cut_rows.index(row)
                right_view = View(shared["right"], (0, 1), (index, index + 1))
            else:
                shape = experts[1] - experts[0], every.shape[2], box.size[1]
                right_view = _whole(buckets.slot(None, device, unit, shape, by_length=True))
                pieces["right"].append(Piece(right_view, experts, box.rows, True))
        if left is not None and every is not None:
            overlaps.setdefault(experts, Overlap(whole[experts], every))
        right = None if every is None else every[:, columns[0] : columns[1]]
        parts.append(Part(box, offset - start, left, right, left_view, right_view))
        offset += box.numel
    return Entry(
        target, interval, tuple(parts), tuple(overlaps.values()), {key: tuple(value) for key, value in pieces.items()}
    )


def _touched(cut: Sequence[int], span: Span, size: int) -> range:
    """Indices of those among the cut rows (or experts), ascending and of `size` numbers each, that lie in the span; at
    most two. What the others hold is neither read nor saved here."""
    start, stop = span
    if start == stop:
        return range(0)
    return range(bisect_left(cut, start // size), bisect_right(cut, (stop - 1) // size))


def _whole(slot: Slot) -> View:
    return View(slot, (0, slot.shape[0]), (0, slot.shape[2]))


def _first_of(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_rank(group) == 0
