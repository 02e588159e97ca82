"""Flat runs: parameters that are laid end to end and cut into partitions of equal length, one for each rank.

Both FSDP1 and DeepSpeed ZeRO shard like this. Everything here is arithmetic that comes out the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import Span

__all__ = ["Groups", "Run"]


class Groups:
    """Process groups that can sum where the numbers are: masters that are offloaded lie on the CPU, while the ranks
    that share them usually talk over NCCL."""

    def __init__(self) -> None:
        self._on_cpu: dict[dist.ProcessGroup, dist.ProcessGroup] = {}

    def reaching(self, device: torch.device, group: dist.ProcessGroup) -> dist.ProcessGroup:
        """This group, or one over gloo of the same ranks; collective among them when it is first asked for."""
        if device.type in dist.get_backend_config(group):
            return group
        if group not in self._on_cpu:
            ranks = dist.get_process_group_ranks(group)
            self._on_cpu[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return self._on_cpu[group]


@dataclass(frozen=True)
class Run:
    """Where one parameter lies in a flat run."""

    shape: tuple[int, ...]
    """The parameter's own shape."""
    offset: int
    """Where it begins in the run."""
    partition: int
    """Numbers in one rank's partition, padding included."""
    rank: int
    world_size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> Span:
        """Which of the parameter's numbers this rank holds; (0, 0) for none."""
        start, stop = (
            min(max(edge * self.partition - self.offset, 0), self.numel) for edge in (self.rank, self.rank + 1)
        )
        return (start, stop) if start < stop else (0, 0)

    @property
    def length(self) -> int:
        start, stop = self.span
        return stop - start

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where in the parameter one rank's piece ends and the next begins."""
        first = max(1, self.offset // self.partition + 1) * self.partition - self.offset
        last = min(self.world_size * self.partition - self.offset, self.numel)
        return tuple(range(first, last, self.partition))

    def narrow(self, partition: Tensor, base: int = 0) -> Tensor:
        """This rank's piece in its partition, which begins at `base` of the flat tensor given."""
        if not self.length:
            return partition.detach()[:0]
        position = self.offset + self.span[0] - self.rank * self.partition
        return partition.detach().narrow(0, base + position, self.length)

    def piece(self, value: Tensor) -> Tensor:
        """This rank's piece of a tensor of the parameter's shape, or of one that is the piece already."""
        if tuple(value.shape) == self.shape:
            return value.detach().reshape(-1)[slice(*self.span)]
        if value.numel() == self.length:
            return value.detach().reshape(-1)
        raise InputError(
            f"a tensor of shape {tuple(value.shape)} is neither a whole parameter of shape {self.shape} nor this "
            f"rank's piece of it ({self.length} numbers); pass one of them"
        )
