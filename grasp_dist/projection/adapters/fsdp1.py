"""FSDP1: `torch.distributed.fsdp.FullyShardedDataParallel` with use_orig_params=True.

Each FSDP unit lays its parameters end to end in one flat parameter and cuts that evenly over the ranks of its process
group, so rows are cut. The optimizer's parameters are views of the local shard, which is the master where there is
mixed precision, and lies on the CPU where parameters are offloaded.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Groups, Run
from grasp_dist.projection.fragments import Interval, Storage, stack_shape

__all__ = ["Fsdp1", "is_fsdp1"]


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of the model is wrapped in FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())


class Fsdp1:
    """A model whose parameters, or some of them, are in FSDP units. Raises `InputError` for use_orig_params=False and
    for FSDP on top of tensor parallelism."""

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        self.module = model
        # id of a parameter -> (its unit, where it stands in the unit's flat parameter)
        self._places: dict[int, tuple[Any, int]] = {}
        self._groups = Groups()
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            flat = None if unit._handle is None else unit._handle.flat_param
            if flat is None:
                continue
            if not unit._use_orig_params:
                raise InputError(
                    "FullyShardedDataParallel was built with use_orig_params=False, which hides the weights that the "
                    "basis names in one flat parameter; build it with use_orig_params=True"
                )
            if any(extension is not None for extension in flat._param_extensions):
                raise InputError(
                    "FullyShardedDataParallel on top of tensor parallelism is not supported; use fully_shard (FSDP2)"
                )
            for index, parameter in enumerate(flat._params or ()):
                self._places[id(parameter)] = unit, index
            self._groups_of(unit)  # here, not in `fragment`: new groups are collective

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's logical shape: its own is that of the local piece."""
        if id(parameter) not in self._places:
            return tuple(parameter.shape)
        unit, index = self._places[id(parameter)]
        return tuple(unit._handle.flat_param._shapes[index])

    def fragment(self, name: str, parameter: nn.Parameter) -> Interval:
        """The rank's piece of a parameter. Raises `InputError` for one that is in no FSDP unit."""
        if id(parameter) not in self._places:
            raise InputError(
                f"{name!r} is not in any FullyShardedDataParallel unit (an ignored module?), while others are; wrap "
                "the module that holds it"
            )
        unit, index = self._places[id(parameter)]
        handle = unit._handle
        run = _run(handle, index)
        group, check_group = self._groups_of(unit)

        def weight() -> Tensor:
            return run.narrow(_local_shard(handle))

        def gradient() -> Tensor | None:
            if not run.length:
                return run.narrow(_local_shard(handle))
            found = parameter.grad
            return found.detach().view(-1) if found is not None and found.numel() == run.length else None

        def copies() -> list[Tensor]:
            gathered = _gathered(handle)
            if gathered is None:
                return []
            return [gathered.narrow(0, run.offset, run.numel).view(run.shape)]

        return Interval(
            shape=stack_shape(run.shape),
            span=run.span,
            cuts=run.cuts,
            group=group if run.world_size > 1 else None,
            check_group=check_group,
            storage=Storage(weight=weight, gradient=gradient, like=run.piece, copies=copies),
        )

    def _groups_of(self, unit: Any) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
        """The ranks that share a parameter, and those that hold a piece or a replica."""
        device, every = _local_shard(unit._handle).device, _all_ranks(unit)
        shared = self._groups.reaching(device, unit._handle.process_group)
        return shared, None if every is None else self._groups.reaching(device, every)

    owned = staticmethod(torch_optimizers.owned)
    hook = staticmethod(torch_optimizers.hook)
    handles_overflow = staticmethod(torch_optimizers.handles_overflow)
    beside = staticmethod(torch_optimizers.beside)


def _run(handle: Any, index: int) -> Run:
    flat = handle.flat_param
    ends = list(accumulate(flat._numels_with_padding))
    stop = [end for end, padding in zip(ends, flat._is_padding_mask, strict=True) if not padding][index]
    return Run(
        shape=tuple(flat._shapes[index]),
        offset=stop - flat._numels[index],
        partition=flat._sharded_size.numel(),
        rank=handle.rank if handle.uses_sharded_strategy else 0,
        world_size=handle.world_size if handle.uses_sharded_strategy else 1,
    )


def _local_shard(handle: Any) -> Tensor:
    """The optimizer's storage, also while the parameters are views of gathered ones. Unknown before the first forward,
    up to which the flat parameter is the shard itself."""
    flat = handle.flat_param
    return getattr(flat, "_local_shard", flat.data)


def _gathered(handle: Any) -> Tensor | None:
    """The unit's gathered parameters, where a forward pass without a backward pass has left them behind."""
    gathered = getattr(handle.flat_param, "_full_param_padded", None)
    if gathered is None or gathered.untyped_storage().size() == 0:
        return None
    return gathered.detach()


def _all_ranks(unit: Any) -> dist.ProcessGroup | None:
    """The ranks that hold a piece or, with HYBRID_SHARD, a replica."""
    shard = unit._handle.process_group
    replicate = getattr(unit, "_inter_node_pg", None)
    size = shard.size() * (1 if replicate is None else replicate.size())
    if size == 1:
        return None
    if size == shard.size():
        return shard
    if size != dist.get_world_size():
        raise InputError(
            f"HYBRID_SHARD spans {size} of {dist.get_world_size()} ranks; use shard and replicate groups that cover "
            "all ranks together"
        )
    return dist.group.WORLD
