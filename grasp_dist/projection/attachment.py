"""Which optimizers the hooks can be put on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from grasp_dist.errors import InputError
from grasp_dist.projection.targets import Target

__all__ = ["check_ownership", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer whose step runs the hooks, out of Accelerate's wrapper if need be.

    Raises `InputError`, by name, for DeepSpeed's, and for classes that bypass torch's step hooks.
    """
    kind = type(optimizer).__name__
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    if any(base.__module__.partition(".")[0] == "deepspeed" for base in type(optimizer).__mro__):
        raise InputError(f"{kind} is DeepSpeed's, which GRASP cannot attach to yet; use FSDP2 and a torch optimizer")
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"attach() wants a torch.optim.Optimizer, got {kind}")
    # Optimizer.__init__ replaces the class' step by one that runs the hooks, and marks it.
    if not getattr(type(optimizer).step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise InputError(f"{kind} does not run torch's step hooks, so GRASP cannot attach to it; use a stock optimizer")
    return optimizer


def check_ownership(optimizer: Optimizer, targets: Sequence[Target]) -> None:
    """Raise `InputError` unless the optimizer holds every protected parameter."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [target.name for target in targets if id(target.parameter) not in owned]
    if missing:
        raise InputError(
            f"the optimizer does not hold {missing[0]!r} ({len(missing)} of {len(targets)} protected parameters are "
            "missing); build the projector and the optimizer from the same model, after sharding it"
        )
