"""Adapters: a framework's state -> fragments. The only code that knows the framework; imported lazily.

Handled: plain and DDP tensors and DTensors of every placement (`tensors`), FSDP1 (`fsdp1`), DeepSpeed ZeRO
(`deepspeed`). What no adapter handles is refused by name, before training starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from grasp_dist.projection.fragments import Fragment

__all__ = ["Framework", "recognise"]


class Framework(Protocol):
    """What the projector needs of a framework."""

    module: nn.Module
    """The model in which the basis' weights are found."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's logical shape, which its own need not be while it is sharded."""
        ...

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        """This rank's piece. Raises `InputError` for a kind or placement of tensor that is not handled."""
        ...

    def owned(self, optimizer: Any) -> set[int]:
        """Ids of the model's parameters that this optimizer steps. Raises `InputError` for what is not one."""
        ...

    def hook(self, optimizer: Any, before: Callable[[], None], after: Callable[[int], None]) -> Callable[[], None]:
        """Call `before` once per step, on complete gradients, and `after(unit)` when the fragments of a unit have been
        stepped; returns what takes the hooks off again."""
        ...

    def handles_overflow(self, optimizer: Any) -> bool:
        """Whether the optimizer itself leaves out a step whose gradients are not finite, on all ranks."""
        ...

    def beside(self, optimizer: Any) -> Callable[[nn.Parameter], Tensor | None] | None:
        """What the optimizer steps beside the weights, sharded like them (schedule-free's z); None: nothing."""
        ...


def recognise(model: Any) -> Framework:
    """The adapter for a model or engine. Raises `InputError`, by name, for what it cannot handle."""
    if "deepspeed" in sys.modules:
        from grasp_dist.projection.adapters.deepspeed import Zero, is_deepspeed

        if is_deepspeed(model):
            return Zero(model)
    from grasp_dist.projection.adapters.fsdp1 import Fsdp1, is_fsdp1

    if is_fsdp1(model):
        return Fsdp1(model)
    from grasp_dist.projection.adapters.tensors import Tensors

    return Tensors(model)
