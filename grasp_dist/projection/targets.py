"""Targets: which parameters of a model move a protected weight, and along which side each must be held.

    weight (out, in)            left: write   right: read
    Conv1D weight (in, out)     left: read    right: write     (GPT-2's linear layer, stored transposed)
    bias (out,)                 left: write
    lora_B (out, r)             left: write                    U^T B = 0
    lora_A (r, in)                            right: read      A V = 0

"left" is contracted over the rows of the stored matrix, "right" over its columns. Frozen parameters cannot move and
need no protection. What moves a protected weight in another way (DoRA, other PEFT methods) is refused by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grasp_dist.architecture import canonical_name, is_conv1d, is_linear
from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError

__all__ = ["Target", "find_targets", "find_unprotected"]

# Starts that change the base weight or begin from a nonzero update; peft's names for them.
_UNPINNED_STARTS = ("pissa", "loftq", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class Target:
    """One trainable parameter that must be held along the directions of a basis."""

    name: str
    """Canonical name of the parameter; unique, and the key of its pins."""
    weight: str
    """The basis' name of the weight that it moves."""
    parameter: nn.Parameter
    left: str | None
    right: str | None
    is_factor: bool = False
    """A LoRA factor: pinned to zero, not to its own start."""
    partner: nn.Parameter | None = None
    """Of a lora_A: its lora_B, which must be zero for A to be projected without changing the model."""


def find_targets(model: nn.Module, basis: SpuriousBasis) -> list[Target]:
    """The trainable parameters behind the basis' weights, in the order of `basis.weights`.

    Raises `InputError` for a weight that the model lacks or that has another shape, one that is not a linear module's,
    one that is tied, and for adapters that cannot be held.
    """
    modules = _weight_modules(model)
    configs = _peft_configs(model)
    targets: list[Target] = []
    for weight in basis.weights:
        owner = modules.get(weight)
        if owner is None:
            raise InputError(_unknown(weight, modules))
        _check_fit(weight, owner, basis)
        _check_adapters(weight, owner, configs)
        targets += _targets_of(weight, owner, basis.sides(weight))
    seen: dict[int, str] = {}
    for target in targets:
        other = seen.setdefault(id(target.parameter), target.name)
        if other != target.name:
            raise InputError(f"the basis names {other!r} and {target.name!r}, which are one tied parameter; keep one")
    return targets


def find_unprotected(model: nn.Module, basis: SpuriousBasis | None) -> tuple[str, ...]:
    """Base-model names of linear weights that train, themselves or by LoRA, without any direction in the basis."""
    covered = set(basis.weights) if basis is not None else set()
    found = {
        _base_name(f"{name}.weight").split(".lora_")[0].removesuffix(".weight") + ".weight"
        for name, module in model.named_modules()
        if is_linear(module) and module.weight.requires_grad  # type: ignore[union-attr]
    }
    return tuple(sorted(found - covered))


@dataclass(frozen=True)
class _Owner:
    """The module that holds a weight, and PEFT's layer around it if there is one."""

    module: nn.Module
    layer: nn.Module | None

    @property
    def adapters(self) -> Mapping[str, tuple[nn.Module, nn.Module]]:
        """{adapter name: (lora_A, lora_B)}."""
        factors_a = getattr(self.layer, "lora_A", None)
        factors_b = getattr(self.layer, "lora_B", None)
        if not isinstance(factors_a, nn.ModuleDict) or not isinstance(factors_b, nn.ModuleDict):
            return {}
        return {name: (factors_a[name], factors_b[name]) for name in factors_a}


def _targets_of(weight: str, owner: _Owner, sides: tuple[str, ...]) -> Iterator[Target]:
    write = "write" if "write" in sides else None
    read = "read" if "read" in sides else None
    parameter: Any = owner.module.weight
    if parameter.requires_grad:
        left, right = (read, write) if is_conv1d(owner.module) else (write, read)
        yield Target(weight, weight, parameter, left, right)
    bias: Any = getattr(owner.module, "bias", None)
    if write and isinstance(bias, Tensor) and bias.requires_grad:
        yield Target(f"{weight.removesuffix('.weight')}.bias", weight, bias, write, None)  # type: ignore[arg-type]
    for adapter, (factor_a, factor_b) in owner.adapters.items():
        stem, a, b = weight.removesuffix(".weight"), factor_a.weight, factor_b.weight
        if read and a.requires_grad:  # type: ignore[union-attr]
            yield Target(f"{stem}.lora_A.{adapter}.weight", weight, a, None, read, True, b)  # type: ignore[arg-type]
        if write and b.requires_grad:  # type: ignore[union-attr]
            yield Target(f"{stem}.lora_B.{adapter}.weight", weight, b, write, None, True)  # type: ignore[arg-type]


def _weight_modules(model: nn.Module) -> dict[str, _Owner]:
    """{base-model weight name: its module}; an adapter's own matrices are among them under their own names."""
    layers = {_base_name(name): module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module._parameters.get("weight"), Tensor) and ".original_module" not in name:
            base = _base_name(name)
            owners[f"{base}.weight" if base else "weight"] = _Owner(module, layers.get(base))
    return owners


def _base_name(name: str) -> str:
    return canonical_name(re.sub(r"\.modules_to_save\.[^.]+", "", name))


def _unknown(weight: str, modules: Mapping[str, _Owner]) -> str:
    known = [name for name, owner in modules.items() if is_linear(owner.module) and ".lora_" not in name]
    near = difflib.get_close_matches(weight, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its linear weights are named like {known[0]!r}" if known else ""
    return (
        f"the basis holds directions for {weight!r}, but the model has no such weight; {hint} "
        "Use the base model that the basis was detected on, or rename the weight in the basis"
    )


def _check_fit(weight: str, owner: _Owner, basis: SpuriousBasis) -> None:
    module = owner.module
    if isinstance(module, nn.Embedding):
        raise InputError(f"{weight!r} is an embedding; only the weights of linear modules can be protected")
    for side in basis.sides(weight):
        if len(basis.tensor_shape(weight, side)) != 2:
            raise InputError(f"{weight!r} has directions for stacked experts, which GRASP cannot project yet")
    out, into = _logical_shape(weight, owner)
    header = basis.shape(weight)
    for index, (side, what, dim) in enumerate((("write", "output", out), ("read", "input", into))):
        if side in basis.sides(weight):
            length, k = basis.tensor_shape(weight, side)
            if length != dim or k > dim:
                raise InputError(
                    f"the basis has {k} {side} columns of length {length} for {weight!r}, whose {what} is {dim}; use "
                    "the model that it was detected on"
                )
        elif header is not None and header[index] != dim:
            raise InputError(
                f"the basis is for a {weight!r} of shape {header}, but here its {what} is {dim}; use the model that it "
                "was detected on"
            )


def _logical_shape(weight: str, owner: _Owner) -> tuple[int, int]:
    for factor_a, factor_b in owner.adapters.values():
        return int(factor_b.weight.shape[0]), int(factor_a.weight.shape[1])  # type: ignore[union-attr,index]
    module: Any = owner.module
    if isinstance(module, nn.Linear):  # a quantised weight is packed, but the module still knows its shape
        return module.out_features, module.in_features
    if module.weight.ndim != 2:
        raise InputError(f"{weight!r} has shape {tuple(module.weight.shape)}; only matrices (out, in) can be protected")
    rows, columns = module.weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _peft_configs(model: nn.Module) -> dict[str, Any]:
    """{adapter name: peft configuration}, where the model carries any."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return configs
    return {}


def _check_adapters(weight: str, owner: _Owner, configs: Mapping[str, Any]) -> None:
    """Refuse what moves the weight without being a plain low-rank update from a zero start."""
    inside = owner.layer if owner.layer is not None else owner.module
    held = {id(owner.module.weight), id(getattr(owner.module, "bias", None))}
    for adapter, (factor_a, factor_b) in owner.adapters.items():
        if not factor_b.weight.requires_grad and not factor_a.weight.requires_grad:  # type: ignore[union-attr]
            continue
        held |= {id(factor_a.weight), id(factor_b.weight)}
        config = configs.get(adapter)
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if getattr(config, "use_dora", False):
            raise InputError(
                f"{weight!r} is trained with DoRA (use_dora), whose magnitudes move the weight along the blocked "
                "directions; use plain LoRA"
            )
        if getattr(config, "lora_bias", False):
            raise InputError(f"{weight!r} is trained with lora_bias, which GRASP cannot project; set lora_bias=False")
        if start.startswith(_UNPINNED_STARTS):
            raise InputError(
                f"the adapter of {weight!r} starts as {start!r}, from a nonzero update that a changed base weight "
                "balances; use init_lora_weights=True"
            )
    for name, parameter in inside.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise InputError(
                f"{name!r} trains inside the module of {weight!r}, and GRASP does not know how it moves that weight; "
                "use plain LoRA, or train the weight itself"
            )
