"""The runtime: sketch everything into flat buffers, one all-reduce per process group, apply. Local operations only.

For a fragment M (r, c) with basis rows P (r, k_l) and Q (c, k_r):

    sketch   C = P^T M,  D^T = Q^T M^T           summed over the ranks that hold the other rows (C) or columns (D)
    minus the pins, in a pin pass                (a gradient's pins are zero)
    apply    M <- M - P (C - E Q^T) - D Q^T      E = C Q, or P^T D: from whichever of C and D is whole on the rank

Arithmetic is fp32 (fp64 for fp64 parameters) and never TF32. Half-precision tensors pass through a bounded scratch
buffer, a few rows at a time, and are rounded once; nothing of a weight's size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.projection.plan import Entry, Plan

__all__ = ["SCRATCH_NUMEL", "Runtime"]

SCRATCH_NUMEL = 1 << 22
"""Numbers in the scratch buffer for half-precision tensors (16 MB in fp32); a longer row makes it longer."""


class Runtime:
    """Executes a plan. `sources` are one local 2-D tensor per entry, in the plan's order; None stands for zeros that
    are left alone (this rank has no gradient), and the rank still takes part in the sums."""

    def __init__(self, plan: Plan) -> None:
        self.flats = plan.new_flats()
        self._scratch: dict[torch.device, Tensor] = {}
        self._steps = [_Step(entry, self.flats, plan.dtype, self._scratch) for entry in plan.entries]
        self._reduced = [
            (flat, bucket.group)
            for flat, bucket in zip(self.flats, plan.buckets, strict=True)
            if bucket.group is not None
        ]
        self._devices = {bucket.device.type for bucket in plan.buckets}

    @torch.no_grad()
    def run(self, sources: Sequence[Tensor | None], pins: Sequence[Tensor] | None = None) -> None:
        """One pass, in place: project the sources, or with `pins` (one flat tensor per bucket) restore those."""
        with full_precision(self._devices):
            self._sketch(sources)
            if pins is not None:
                self._subtract(pins)
            for step, source in zip(self._steps, sources, strict=True):
                if source is not None:
                    step.apply(source)

    @torch.no_grad()
    def sketch(self, sources: Sequence[Tensor | None], pins: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The summed sketches, less `pins`, as flat tensors that the next call overwrites."""
        with full_precision(self._devices):
            self._sketch(sources)
            if pins is not None:
                self._subtract(pins)
        return self.flats

    def _sketch(self, sources: Sequence[Tensor | None]) -> None:
        for step, source in zip(self._steps, sources, strict=True):
            step.sketch(source)
        for flat, group in self._reduced:
            dist.all_reduce(flat, group=group)

    def _subtract(self, pins: Sequence[Tensor]) -> None:
        for flat, pin in zip(self.flats, pins, strict=True):
            flat.sub_(pin)


@contextmanager
def full_precision(devices: set[str]) -> Iterator[None]:
    """fp32 matrix products in fp32 for the duration, whatever the training loop chose for its own."""
    backends: list[Any] = [getattr(torch.backends, _BACKENDS[device]).matmul for device in devices & _BACKENDS.keys()]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


_BACKENDS = {"cuda": "cuda", "cpu": "mkldnn"}


class _Side:
    """A basis (dim, k) and the sketch (k, other dim) along it, with the views that a pass needs made beforehand."""

    __slots__ = ("basis", "basis_T", "sketch", "sketch_T")

    def __init__(self, basis: Tensor, sketch: Tensor) -> None:
        self.basis, self.basis_T = basis, basis.T
        self.sketch, self.sketch_T = sketch, sketch.T


class _Step:
    """One entry's share of a pass. For small matrices the interpreter's time is the cost, so nothing is looked up."""

    __slots__ = ("_dtype", "_left", "_overlap", "_overlap_from_left", "_right", "_scratch")

    def __init__(
        self, entry: Entry, flats: Sequence[Tensor], dtype: torch.dtype, scratch: dict[torch.device, Tensor]
    ) -> None:
        self._dtype, self._scratch = dtype, scratch
        self._left = self._right = self._overlap = None
        if entry.left is not None and entry.left_slot is not None:
            self._left = _Side(entry.left, entry.left_slot.view(flats))
        if entry.right is not None and entry.right_slot is not None:
            self._right = _Side(entry.right, entry.right_slot.view(flats))
        self._overlap_from_left = entry.block.column_group is None
        if self._left is not None and self._right is not None:
            ranks = self._left.sketch.shape[0], self._right.sketch.shape[0]
            self._overlap = self._left.sketch.new_empty(ranks)

    def sketch(self, matrix: Tensor | None) -> None:
        left, right = self._left, self._right
        if matrix is not None and matrix.dtype is not self._dtype:
            self._sketch_rounded(matrix)
            return
        if left is not None:
            left.sketch.zero_() if matrix is None else torch.mm(left.basis_T, matrix, out=left.sketch)
        if right is not None:
            right.sketch.zero_() if matrix is None else torch.mm(right.basis_T, matrix.T, out=right.sketch)

    def apply(self, matrix: Tensor) -> None:
        left, right = self._left, self._right
        if left is not None and right is not None:
            self._take_out_overlap(left, right)
        if matrix.dtype is not self._dtype:
            self._apply_rounded(matrix)
            return
        if left is not None:
            matrix.addmm_(left.basis, left.sketch, alpha=-1)
        if right is not None:
            matrix.addmm_(right.sketch_T, right.basis_T, alpha=-1)

    def _take_out_overlap(self, left: _Side, right: _Side) -> None:
        """C <- C - E Q^T, so that what lies on both sides is subtracted once."""
        assert self._overlap is not None
        if self._overlap_from_left:
            torch.mm(left.sketch, right.basis, out=self._overlap)
        else:
            torch.mm(left.basis_T, right.sketch_T, out=self._overlap)
        left.sketch.addmm_(self._overlap, right.basis_T, alpha=-1)

    def _sketch_rounded(self, matrix: Tensor) -> None:
        left, right = self._left, self._right
        for side in (left, right):
            if side is not None:
                side.sketch.zero_()  # stays so where the shard is empty
        for start, stop, piece in self._pieces(matrix):
            if left is not None:
                left.sketch.addmm_(left.basis_T[:, start:stop], piece)
            if right is not None:
                right.sketch[:, start:stop] = right.basis_T @ piece.T

    def _apply_rounded(self, matrix: Tensor) -> None:
        left, right = self._left, self._right
        for start, stop, piece in self._pieces(matrix):
            if left is not None:
                piece.addmm_(left.basis[start:stop], left.sketch, alpha=-1)
            if right is not None:
                piece.addmm_(right.sketch_T[start:stop], right.basis_T, alpha=-1)
            matrix[start:stop] = piece

    def _pieces(self, matrix: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, those rows in full precision), all in the same scratch memory."""
        rows, columns = matrix.shape
        if not matrix.numel():
            return
        scratch = self._scratch.get(matrix.device)
        if scratch is None or scratch.numel() < columns:
            scratch = matrix.new_empty(max(SCRATCH_NUMEL, columns), dtype=self._dtype)
            self._scratch[matrix.device] = scratch
        height = scratch.numel() // columns
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            piece = scratch[: (stop - start) * columns].view(stop - start, columns)
            piece.copy_(matrix[start:stop])
            yield start, stop, piece
