"""FSDP2: DTensors on a one-dimensional mesh, Shard(0), Shard(1) or replicated; uneven and empty shards included.

Only local tensors are touched: DTensor arithmetic would gather.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import Block, as_matrix

__all__ = ["block"]


def block(name: str, parameter: nn.Parameter) -> Block:
    """The block that this rank holds. Raises `InputError` for other meshes and placements, by name."""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    remedy = "shard with fully_shard over a one-dimensional mesh"
    if mesh.ndim != 1:
        raise InputError(
            f"{name!r} lies on a device mesh with axes {mesh.mesh_dim_names or mesh.shape} (HSDP, or FSDP with tensor "
            f"parallelism), which GRASP cannot project yet; {remedy}"
        )
    (placement,) = placements
    if parameter.is_meta:
        raise InputError(f"{name!r} is on the meta device; build the projector when the weights are in memory")
    # _StridedShard is no Shard, and Partial holds no weight at all.
    if not isinstance(placement, (Shard, Replicate)):
        raise InputError(f"{name!r} is placed as {placement}, which GRASP cannot project yet; {remedy}")
    dim = placement.dim if isinstance(placement, Shard) else None

    size, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    spans = [(start, start + length) for start, length in zip(offset, size, strict=True)]
    if parameter.ndim == 1:
        spans.append((0, 1))
    rows, columns = as_matrix(parameter).shape if parameter.ndim == 2 else (parameter.shape[0], 1)
    cut = mesh.size() > 1
    group = mesh.get_group()

    def local(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor) or tensor.placements != placements:
            found = tensor.placements if isinstance(tensor, DTensor) else type(tensor).__name__
            raise InputError(f"the weight {name!r} is sharded as {placements}, but its gradient or start is {found}")
        return as_matrix(tensor.to_local())

    def distribute(sketch: Tensor, length: int) -> Tensor:
        k = sketch.shape[0]
        return DTensor.from_local(sketch, mesh, [Shard(1)], run_check=False, shape=(k, length), stride=(length, 1))  # type: ignore[arg-type]

    return Block(
        shape=(rows, columns),
        rows=spans[0],
        columns=spans[1],
        row_group=group if cut and dim == 0 else None,
        column_group=group if cut and dim == 1 else None,
        check_group=group,
        local=local,
        distribute=distribute,
    )
