"""Small models, bases and a dispatch watcher that the projection tests share."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import work
from grasp_dist.projection.reference import pin, project_gradient, sketches

# Odd sizes; `narrow` has fewer outputs, and `slim` fewer inputs, than there may be ranks.
SHAPES = {"plain": (13, 7), "narrow": (3, 11), "slim": (10, 3), "turned": (9, 6), "adapted": (15, 8)}
STACKS = {"experts.up": (3, 7, 5), "experts.down": (3, 5, 6), "turned_experts.up": (2, 9, 4)}
"""(experts, out, in); `up` has directions per expert, `down` shares them."""
LORA_RANK = 5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def worked_on_as_large(large: bool) -> contextlib.AbstractContextManager[Any]:
    """Projectors made in this context treat every weight as a large one: both sides subtracted as one product, sketches
    summed over slabs of a few rows."""
    if not large:
        return contextlib.nullcontext()
    return mock.patch.multiple(work, FUSED_FROM=1, SLABS_FROM=1, SLAB_ROWS=(3, 3))


def orthonormal(dim: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(dim, k, seed=seed))[0].float()


class Conv1D(nn.Module):
    """As in transformers: the weight is stored (in, out)."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.empty(into, out))
        self.bias = nn.Parameter(torch.zeros(out))


class Experts(nn.Module):
    """Stacked as in transformers: (experts, out, in), or (experts, in, out) with `is_transposed`, as in gpt-oss."""

    def __init__(self, shapes: dict[str, tuple[int, int, int]], *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for name, (experts, out, into) in shapes.items():
            sizes = (into, out) if is_transposed else (out, into)
            self.register_parameter(name, nn.Parameter(torch.zeros(experts, *sizes)))


class LoraLinear(nn.Module):
    """The structure and names of peft's LoRA layer."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(into, out, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(into, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)


class Zoo(nn.Module):
    """One module of each kind, with the sizes of SHAPES."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "narrow", "slim"):
            out, into = SHAPES[name]
            self.add_module(name, nn.Linear(into, out))
        self.turned = Conv1D(*SHAPES["turned"])
        self.adapted = LoraLinear(*SHAPES["adapted"], LORA_RANK)
        self.experts = Experts({name: STACKS[f"experts.{name}"] for name in ("up", "down")}, is_transposed=False)
        self.turned_experts = Experts({"up": STACKS["turned_experts.up"]}, is_transposed=True)
        self.turned_experts.up_bias = nn.Parameter(torch.zeros(2, 9))


def zoo_basis(side: str, *, seed: int = 100) -> SpuriousBasis:
    tensors = {}
    for index, (name, (out, into)) in enumerate(SHAPES.items()):
        if side in ("write", "both"):
            tensors[f"{name}.weight.write"] = orthonormal(out, 2, seed + 2 * index)
        if side in ("read", "both"):
            tensors[f"{name}.weight.read"] = orthonormal(into, min(3, into - 1), seed + 2 * index + 1)
    for index, (name, (experts, out, into)) in enumerate(STACKS.items(), start=20):
        own = name == "experts.up"
        for offset, which, dim, k in ((0, "write", out, 2), (1, "read", into, 3)):
            if side in (which, "both"):
                seeds = range(experts) if own else range(1)
                columns = [orthonormal(dim, k, seed + 50 * index + 2 * expert + offset) for expert in seeds]
                tensors[f"{name}.{which}"] = torch.stack(columns) if own else columns[0]
    return SpuriousBasis.from_tensors(tensors)


def sides_of(name: str, basis: SpuriousBasis) -> tuple[Tensor | None, Tensor | None]:
    """Left and right basis of a stored parameter of the zoo, fp64, by what the parameter is."""
    module, _, leaf = name.partition(".")
    weight = name.removesuffix("_bias") if "experts" in module else f"{module}.weight"
    U, V = (basis.tensor(weight, side).double() if side in basis.sides(weight) else None for side in ("write", "read"))
    if leaf == "bias" or "lora_B" in leaf:
        return U, None
    if leaf.endswith("_bias"):
        return None, U  # (experts, out): a matrix whose rows are the experts' biases
    if "lora_A" in leaf:
        return None, V
    return (V, U) if module.startswith("turned") else (U, V)


def per_expert(function: Any, tensor: Tensor, *arguments: Any) -> Tensor:
    """`function(matrix, *arguments of that expert)` for each expert of a stack, or for the one matrix; fp64.

    An argument is None, one tensor for all or a stack of them (3-D), or a tuple of such.
    """
    tensor = tensor.double()
    if tensor.ndim < 3:
        return function(tensor if tensor.ndim == 2 else tensor.unsqueeze(1), *arguments)

    def of(argument: Any, expert: int) -> Any:
        if isinstance(argument, tuple):
            return tuple(of(part, expert) for part in argument)
        return argument[expert] if argument is not None and argument.ndim == 3 else argument

    return torch.stack(
        [function(matrix, *(of(argument, index) for argument in arguments)) for index, matrix in enumerate(tensor)]
    )


def stepped(learning_rate: float, decay: float) -> Any:
    """What SGD and a pin pass make of (weight, gradient, left, right); fp64."""

    def step(weight: Tensor, gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        gradient = gradient.double().reshape(weight.shape)
        moved = weight - learning_rate * (project_gradient(gradient, left, right) + decay * weight)
        return pin(moved, sketches(weight, left, right), left, right)

    return step


def relative_error(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.double().norm().item()
    off = (found.double() - wanted.double()).norm().item()
    return off / norm if norm else off


class Watch(TorchDispatchMode):
    """What runs underneath: names and bytes of collectives, and the largest tensor that an operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if "c10d" in func.namespace:
            numbers = sum(leaf.numel() * leaf.element_size() for leaf in given)
            self.collectives.append((func._schema.name.partition("::")[2], numbers))
        else:
            storages = {leaf.untyped_storage().data_ptr() for leaf in given}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in storages:
                    self.largest = max(self.largest, leaf.numel())
        return result
