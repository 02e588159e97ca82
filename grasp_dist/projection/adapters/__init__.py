"""Adapters: a framework's state -> fragments. The only code that knows the framework; imported lazily.

Handled: plain and DDP tensors, FSDP2 DTensors on a one-dimensional mesh. What no adapter handles is refused by name,
before training starts.
"""

from __future__ import annotations

from torch import nn

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import Block

__all__ = ["make_fragment", "refuse_unsupported"]


def refuse_unsupported(model: nn.Module) -> None:
    """Raise `InputError` for a model whose parameters no adapter handles."""
    remedy = "shard with FSDP2 (torch.distributed.fsdp.fully_shard), or use DDP or a single process"
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise InputError(
                f"the model is wrapped by FSDP1 (FullyShardedDataParallel), whose flat parameters GRASP "
                f"cannot project yet; {remedy}"
            )
        if "DeepSpeedEngine" in kinds:
            raise InputError(f"the model is a DeepSpeed engine, whose partitions GRASP cannot project yet; {remedy}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            raise InputError(f"{name!r} is partitioned by DeepSpeed ZeRO, which GRASP cannot project yet; {remedy}")


def make_fragment(name: str, parameter: nn.Parameter) -> Block:
    """This rank's fragment of a protected parameter, (rows, columns) or (rows,).

    Raises `InputError` for a kind or placement of tensor that no adapter handles.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        from grasp_dist.projection.adapters import fsdp2

        return fsdp2.block(name, parameter)
    from grasp_dist.projection.adapters import plain

    return plain.block(name, parameter)
