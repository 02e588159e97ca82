"""The runtime: sketch everything into flat buffers, one all-reduce per process group, apply. Local operations only.

For a box M (r, c) of a fragment, with basis rows P (r, k_l) and Q (c, k_r):

    sketch   C = P^T M,  D^T = Q^T M^T           summed over the ranks that hold the other rows (C) or columns (D)
    minus the pins, in a pin pass                (a gradient's pins are zero)
    apply    M <- M - P (C - E Q^T) - D Q^T      E = C Q, P^T D, or a sum of its own: see `layout.Overlap`;
                                                 of a large box as one product, [P, D] [C - E Q^T; Q^T]

A group's all-reduce is started as soon as its sketches are made and travels while the others are made. Arithmetic is
fp32 (fp64 for fp64 parameters) and never TF32. Half-precision tensors pass through a bounded scratch buffer and are
rounded once; nothing of a weight's size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.projection.fragments import Interval, Span
from grasp_dist.projection.plan import Plan
from grasp_dist.projection.work import BatchWork, EntryWork, Scratch, Source

__all__ = ["Runtime"]

Work = EntryWork | BatchWork


class Runtime:
    """Executes a plan. `sources` are one per entry, in the plan's order."""

    def __init__(self, plan: Plan, scratch: Scratch | None = None) -> None:
        """scratch: to share, with another of the same dtype whose passes do not run at the same time."""
        self.flats = plan.new_flats()
        self._devices = {bucket.device.type for bucket in plan.buckets}
        self.scratch = scratch or Scratch(plan.dtype)
        batched = {index for batch in plan.batches for index in batch.members}
        workers: list[Work] = [BatchWork(batch, self.flats, plan, self.scratch) for batch in plan.batches]
        workers += [
            EntryWork(index, entry, self.flats, plan, self.scratch)
            for index, entry in enumerate(plan.entries)
            if index not in batched
        ]
        units = {entry.fragment.unit for entry in plan.entries}
        self._all = _Pass(plan, workers, self.flats, None)
        self._of_unit = {unit: _Pass(plan, workers, self.flats, unit) for unit in units}

    @torch.no_grad()
    def project(self, gradients: Sequence[Source], *, apply: bool = True) -> bool:
        """Project in place, unless a number is not finite on any rank: then nothing is changed, and False returned,
        on all ranks alike. apply False: only look."""
        with full_precision(self._devices):
            self._all.sketch(gradients, flags=True)
            finite = self._all.finite()
            if finite and apply:
                self._all.apply(gradients)
        return finite

    @torch.no_grad()
    def start(self, gradients: Sequence[Source]) -> list[Any]:
        """The first half of `project`: sketch, and set off the sums. Returns what `finish` needs."""
        with full_precision(self._devices):
            return self._all.launch(gradients, flags=True)

    @torch.no_grad()
    def finish(self, gradients: Sequence[Source], pending: list[Any]) -> Tensor:
        """The second half, without a look from the host: a number that is finite where all gradients are. (Where they
        are not, gradients are spoilt.)"""
        for work in pending:
            work.wait()
        with full_precision(self._devices):
            total = self._all.total()
            self._all.apply(gradients)
        return total

    @torch.no_grad()
    def restore(self, weights: Sequence[Source], pins: Sequence[Tensor] | None = None, unit: int | None = None) -> None:
        """Restore the pins (one flat tensor per bucket; None: zeros) in place, of one unit or of all."""
        chosen = self._all if unit is None else self._of_unit.get(unit)
        if chosen is None:
            return
        with full_precision(self._devices):
            chosen.sketch(weights)
            if pins is not None:
                chosen.subtract(pins)
            chosen.apply(weights)

    @torch.no_grad()
    def sketch(self, sources: Sequence[Source], pins: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The summed sketches, less `pins`, as flat tensors that the next call overwrites."""
        with full_precision(self._devices):
            self._all.sketch(sources)
            if pins is not None:
                self._all.subtract(pins)
        return self.flats


class _Pass:
    """The work of one unit, or of all: which workers, in which order, and which numbers of the flats."""

    def __init__(self, plan: Plan, workers: Sequence[Work], flats: list[Tensor], unit: int | None) -> None:
        self._flats = flats
        self._groups = [bucket.group for bucket in plan.buckets]
        self._flags = {number: bucket.flag for number, bucket in enumerate(plan.buckets) if bucket.flag is not None}
        self._spans: list[Span] = []
        for bucket in plan.buckets:
            sketches = (0, bucket.numel if bucket.flag is None else bucket.flag)
            self._spans.append(sketches if unit is None else bucket.units.get(unit, (0, 0)))
        self._workers = [worker for worker in workers if unit is None or worker.unit == unit]
        # Bucket by bucket: first what completes its sums, so that they can leave.
        self._order: list[tuple[int, list[Work]]] = []
        done: set[Work] = set()
        for number, group in enumerate(self._groups):
            if group is not None:
                members = [worker for worker in self._workers if number in worker.summed_in and worker not in done]
                done.update(members)
                self._order.append((number, members))
        # Several boxes, or none here, may add to a sum that is summed over ranks.
        adding = any(isinstance(entry.fragment, Interval) for entry in plan.entries)
        self._zeroed = [number for number, group in enumerate(self._groups) if group is not None and adding]

    def sketch(self, sources: Sequence[Source], *, flags: bool = False) -> None:
        for work in self.launch(sources, flags=flags):
            work.wait()

    def launch(self, sources: Sequence[Source], *, flags: bool = False) -> list[Any]:
        """Sketch, and set off the sums; returns what to wait for."""
        for number in self._zeroed:
            self._view(number).zero_()
        flagged = self._flags if flags else {}
        pending: list[Any] = []
        seen: list[Tensor] = []
        for number, members in self._order:
            for worker in members:
                worker.sketch_summed(sources)
            if number not in flagged:
                if flagged:
                    seen.append(self._view(number).sum())
                pending.append(self._launch(number))
        for worker in self._workers:
            worker.sketch_local(sources)
        if flagged:
            seen += [self._view(number).sum() for number, group in enumerate(self._groups) if group is None]
        for number, flag in flagged.items():
            # 0 where everything that this rank has sketched is finite, else NaN
            self._flats[number][flag] = sum(total.to(self._flats[number].device) for total in seen) * 0
            pending.append(self._launch(number, flag=True))
        return [work for work in pending if work is not None]

    def subtract(self, pins: Sequence[Tensor]) -> None:
        for number, pin in enumerate(pins):
            start, stop = self._spans[number]
            if stop > start:
                self._view(number).sub_(pin[start:stop])

    def apply(self, sources: Sequence[Source]) -> None:
        for worker in self._workers:
            worker.apply(sources)

    def finite(self) -> bool:
        """Whether every sketch, and every flag, is finite; one look from the host."""
        return bool(self.total().isfinite())

    def total(self) -> Tensor:
        """The sum of all sketches and flags, which is finite where all of them are."""
        sums = [flat.sum() for flat in self._flats if flat.numel()]
        if not sums:
            return torch.zeros(())
        device = next((value.device for value in sums if value.device.type != "cpu"), sums[0].device)
        return torch.stack([value.to(device, non_blocking=True) for value in sums]).sum()

    def _view(self, number: int) -> Tensor:
        start, stop = self._spans[number]
        return self._flats[number][start:stop]

    def _launch(self, number: int, *, flag: bool = False) -> Any:
        start, stop = self._spans[number]
        stop += flag
        if stop == start:
            return None
        return dist.all_reduce(self._flats[number][start:stop], group=self._groups[number], async_op=True)


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
