"""The base model as detection reads it: names and shapes at once, weights one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grasp_dist.architecture import canonical_name, is_conv1d, linear_modules
from grasp_dist.detection.sources import model_skeleton, open_model
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_reference

__all__ = ["BaseWeights", "module_reader", "open_base"]


@dataclass(frozen=True)
class BaseWeights:
    """`skeleton`: the module, maybe without content. `reference`: {"id", "revision", "hash"}. `model`: what was opened.
    `stored`: reads a tensor as the model stores it."""

    model: nn.Module | Path
    skeleton: nn.Module
    reference: dict[str, Any]
    stored: Callable[[str], Tensor]

    def read(self, name: str) -> Tensor:
        """A whole weight, (out, in) of a linear module or (dim,) of a norm, fp64 on the CPU; nothing of it is kept.

        Raises `InputError` for a name that the model does not have.
        """
        tensor = self.stored(name).double()
        module = linear_modules(self.skeleton).get(name.removesuffix(".weight"))
        return tensor.mT if module is not None and is_conv1d(module) else tensor


def open_base(model: nn.Module | str | os.PathLike[str]) -> BaseWeights:
    """The weights of a model directory (safetensors), or of a module that holds them whole.

    Raises `InputError` for a directory that is no causal language model's.
    """
    if isinstance(model, nn.Module):
        return BaseWeights(model, model, {"id": None, "revision": None, "hash": None}, module_reader(model))
    folder = Path(model)
    reference = model_reference(folder)
    if reference["hash"] is None:
        raise InputError(f"there is no model directory {folder}; give the one that was fine-tuned, on this machine")
    skeleton = model_skeleton(folder)
    source = open_model(folder, skeleton)

    def read(name: str) -> Tensor:
        if name not in source.shapes:
            raise InputError(f"{folder} has no weight {name!r}; give the base model that was fine-tuned")
        return source.read(name)

    return BaseWeights(folder, skeleton, reference, read)


def module_reader(model: nn.Module) -> Callable[[str], Tensor]:
    """Reads a module's parameters by canonical name, as stored. Raises `InputError` for one that is not there, or not
    whole in this process."""
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        if name not in parameters:
            raise InputError(f"{type(model).__name__} has no weight {name!r}; give the base model that was fine-tuned")
        tensor = parameters[name].detach()
        if tensor.is_meta or hasattr(tensor, "placements"):
            raise InputError(
                f"{name!r} is not whole in this process (sharded or without content); give the model directory"
            )
        return tensor.cpu()

    return read
