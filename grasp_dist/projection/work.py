"""The work on one fragment, or one batch of small weights, in a pass of the runtime: sketch, and apply. Local only.

Half-precision tensors pass through a bounded scratch buffer; nothing of a weight's size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from grasp_dist.projection.batches import Batch
from grasp_dist.projection.layout import Entry, Overlap, Part, View
from grasp_dist.projection.plan import Plan

__all__ = ["FUSED_FROM", "SCRATCH_NUMEL", "SLABS_FROM", "BatchWork", "EntryWork", "Scratch", "Source", "slabs"]

SCRATCH_NUMEL = 1 << 22
"""Most numbers in the scratch buffer for half-precision tensors (16 MB in fp32); a longer row makes it longer."""

FUSED_FROM = 1 << 18
"""Numbers in the smallest box of which both sides are subtracted as one product, P and D side by side: the box passes
through the processor's cache once less, for copies of what is as long as it but k thin. (On a GPU an estimate.)"""

SLABS_FROM = 1 << 19
"""Numbers in the smallest matrix of which the left sketch is summed over slabs of rows, on the CPU: BLAS multiplies a
thin matrix by a slab that lies in the processor's cache at twice the speed (benchmarks/README.md, "Thin products")."""
SLAB_NUMEL, SLAB_ROWS = 1 << 16, (16, 64)
"""Numbers in a slab, and the fewest and most rows."""

Source = Tensor | None
"""A fragment's local storage; None stands for zeros that are left alone (this rank has no gradient), and the rank still
takes part in the sums."""


class Scratch:
    """Memory in which half-precision pieces, and batches of small weights, are worked on: one buffer per device, as
    large as the largest yet."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[torch.device, Tensor] = {}

    def pieces(self, stack: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(experts, rows, that piece of the stack, its copy in full precision), each no larger than the buffer."""
        experts, rows, columns = stack.shape
        if not stack.numel():
            return
        deep = max(1, SCRATCH_NUMEL // (rows * columns))
        high = rows if rows * columns <= SCRATCH_NUMEL else max(1, SCRATCH_NUMEL // columns)
        for expert in range(0, experts, deep):
            for row in range(0, rows, high):
                own = slice(expert, min(expert + deep, experts)), slice(row, min(row + high, rows))
                piece = stack[own]
                copy = self.room(piece.shape, piece.device)
                copy.copy_(piece)
                yield *own, piece, copy

    def room(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Memory whose content the next call may overwrite."""
        return self._flat(math.prod(shape), device).view(*shape)

    def rooms(self, one: Sequence[int], other: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The same for two tensors at a time."""
        first, second = math.prod(one), math.prod(other)
        buffer = self._flat(first + second, device)
        return buffer[:first].view(*one), buffer[first:].view(*other)

    def _flat(self, numel: int, device: torch.device) -> Tensor:
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < numel:
            self._buffers[device] = buffer = torch.empty(numel, dtype=self.dtype, device=device)
        return buffer[:numel]


class _Side:
    """A basis (length, k) and the sketch (k, other length) along it, stacked or not, and the views a pass needs."""

    __slots__ = ("adds", "basis", "basis_T", "sketch", "sketch_T", "summed")

    def __init__(self, basis: Tensor, sketch: Tensor, *, adds: bool, summed: bool) -> None:
        self.basis, self.basis_T = basis, basis.mT
        self.sketch, self.sketch_T = sketch, sketch.mT
        self.adds, self.summed = adds, summed

    def flat(self) -> _Side:
        """The same of a stack of one, as matrices."""
        return _Side(self.basis[0], self.sketch[0], adds=self.adds, summed=self.summed)


class _Step:
    """One box's share of a pass. For small matrices the interpreter's time is the cost, so nothing is looked up."""

    __slots__ = ("_add", "_fused", "_product", "_slabs", "device", "left", "offset", "right", "size", "stacked")

    def __init__(self, part: Part, flats: Sequence[Tensor], plan: Plan, *, in_scratch: bool = False) -> None:
        """in_scratch: whether the box lies in the scratch memory itself."""
        self.offset = part.offset
        experts = part.box.size[0]
        sides = [
            _side(part.left, part.left_view, experts, flats, plan, adds=part.offset is not None),
            _side(part.right, part.right_view, experts, flats, plan, adds=False),
        ]
        self.stacked = tuple(sides)
        self.device = next(side.basis.device for side in sides if side is not None)
        self.size: tuple[int, ...] = part.box.size
        self._product: Callable[..., Tensor] = torch.bmm
        self._add: Callable[..., Tensor] = Tensor.baddbmm_
        if experts == 1:
            sides = [None if side is None else side.flat() for side in sides]
            self.size = part.box.size[1:]
            self._product, self._add = torch.mm, Tensor.addmm_
        self.left, self.right = sides
        self._fused = part.box.numel >= FUSED_FROM and not in_scratch
        self._slabs: list[tuple[slice, Tensor]] = []
        if self.left is not None and experts == 1 and self.device.type == "cpu" and part.box.numel >= SLABS_FROM:
            for rows in slabs(*self.size):
                self._slabs.append((rows, self.left.basis[rows].mT))

    def view(self, source: Tensor) -> Tensor:
        """The box in the local storage, (rows, columns) or (experts, rows, columns)."""
        if self.offset is not None:
            return source[self.offset : self.offset + math.prod(self.size)].view(self.size)
        if source.ndim == len(self.size):
            return source
        return source.unsqueeze(1) if source.ndim == 1 else source[0]

    def sketch(self, box: Tensor, only: bool | None) -> None:
        left, right = self.left, self.right
        if left is not None and (only is None or left.summed is only):
            if self._slabs:
                if not left.adds:
                    left.sketch.zero_()
                for rows, basis_T in self._slabs:
                    left.sketch.addmm_(basis_T, box[rows])
            elif left.adds:
                self._add(left.sketch, left.basis_T, box)
            else:
                self._product(left.basis_T, box, out=left.sketch)
        if right is not None and (only is None or right.summed is only):
            self._product(right.basis_T, box.mT, out=right.sketch)

    def apply(self, box: Tensor, scratch: Scratch) -> None:
        left, right = self.left, self.right
        if left is not None and right is not None and self._fused:
            *experts, rows, columns = self.size
            k = left.basis.shape[-1] + right.basis.shape[-1]
            tall, wide = scratch.rooms((*experts, rows, k), (*experts, k, columns), self.device)
            torch.cat((left.basis, right.sketch_T), -1, out=tall)
            torch.cat((left.sketch, right.basis_T), -2, out=wide)
            self._add(box, tall, wide, alpha=-1)
            return
        if left is not None:
            self._add(box, left.basis, left.sketch, alpha=-1)
        if right is not None:
            self._add(box, right.sketch_T, right.basis_T, alpha=-1)

    def clear(self) -> None:
        """The sketches of zeros; sums to which others add are zero already."""
        for side in (self.left, self.right):
            if side is not None and not side.adds:
                side.sketch.zero_()

    def sketch_rounded(self, box: Tensor, scratch: Scratch) -> None:
        left, right = self.stacked
        self.clear()
        for experts, rows, _, piece in scratch.pieces(box if box.ndim == 3 else box.unsqueeze(0)):
            if left is not None:
                left.sketch[experts].baddbmm_(left.basis_T[experts, :, rows], piece)
            if right is not None:
                right.sketch[experts, :, rows].baddbmm_(right.basis_T[experts], piece.mT)

    def apply_rounded(self, box: Tensor, scratch: Scratch) -> None:
        left, right = self.stacked
        for experts, rows, here, piece in scratch.pieces(box if box.ndim == 3 else box.unsqueeze(0)):
            if left is not None:
                piece.baddbmm_(left.basis[experts, rows], left.sketch[experts], alpha=-1)
            if right is not None:
                piece.baddbmm_(right.sketch_T[experts, rows], right.basis_T[experts], alpha=-1)
            here.copy_(piece)


def slabs(rows: int, columns: int) -> list[slice]:
    """The rows of each slab of a matrix."""
    fewest, most = SLAB_ROWS
    height = min(most, max(fewest, SLAB_NUMEL // columns))
    return [slice(start, start + height) for start in range(0, rows, height)]


class _OverlapStep:
    """C <- C - E Q^T."""

    __slots__ = ("_C", "_D", "_E", "_P_T", "_Q", "_Q_T", "_add", "_product", "_summed")

    def __init__(self, overlap: Overlap, flats: Sequence[Tensor]) -> None:
        C = overlap.left_view.of(flats)
        experts = C.shape[0]
        Q = overlap.right.expand(experts, -1, -1)
        P_T = None if overlap.left is None else overlap.left.expand(experts, -1, -1).mT
        D = None if overlap.right_view is None else overlap.right_view.of(flats).mT
        self._summed = overlap.own is not None
        E = C.new_empty(experts, C.shape[1], Q.shape[2]) if overlap.own is None else overlap.own.of(flats)
        self._product: Callable[..., Tensor] = torch.bmm
        self._add: Callable[..., Tensor] = Tensor.baddbmm_
        if experts == 1:
            C, Q, E = C[0], Q[0], E[0]
            P_T, D = None if P_T is None else P_T[0], None if D is None else D[0]
            self._product, self._add = torch.mm, Tensor.addmm_
        self._C, self._Q, self._Q_T, self._E, self._P_T, self._D = C, Q, Q.mT, E, P_T, D

    def sketch(self) -> None:
        """The partial sums of E, from those of C."""
        if self._summed:
            self._product(self._C, self._Q, out=self._E)

    def take_out(self) -> None:
        if self._P_T is not None:
            self._product(self._P_T, self._D, out=self._E)
        elif not self._summed:
            self._product(self._C, self._Q, out=self._E)
        self._add(self._C, self._E, self._Q_T, alpha=-1)


class EntryWork:
    """One protected parameter's share of a pass."""

    def __init__(self, index: int, entry: Entry, flats: Sequence[Tensor], plan: Plan, scratch: Scratch) -> None:
        self._index, self.unit = index, entry.fragment.unit
        self._dtype, self._scratch = plan.dtype, scratch
        self._steps = [_Step(part, flats, plan) for part in entry.parts]
        self._overlaps = [_OverlapStep(overlap, flats) for overlap in entry.overlaps]
        self.summed_in = _summed_in(entry.parts, entry.overlaps, plan)

    def sketch_summed(self, sources: Sequence[Source]) -> None:
        """The sketches that are summed. Where numbers pass through a cache or a buffer, on the CPU and in half
        precision, all of them, while they are at hand."""
        source = sources[self._index]
        self._sketch(source, only=None if self._at_once(source) else True)
        for overlap in self._overlaps:
            overlap.sketch()

    def sketch_local(self, sources: Sequence[Source]) -> None:
        """The others."""
        source = sources[self._index]
        if not self.summed_in:
            self._sketch(source, only=None)
        elif not self._at_once(source):
            self._sketch(source, only=False)

    def _at_once(self, source: Source) -> bool:
        return source is None or not source.is_cuda or source.dtype is not self._dtype

    def _sketch(self, source: Source, *, only: bool | None) -> None:
        """only: those that are summed, those that are not, or None: all."""
        for step in self._steps:
            if source is None:
                step.clear()
            elif source.dtype is self._dtype:
                step.sketch(step.view(source), only)
            else:
                step.sketch_rounded(step.view(source), self._scratch)

    def apply(self, sources: Sequence[Source]) -> None:
        source = sources[self._index]
        if source is None:
            return
        for overlap in self._overlaps:
            overlap.take_out()
        for step in self._steps:
            if source.dtype is self._dtype:
                step.apply(step.view(source), self._scratch)
            else:
                step.apply_rounded(step.view(source), self._scratch)


class BatchWork:
    """The share of several small parameters, copied side by side (`batches.py`)."""

    def __init__(self, batch: Batch, flats: Sequence[Tensor], plan: Plan, scratch: Scratch) -> None:
        self._members, self.unit = batch.members, plan.entries[batch.members[0]].fragment.unit
        self._size, self._scratch = batch.part.box.size, scratch
        self._step = _Step(batch.part, flats, plan, in_scratch=True)
        overlaps = () if batch.overlap is None else (batch.overlap,)
        self._overlaps = [_OverlapStep(overlap, flats) for overlap in overlaps]
        self.summed_in = _summed_in((batch.part,), overlaps, plan)

    def sketch_summed(self, sources: Sequence[Source]) -> None:
        """All sketches, while the numbers are at hand."""
        stack, _, _ = self._load(sources)
        self._step.sketch(stack, None)
        for overlap in self._overlaps:
            overlap.sketch()

    def sketch_local(self, sources: Sequence[Source]) -> None:
        if not self.summed_in:
            self.sketch_summed(sources)

    def apply(self, sources: Sequence[Source]) -> None:
        for overlap in self._overlaps:
            overlap.take_out()
        stack, here, copies = self._load(sources)
        self._step.apply(stack, self._scratch)
        if here:
            torch._foreach_copy_(here, copies)

    def _load(self, sources: Sequence[Source]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The stack, with zeros for those without a source; the sources; and their places in the stack."""
        found = [sources[index] for index in self._members]
        stack = self._scratch.room(self._size, self._step.device)
        copies = list(stack.unbind())
        here = [source for source in found if source is not None]
        if len(here) < len(found):
            copies = [copy for copy, source in zip(copies, found, strict=True) if source is not None]
            stack.zero_()
        here = [source if source.ndim == 2 else source.view(self._size[1:]) for source in here]
        if here:
            torch._foreach_copy_(copies, here)
        return stack, here, copies


def _summed_in(parts: Sequence[Part], overlaps: Sequence[Overlap], plan: Plan) -> set[int]:
    """The buckets with a group in which sketches lie."""
    views = [view for part in parts for view in (part.left_view, part.right_view) if view is not None]
    views += [overlap.own for overlap in overlaps if overlap.own is not None]
    return {view.slot.bucket for view in views if plan.buckets[view.slot.bucket].group is not None}


def _side(
    basis: Tensor | None, view: View | None, experts: int, flats: Sequence[Tensor], plan: Plan, *, adds: bool
) -> _Side | None:
    """adds: whether boxes share the sketch where it is summed, so that each adds to what the pass has set to zero."""
    if basis is None or view is None:
        return None
    summed = plan.buckets[view.slot.bucket].group is not None
    return _Side(basis.expand(experts, -1, -1), view.of(flats), adds=adds and summed, summed=summed)
