"""`fully_shard` over the decoder layers of any model, and the geometry of what it leaves on a rank.

What must hold before: the model is on the meta device and has its adapters, ties and dtypes. Afterwards its parameters
are DTensors on a 1-D mesh; `materialize` gives them memory, and `weights.py` fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from grasp_dist.architecture import decoder_layers
from grasp_dist.training import zero_parameters
from grasp_dist.training.parallel import Parallel

__all__ = [
    "checkpoint_layers",
    "fill",
    "local_slices",
    "local_tensor",
    "materialize",
    "shard",
    "whole_tensor",
]


def checkpoint_layers(model: nn.Module, *, check: bool = True) -> None:
    """Recompute each decoder layer in the backward pass, in place; call before `shard`.

    check: see that what is recomputed has the shapes of the first time. With ZeRO-3 it has not: parameters that were
    used are empty again until their own backward pass.
    """
    layers = {id(layer) for _, layer in decoder_layers(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                settings: dict[str, Any] = {} if check else {"determinism_check": "none"}
                setattr(parent, name, checkpoint_wrapper(child, **settings))


def shard(model: nn.Module, parallel: Parallel, *, precision: str) -> None:
    """`fully_shard` each decoder layer and then the rest, in place. Gradients are averaged over ranks.

    precision: "bf16" computes in bf16 and reduces gradients in fp32; "fp32" computes as the parameters are.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrappers = {
        id(module._checkpoint_wrapped_module): module
        for module in model.modules()
        if isinstance(module, CheckpointWrapper)
    }
    for _, layer in decoder_layers(model):
        # Outside of the checkpoint wrapper, so that the recomputation finds the parameters gathered.
        unit = wrappers.get(id(layer), layer)
        fully_shard(unit, mesh=parallel.mesh, mp_policy=policy, reshard_after_forward=parallel.reshard_after_forward)
    # What is left is the embedding and the head, which the backward pass begins with: not worth freeing in between.
    fully_shard(model, mesh=parallel.mesh, mp_policy=policy, reshard_after_forward=False)
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unsharded, f"fully_shard left {unsharded[:3]} whole"


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give every meta parameter uninitialised memory on `device`, in place, and move the buffers there.

    Buffers keep their values, tied parameters stay one, and what `fully_shard` knows of a parameter stays valid
    (`nn.Module.to_empty` would lose the first two).
    """
    for parameter in list(model.parameters()):
        if parameter.is_meta:
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def fill(parameter: Tensor, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Set what this rank holds of a parameter, cast to its dtype. read(slices) -> that part of the whole."""
    if zero_parameters.is_partitioned(parameter):
        zero_parameters.fill(parameter, read)
        return
    local = local_tensor(parameter)
    if local.numel():
        local.copy_(read(local_slices(parameter)))


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank holds, one slice per dimension; maybe empty."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of it, detached, of what DeepSpeed trains the fp32 master; collective for a DTensor and with ZeRO."""
    if zero_parameters.is_zero(tensor):
        return zero_parameters.whole(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
