"""What alternatives share while they train: hooks on the residual stream, and the base without a second model.

Hooks stay for a whole run: what is computed again in the backward pass (activation checkpointing) meets them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from grasp_dist.architecture import decoder_layers
from grasp_dist.errors import InputError

__all__ = ["Hook", "check_layers", "hooked", "residual_of", "without_adapter"]

Hook = Callable[[Tensor], "Tensor | None"]
"""hook(residual stream behind a layer, (sequences, tokens, dim)) -> what goes on in its place; None: the same."""


def check_layers(model: nn.Module, layers: Sequence[int] | None) -> list[int]:
    """Numbers of decoder layers, all of them for None. Raises `InputError` for one that is not there."""
    count = len(decoder_layers(model))
    for layer in layers or []:
        if not 0 <= layer < count:
            raise InputError(f"there is no layer {layer}: the model has {count}, counted from 0")
    return list(range(count)) if layers is None else sorted(set(layers))


@contextlib.contextmanager
def hooked(model: nn.Module, hooks: dict[int, Hook]) -> Iterator[None]:
    """While open, what leaves these layers passes through their hooks, in every forward pass."""
    modules = [module for _, module in decoder_layers(model)]
    handles = [modules[layer].register_forward_hook(_forward_hook(hook)) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual_of(output: Any) -> Tensor:
    """The residual stream in what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _forward_hook(hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    def forward_hook(module: nn.Module, args: Any, output: Any) -> Any:
        changed = hook(residual_of(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return forward_hook


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While open, the model is its base. (`PeftModel.disable_adapter` would also change which parameters are trained,
    which sharding engines do not expect.) Raises `InputError` for a model without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise InputError("the base is the model without its adapter, and this fine-tune has none; use method: lora")
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
