"""Tensors that a torch optimizer steps directly: plain ones, replicas that DDP keeps equal, and DTensors.

DTensors come from FSDP2, HSDP, tensor parallelism, or FSDP on top of it, on meshes of any number of axes; every
placement but partial sums is handled, uneven and empty shards included. Only local tensors are touched: DTensor
arithmetic would gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.fragments import Block, Box, Span, Storage, stack_shape

__all__ = ["Tensors"]


class Tensors:
    """A model of plain tensors and DTensors."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def fragment(self, name: str, parameter: nn.Parameter) -> Block:
        if parameter.layout is not torch.strided or parameter.is_meta:
            what = "on the meta device" if parameter.is_meta else f"a {parameter.layout} tensor"
            raise InputError(f"{name!r} is {what}; build the projector when the weights are in memory and dense")
        if isinstance(parameter, DTensor):
            return self._sharded(name, parameter)
        return _whole(parameter)

    owned = staticmethod(torch_optimizers.owned)
    hook = staticmethod(torch_optimizers.hook)
    handles_overflow = staticmethod(torch_optimizers.handles_overflow)
    beside = staticmethod(torch_optimizers.beside)

    def _sharded(self, name: str, parameter: Any) -> Block:
        mesh, placements, shape = parameter.device_mesh, parameter.placements, tuple(parameter.shape)
        for placement in placements:
            if not isinstance(placement, (Shard, Replicate, _StridedShard)):
                raise InputError(f"{name!r} is placed as {placement}, which is no weight yet; reduce it first")
        spans = [_span(name, parameter, dim) for dim in range(len(shape))]
        # The stack's dimensions: experts, rows, columns.
        lead = 1 if len(shape) == 3 else 0
        dims = {"experts": 0 if lead else None, "rows": lead, "columns": lead + 1 if len(shape) > 1 else None}
        axes = {what: _axes(mesh, placements, dim) for what, dim in dims.items()}
        row_group = self._group(mesh, axes["rows"])
        column_group = self._group(mesh, axes["columns"])
        both = row_group is not None and column_group is not None

        def local(tensor: Any) -> Tensor:
            if not isinstance(tensor, DTensor) or tensor.placements != placements:
                found = tensor.placements if isinstance(tensor, DTensor) else type(tensor).__name__
                raise InputError(f"{name!r} is sharded as {placements}, but its gradient or start is {found}")
            return tensor.to_local()

        def gradient() -> Tensor | None:
            found = parameter.grad
            return None if found is None else local(found)

        def like(tensor: Tensor) -> Tensor:
            return local(tensor) if isinstance(tensor, DTensor) else tensor[tuple(slice(*span) for span in spans)]

        def distribute(sketch: Tensor, along: int) -> Tensor:
            dim = dims["rows" if along == 1 else "columns"]
            moved = [_moved(placement, {lead - 1: 0, dim: lead + 1}) for placement in placements]
            piece = sketch if lead else sketch[0]
            if all(placement.is_replicate() for placement in moved):
                return piece
            whole = (*shape[:lead], sketch.shape[1], 1 if dim is None else shape[dim])
            stride = tuple(math.prod(whole[index + 1 :]) for index in range(len(whole)))
            return DTensor.from_local(piece, mesh, moved, run_check=False, shape=torch.Size(whole), stride=stride)

        return Block(
            shape=stack_shape(shape),
            box=_box(spans),
            row_group=row_group,
            column_group=column_group,
            both_group=self._group(mesh, [*axes["rows"], *axes["columns"]]) if both else None,
            tile_group=self._group(mesh, [axis for found in axes.values() for axis in found]),
            check_group=self._group(mesh, [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]),
            storage=Storage(
                weight=lambda: local(parameter).detach(),
                gradient=gradient,
                like=like,
            ),
            distribute=distribute,
        )

    def _group(self, mesh: DeviceMesh, axes: Sequence[int]) -> dist.ProcessGroup | None:
        """The ranks along these axes of the mesh; None for no axes. Collective among them where it is a new one."""
        if not axes:
            return None
        if len(axes) == 1:
            return mesh.get_group(axes[0])
        here = mesh.get_coordinate()
        assert here is not None, "this rank is not in the mesh"
        index = tuple(slice(None) if axis in axes else here[axis] for axis in range(mesh.ndim))
        ranks = tuple(sorted(mesh.mesh[index].reshape(-1).tolist()))
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
        return self._groups[ranks]


def _whole(parameter: nn.Parameter) -> Block:
    shape = stack_shape(tuple(parameter.shape))
    initialised = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    experts, rows, columns = shape
    return Block(
        shape=shape,
        box=Box((0, experts), (0, rows), (0, columns)),
        row_group=None,
        column_group=None,
        both_group=None,
        tile_group=None,
        check_group=dist.group.WORLD if initialised else None,
        storage=Storage(
            weight=parameter.detach, gradient=lambda: parameter.grad, like=lambda tensor: tensor.view(parameter.shape)
        ),
    )


def _axes(mesh: DeviceMesh, placements: Sequence[Placement], dim: int | None) -> list[int]:
    """The axes of the mesh that cut this dimension into more than one piece."""
    return [
        axis
        for axis, placement in enumerate(placements)
        if getattr(placement, "dim", None) == dim and dim is not None and mesh.size(axis) > 1
    ]


def _span(name: str, parameter: Any, dim: int) -> Span:
    """Which indices of a dimension are here.

    Shards are cut from the first mesh axis to the last, but a strided one (FSDP on top of tensor parallelism) after the
    axes behind it. Raises `InputError` if what is here is not one run of indices, or not as long as the local tensor.
    """
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    cuts = [(axis, p) for axis, p in enumerate(parameter.placements) if getattr(p, "dim", None) == dim]
    strided = [(axis, p) for axis, p in cuts if isinstance(p, _StridedShard)]
    start, stop = 0, parameter.shape[dim]
    for axis, _ in [cut for cut in cuts if cut not in strided] + strided[::-1]:
        size = -(-(stop - start) // mesh.size(axis))  # as torch.chunk: the last ones may be empty
        start = min(start + coordinate[axis] * size, stop)
        stop = min(start + size, stop)
    in_order = all(p.split_factor == math.prod(mesh.size(a) for a, _ in cuts if a > axis) for axis, p in strided)
    here = parameter.to_local().shape[dim]
    if not in_order or stop - start != here:
        raise InputError(
            f"{name!r} of shape {tuple(parameter.shape)} is placed as {parameter.placements} on the mesh "
            f"{tuple(mesh.shape)}, and the {here} indices of dimension {dim} that are here are no single run; choose "
            "mesh sizes that divide the dimension, or the usual order of FSDP on top of tensor parallelism"
        )
    return start, stop


def _moved(placement: Placement, dims: dict[int | None, int]) -> Placement:
    """The placement of a sketch: sharded as its dimensions are in the stack, and whole along the others."""
    dim = getattr(placement, "dim", None)
    if dim not in dims or dim is None:
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(dims[dim], split_factor=placement.split_factor)
    return Shard(dims[dim])


def _box(spans: list[Span]) -> Box:
    if len(spans) == 1:
        return Box((0, 1), spans[0], (0, 1))
    if len(spans) == 2:
        return Box((0, 1), spans[0], spans[1])
    return Box(spans[0], spans[1], spans[2])
