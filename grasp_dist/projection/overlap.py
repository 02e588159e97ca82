"""Gradient projection during the backward pass: each chunk of weights is sketched as soon as its gradients are there,
and its sums travel, on process groups of their own, while the backward pass goes on.

The chunks leave in one fixed order, on whatever rank their gradients come first, so that the ranks' collectives match.
What the backward pass has left over leaves when the step begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection.fragments import Block, Fragment
from grasp_dist.projection.layout import Entry
from grasp_dist.projection.plan import Plan, build_plan
from grasp_dist.projection.runtime import Runtime
from grasp_dist.projection.work import Scratch

__all__ = ["CHUNK", "BackwardOverlap"]

CHUNK = 16
"""Parameters whose sums travel together."""


class BackwardOverlap:
    """The passes over one plan's gradients, cut into chunks. Collective to make; for fragments that are blocks."""

    def __init__(self, plan: Plan, basis: SpuriousBasis) -> None:
        twins: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
        backwards = plan.entries[::-1]  # about the order in which gradients come
        shared = [entry for entry in backwards if entry.tile_group is not None]
        groups = [shared[start : start + CHUNK] for start in range(0, len(shared), CHUNK)]
        # Whole weights need no sums. They are projected before DDP sends them, one by one.
        alone = [[entry] for entry in backwards if entry.tile_group is None]
        scratch = Scratch(plan.dtype)
        self._chunks = [_Chunk(group, basis, twins, scratch) for group in groups]
        self._alone = [_Chunk(group, basis, twins, scratch) for group in alone]
        self._home = {key: chunk for chunk in [*self._chunks, *self._alone] for key in chunk.parameters}
        self._next = 0
        self._agree = _twin(dist.group.WORLD, twins) if self._alone and dist.is_initialized() else None
        self._handles: list[Any] = []
        self._totals: dict[_Chunk, Tensor] = {}
        self._device = plan.entries[0].fragment.storage.weight().device if plan.entries else torch.device("cpu")

    def hook(self) -> Callable[[], None]:
        """Start with the next backward pass; returns what takes the hooks off again."""
        for chunk in (*self._chunks, *self._alone):
            for entry in chunk.plan.entries:
                self._handles.append(entry.target.parameter.register_post_accumulate_grad_hook(self._arrive))

        def remove() -> None:
            for handle in self._handles:
                handle.remove()
            self._handles = []

        return remove

    @torch.no_grad()
    def finish(self) -> bool:
        """Project what is left. Returns whether all gradients were finite, on all ranks alike."""
        self._complete_round()
        totals = [total.to(self._device) for chunk, total in self._totals.items() if chunk.has_gradients]
        self._totals = {}
        total = torch.stack(totals).sum() if totals else torch.zeros((), device=self._device)
        if self._agree is not None:  # DDP's ranks have looked at gradients of their own
            total = total * 0
            dist.all_reduce(total, group=self._agree)
        return bool(total.isfinite())

    @torch.no_grad()
    def _arrive(self, parameter: Tensor) -> None:
        chunk = self._home[id(parameter)]
        if chunk.is_alone:
            chunk.start()
            self._totals[chunk] = chunk.finish()
            return
        if chunk.started or id(parameter) in chunk.arrived:  # another micro-batch
            self._complete_round()
        chunk.arrived.add(id(parameter))
        while self._next < len(self._chunks) and self._chunks[self._next].is_ready:
            self._start_next()

    def _start_next(self) -> None:
        self._chunks[self._next].start()
        if self._next:
            before = self._chunks[self._next - 1]
            self._totals[before] = before.finish()
        self._next += 1

    def _complete_round(self) -> None:
        if not any(chunk.arrived or chunk.started for chunk in self._chunks):
            return
        while self._next < len(self._chunks):
            self._start_next()
        self._totals[self._chunks[-1]] = self._chunks[-1].finish()
        self._next = 0


class _Chunk:
    """A few entries with a plan and buffers of their own."""

    def __init__(
        self,
        entries: Sequence[Entry],
        basis: SpuriousBasis,
        twins: dict[dist.ProcessGroup, dist.ProcessGroup],
        scratch: Scratch,
    ) -> None:
        fragments = [_on_twins(entry.fragment, twins) for entry in entries]
        self.plan = build_plan([entry.target for entry in entries], fragments, basis)
        for bucket in self.plan.buckets:  # the flag's
            if bucket.group is dist.group.WORLD:
                bucket.group = _twin(bucket.group, twins)
        self.parameters = [id(entry.target.parameter) for entry in entries]
        self.arrived: set[int] = set()
        self.is_alone = entries[0].tile_group is None
        self._runtime = Runtime(self.plan, scratch)
        self._sources: list[Tensor | None] = []
        self._pending: list[Any] | None = None

    @property
    def started(self) -> bool:
        return self._pending is not None

    @property
    def is_ready(self) -> bool:
        return len(self.arrived) == len(self.parameters)

    @property
    def has_gradients(self) -> bool:
        return any(entry.fragment.storage.gradient() is not None for entry in self.plan.entries)

    def start(self) -> None:
        self._sources = [entry.fragment.storage.gradient() for entry in self.plan.entries]
        self._pending = self._runtime.start(self._sources)

    def finish(self) -> Tensor:
        """A number that is finite where all gradients are. (The step is left out where they are not.)"""
        assert self._pending is not None
        total = self._runtime.finish(self._sources, self._pending)
        self._sources, self._pending, self.arrived = [], None, set()
        return total


def _on_twins(fragment: Fragment, twins: dict[dist.ProcessGroup, dist.ProcessGroup]) -> Block:
    """The same block, its sums on process groups that nobody else uses."""
    assert isinstance(fragment, Block)
    return dataclasses.replace(
        fragment,
        row_group=_twin(fragment.row_group, twins),
        column_group=_twin(fragment.column_group, twins),
        both_group=_twin(fragment.both_group, twins),
        tile_group=_twin(fragment.tile_group, twins),
    )


def _twin(
    group: dist.ProcessGroup | None, twins: dict[dist.ProcessGroup, dist.ProcessGroup]
) -> dist.ProcessGroup | None:
    if group is None:
        return None
    if group not in twins:
        twins[group] = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    return twins[group]
