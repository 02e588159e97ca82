"""Plain tensors: one process, or replicas that DDP keeps equal. Every rank holds the whole matrix; nothing to sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import Block, as_matrix

__all__ = ["block"]


def block(name: str, parameter: nn.Parameter) -> Block:
    """The whole matrix."""
    if parameter.layout is not torch.strided or parameter.is_meta:
        what = "on the meta device" if parameter.is_meta else f"a {parameter.layout} tensor"
        raise InputError(f"{name!r} is {what}; build the projector when the weights are in memory, as dense tensors")
    rows, columns = as_matrix(parameter).shape
    return Block(
        shape=(rows, columns),
        rows=(0, rows),
        columns=(0, columns),
        row_group=None,
        column_group=None,
        check_group=dist.group.WORLD if dist.is_available() and dist.is_initialized() else None,
        local=as_matrix,
        distribute=None,
    )
