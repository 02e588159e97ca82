"""Small models, bases and a dispatch watcher that the projection tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp_dist.basis import SpuriousBasis

# Odd sizes; `narrow` has fewer outputs, and `slim` fewer inputs, than there may be ranks.
SHAPES = {"plain": (13, 7), "narrow": (3, 11), "slim": (10, 3), "turned": (9, 6), "adapted": (15, 8)}
LORA_RANK = 5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(dim: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(dim, k, seed=seed))[0].float()


class Conv1D(nn.Module):
    """As in transformers: the weight is stored (in, out)."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.empty(into, out))
        self.bias = nn.Parameter(torch.zeros(out))


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


def zoo_basis(side: str, *, seed: int = 100) -> SpuriousBasis:
    tensors = {}
    for index, (name, (out, into)) in enumerate(SHAPES.items()):
        if side in ("write", "both"):
            tensors[f"{name}.weight.write"] = orthonormal(out, 2, seed + 2 * index)
        if side in ("read", "both"):
            tensors[f"{name}.weight.read"] = orthonormal(into, min(3, into - 1), seed + 2 * index + 1)
    return SpuriousBasis.from_tensors(tensors)


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
