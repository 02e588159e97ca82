"""Hooks on torch optimizers, which every framework but DeepSpeed steps directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grasp_dist.errors import InputError

__all__ = ["beside", "handles_overflow", "hook", "owned", "swaps_weights", "unwrap"]

_SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer whose step runs the hooks, out of Accelerate's wrapper if need be.

    Raises `InputError`, by name, for DeepSpeed's, and for classes that bypass torch's step hooks.
    """
    while type(optimizer).__name__ in ("AcceleratedOptimizer", "LightningOptimizer"):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        if any(base.__module__.partition(".")[0] == "deepspeed" for base in type(optimizer).__mro__):
            raise InputError(
                f"{kind} is DeepSpeed's, but the model is not the one that it trains; build the projector from the "
                "engine that deepspeed.initialize returned, or from its model"
            )
        raise InputError(f"attach() wants a torch.optim.Optimizer, got {kind}")
    # Optimizer.__init__ replaces the class' step by one that runs the hooks, and marks it.
    if not getattr(type(optimizer).step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise InputError(f"{kind} does not run torch's step hooks, so GRASP cannot attach to it; use a stock optimizer")
    if swaps_weights(optimizer) and kind not in _SCHEDULE_FREE:
        raise InputError(
            f"{kind} puts other weights in place for evaluation (train() and eval()), and GRASP does not know how it "
            f"keeps them; use one of schedulefree's {', '.join(_SCHEDULE_FREE)}, or an optimizer without these modes"
        )
    return optimizer


def owned(optimizer: Any) -> set[int]:
    """Ids of the parameters that the optimizer holds."""
    return {id(parameter) for group in unwrap(optimizer).param_groups for parameter in group["params"]}


def hook(optimizer: Any, before: Callable[[], None], after: Callable[[int], None]) -> Callable[[], None]:
    """Call `before()` and `after(0)` around every step; returns what takes the hooks off again."""
    inner = unwrap(optimizer)
    handles = [
        inner.register_step_pre_hook(lambda *_: before()),
        inner.register_step_post_hook(lambda *_: after(0)),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def beside(optimizer: Any) -> Callable[[nn.Parameter], Tensor | None] | None:
    """What the optimizer steps beside the weights: parameter -> a tensor of its kind, or None before the first step.

    None for all but schedule-free optimizers. There the weights in training are y = (1 - beta) z + beta x, and those
    for evaluation x, which is pinned if y and z are.
    """
    inner = unwrap(optimizer)
    return (lambda parameter: inner.state.get(parameter, {}).get("z")) if swaps_weights(inner) else None


def swaps_weights(optimizer: Any) -> bool:
    """Whether it puts other weights in place for evaluation, as schedule-free optimizers do."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def handles_overflow(optimizer: Any) -> bool:
    """Whether a GradScaler has told a fused optimizer, for the step that begins, to leave it out where gradients are
    not finite. (Of other optimizers the scaler leaves out the whole step, hooks and all.)"""
    return isinstance(getattr(unwrap(optimizer), "found_inf", None), Tensor)
