"""Parameters that DeepSpeed holds: partitioned when they are made (ZeRO-3), filled piece by piece, gathered one by one.

A model for ZeRO-3 is built on the meta device like every other, with its adapters; `partition` then gives memory to one
parameter after the other and keeps this rank's piece of it, so that no rank ever holds more than one whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.projection.adapters.flat import Run

__all__ = ["fill", "is_partitioned", "is_zero", "local_piece", "partition", "release", "shape_of", "whole"]

_MARKS = ("_hp_mapping", "_z3_optimizer")
"""What the optimizers of ZeRO-1 and -2, and of ZeRO-3, leave on the parameters that they step."""


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this is a ZeRO-3 parameter: its own data is empty while it is not gathered."""
    return hasattr(tensor, "ds_tensor")


def is_zero(tensor: Tensor) -> bool:
    """Whether DeepSpeed holds this parameter, or a master of it."""
    return is_partitioned(tensor) or any(hasattr(tensor, mark) for mark in _MARKS)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The logical shape, also of a partitioned parameter."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def partition(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Partition every parameter over all processes for ZeRO-3, in place; collective.

    model: with its adapters, ties and dtypes; parameters on the meta device get uninitialised memory, one at a time.
    settings: the configuration that deepspeed.initialize is given later. DeepSpeed is imported already.
    """
    import deepspeed

    first: Any = None
    for parameter in list(model.parameters()):
        if parameter.is_meta:
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)
        if first is not None:
            first.convert_to_zero_parameters(param_list=[parameter])
            continue
        holder = nn.Module()
        holder.parameter = parameter
        deepspeed.zero.Init(module=holder, config_dict_or_path=settings)
        first = parameter


def local_piece(parameter: Tensor) -> Tensor:
    """This rank's piece of a partitioned parameter, 1-D without padding, maybe empty; shares memory."""
    return _run(parameter).narrow(parameter.ds_tensor)  # type: ignore[attr-defined]


def release(parameter: Any) -> None:
    """Let go of what is gathered of a partitioned parameter; of others, nothing."""
    if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


@torch.no_grad()
def fill(parameter: Tensor, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Set this rank's piece of a partitioned parameter that is not gathered, cast to its dtype.

    read(slices, one per dimension) -> that part of the whole; it is asked for the rows that the piece lies in.
    """
    shape = shape_of(parameter)
    start, stop = _run(parameter).span
    if start == stop:
        return
    width = math.prod(shape[1:])
    first, last = start // width, -(-stop // width)
    rows = read(tuple(slice(first, last) if axis == 0 else slice(0, size) for axis, size in enumerate(shape)))
    local_piece(parameter).copy_(rows.reshape(-1)[start - first * width : stop - first * width])


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, detached: its fp32 masters while an engine steps it, else as it is; collective, and on every
    rank."""
    if any(hasattr(parameter, mark) for mark in _MARKS):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    if not is_partitioned(parameter) or parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _run(parameter: Any) -> Run:
    group = parameter.ds_process_group
    return Run(shape_of(parameter), 0, parameter.ds_tensor.ds_numel, dist.get_rank(group), dist.get_world_size(group))
