"""Targets: which parameters of a model move a protected weight, and along which side each must be held.

    weight (out, in)            left: write   right: read
    Conv1D weight (in, out)     left: read    right: write     (GPT-2's linear layer, stored transposed)
    bias (out,)                 left: write
    lora_B (out, r)             left: write                    U^T B = 0
    lora_A (r, in)                            right: read      A V = 0
    stacked experts (experts, out, in)        left: write   right: read; (experts, in, out) the other way round
    their bias (experts, out)                                 right: write

"left" is contracted over the rows of the stored matrix, "right" over its columns. Frozen parameters cannot move and
need no protection. What moves a protected weight in another way (DoRA, other PEFT methods) is refused by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from grasp_dist.architecture import canonical_name, is_conv1d, is_linear
from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError

__all__ = ["Target", "check_shapes", "find_targets", "find_unprotected", "no_such_weight"]

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
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the directions, by "left" and "right": (length, k), or (experts, length, k) where each expert has its own."""

    def shared(self, where: str) -> bool:
        """Whether all experts of the stack share the directions."""
        return len(self.shapes[where]) == 2

    def ranks(self, where: str) -> int:
        """Number of directions; 0 where there is none."""
        return self.shapes[where][-1] if where in self.shapes else 0


def find_targets(
    model: nn.Module, basis: SpuriousBasis, shape_of: Callable[[nn.Parameter], tuple[int, ...]]
) -> tuple[list[Target], list[str]]:
    """The trainable parameters behind the basis' weights, in the order of `basis.weights`, and the weights that the
    model lacks (which another rank of a pipeline may hold). shape_of: a parameter's logical shape.

    Raises `InputError` for a weight of another shape, one that is not a linear module's or a stack of experts, one that
    is tied, and for adapters that cannot be held.
    """
    owners = _owners(model, shape_of)
    configs = _peft_configs(model)
    targets: list[Target] = []
    missing: list[str] = []
    for weight in basis.weights:
        owner = owners.get(weight)
        if owner is None:
            missing.append(weight)
            continue
        _check_fit(weight, owner, basis, shape_of(owner.parameter))
        _check_adapters(weight, owner, configs)
        targets += _targets_of(weight, owner, basis)
    seen: dict[int, str] = {}
    for target in targets:
        other = seen.setdefault(id(target.parameter), target.name)
        if other != target.name:
            raise InputError(f"the basis names {other!r} and {target.name!r}, which are one tied parameter; keep one")
    return targets, missing


def check_shapes(target: Target, shape: tuple[int, int, int]) -> None:
    """Raise `InputError` unless the directions fit the stack (experts, rows, columns) of the parameter."""
    for where, length in (("left", shape[1]), ("right", shape[2])):
        found = target.shapes.get(where)
        if found is not None and (found[-2] != length or (len(found) == 3 and found[0] != shape[0])):
            raise InputError(
                f"the basis has directions of shape {found} for {target.name!r}, which is a stack of {shape[0]} "
                f"matrices {shape[1:]}; use the model that the basis was detected on"
            )


def no_such_weight(model: nn.Module, weight: str, shape_of: Callable[[nn.Parameter], tuple[int, ...]]) -> InputError:
    """For a weight of the basis that no rank holds."""
    owners = _owners(model, shape_of)
    known = [name for name, owner in owners.items() if owner.is_candidate and ".lora_" not in name]
    near = difflib.get_close_matches(weight, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its linear weights are named like {known[0]!r}" if known else ""
    return InputError(
        f"the basis holds directions for {weight!r}, but the model has no such weight; {hint} "
        "Use the base model that the basis was detected on, or rename the weight in the basis"
    )


def find_unprotected(
    model: nn.Module, basis: SpuriousBasis | None, shape_of: Callable[[nn.Parameter], tuple[int, ...]]
) -> tuple[str, ...]:
    """Base-model names of linear weights that train, themselves or by LoRA, without any direction in the basis."""
    covered = set(basis.weights) if basis is not None else set()
    found = set()
    for weight, owner in _owners(model, shape_of).items():
        factors = [factor.weight for pair in owner.adapters.values() for factor in pair]
        trains = any(parameter.requires_grad for parameter in (owner.parameter, *factors))  # type: ignore[union-attr]
        if owner.is_candidate and trains and ".lora_" not in weight:
            found.add(weight)
    return tuple(sorted(found - covered))


@dataclass(frozen=True)
class _Owner:
    """The module that holds a weight as its parameter `leaf`, and PEFT's layer around it if there is one."""

    module: nn.Module
    layer: nn.Module | None
    leaf: str = "weight"

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def is_stack(self) -> bool:
        """Stacked experts: every 3-D parameter but a linear module's."""
        return not is_linear(self.module) and self.leaf != "weight"

    @property
    def is_candidate(self) -> bool:
        return is_linear(self.module) or self.is_stack

    @property
    def is_transposed(self) -> bool:
        """Stored (in, out)."""
        return is_conv1d(self.module) or bool(getattr(self.module, "is_transposed", False))

    @property
    def bias(self) -> nn.Parameter | None:
        name = f"{self.leaf}_bias" if self.is_stack else "bias"
        return self.module._parameters.get(name)

    @property
    def adapters(self) -> Mapping[str, tuple[nn.Module, nn.Module]]:
        """{adapter name: (lora_A, lora_B)}."""
        factors_a = getattr(self.layer, "lora_A", None)
        factors_b = getattr(self.layer, "lora_B", None)
        if not isinstance(factors_a, nn.ModuleDict) or not isinstance(factors_b, nn.ModuleDict):
            return {}
        return {name: (factors_a[name], factors_b[name]) for name in factors_a}


def _targets_of(weight: str, owner: _Owner, basis: SpuriousBasis) -> Iterator[Target]:
    sides = basis.sides(weight)
    write = "write" if "write" in sides else None
    read = "read" if "read" in sides else None
    stem = weight.removesuffix(".weight")

    def target(
        name: str, parameter: Any, left: str | None, right: str | None, factor: bool = False, partner: Any = None
    ) -> Target:
        shapes = {where: basis.tensor_shape(weight, s) for where, s in (("left", left), ("right", right)) if s}
        return Target(name, weight, parameter, left, right, factor, partner, shapes)

    if owner.parameter.requires_grad:
        left, right = (read, write) if owner.is_transposed else (write, read)
        yield target(weight, owner.parameter, left, right)
    bias = owner.bias
    if write and bias is not None and bias.requires_grad:
        if owner.is_stack:
            _check_shared(weight, "trains the biases of its experts; freeze them", basis)
            yield target(f"{stem}_bias", bias, None, write)
        else:
            yield target(f"{stem}.bias", bias, write, None)
    for adapter, (factor_a, factor_b) in owner.adapters.items():
        a: Any = factor_a.weight
        b: Any = factor_b.weight
        if owner.is_stack and (a.requires_grad or b.requires_grad):
            _check_shared(weight, "is trained by LoRA on stacked experts (target_parameters)", basis)
        if read and a.requires_grad:
            yield target(f"{stem}.lora_A.{adapter}.weight", a, None, read, True, b)
        if write and b.requires_grad:
            yield target(f"{stem}.lora_B.{adapter}.weight", b, write, None, True)


def _check_shared(weight: str, what: str, basis: SpuriousBasis) -> None:
    if any(len(basis.tensor_shape(weight, side)) == 3 for side in basis.sides(weight)):
        raise InputError(
            f"{weight!r} {what}, for which GRASP cannot hold directions per expert; use one basis (length, k) for all "
            "experts of the weight, or train the weight itself"
        )


def _owners(model: nn.Module, shape_of: Callable[[nn.Parameter], tuple[int, ...]]) -> dict[str, _Owner]:
    """{base-model weight name: its module}; an adapter's own matrices are among them under their own names."""
    layers: dict[tuple[str, str], nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            layers[_base_name(name), getattr(module, "parameter_name", "weight")] = module
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if ".original_module" in name:
            continue
        base = _base_name(name)
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, nn.Parameter) and (leaf == "weight" or len(shape_of(parameter)) == 3):
                owners[f"{base}.{leaf}" if base else leaf] = _Owner(module, layers.get((base, leaf)), leaf)
    return owners


def _base_name(name: str) -> str:
    return canonical_name(re.sub(r"\.modules_to_save\.[^.]+", "", name))


def _check_fit(weight: str, owner: _Owner, basis: SpuriousBasis, stored: tuple[int, ...]) -> None:
    if isinstance(owner.module, nn.Embedding):
        raise InputError(f"{weight!r} is an embedding; only the weights of linear modules can be protected")
    for side in basis.sides(weight):
        if len(basis.tensor_shape(weight, side)) != 2 and not owner.is_stack:
            raise InputError(f"{weight!r} has directions for stacked experts, but is one matrix")
    shape = _logical_shape(weight, owner, stored)
    header = basis.shape(weight)
    for index, (side, what, dim) in enumerate((("write", "output", shape[0]), ("read", "input", shape[1]))):
        if side in basis.sides(weight):
            *_, length, k = basis.tensor_shape(weight, side)
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


def _logical_shape(weight: str, owner: _Owner, stored: tuple[int, ...]) -> tuple[int, int]:
    """(out, in), however the weight is stored."""
    for factor_a, factor_b in owner.adapters.values():
        return int(factor_b.out_features), int(factor_a.in_features)  # type: ignore[arg-type]
    module: Any = owner.module
    if isinstance(module, nn.Linear):  # a quantised weight is packed, but the module still knows its shape
        return module.out_features, module.in_features
    if len(stored) != (3 if owner.is_stack else 2):
        raise InputError(f"{weight!r} has shape {stored}; only matrices (out, in) and stacks of them can be protected")
    *_, rows, columns = stored
    return (columns, rows) if owner.is_transposed else (rows, columns)


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
    held = {id(owner.parameter), id(owner.bias)}
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
    for name, parameter in [] if owner.is_stack else inside.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise InputError(
                f"{name!r} trains inside the module of {weight!r}, and GRASP does not know how it moves that weight; "
                "use plain LoRA, or train the weight itself"
            )
