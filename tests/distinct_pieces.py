"""What ranks do that save numbers of their own; apart, so that their processes import little else."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grasp_dist.training.checkpoints.pieces import FlatPiece

__all__ = ["SHAPES", "save_distinct"]

SHAPES = {"model.a.lora_A.default.weight": (5, 7), "model.b.lora_B.default.weight": (11, 3), "optimizer.step.x": (1,)}


def save_distinct(folder: str) -> dict[str, Tensor]:
    """Each rank saves numbers of its own, one of them a NaN with a payload; returns them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(100 + rank)
    tensors, own = {}, {}
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        start, stop = (min(numel, -(-numel * at // world)) for at in (rank, rank + 1))
        own[name] = torch.randn(stop - start, generator=generator)
        if stop > start and rank == 1:
            own[name].view(torch.int32)[0] = 0x7FC01234
        tensors[name] = FlatPiece(own[name], start, numel)
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(10.0).view(2, 5)
    tensors["pins.p.write"] = distribute_tensor(whole, mesh, [Shard(1)])
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    return own
