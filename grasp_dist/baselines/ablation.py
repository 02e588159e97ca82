"""Inference-time ablation: the basis' directions are removed from the activations of a trained model.

Directional ablation (Arditi et al., arXiv 2406.11717, equation 4, for one direction; here a subspace per weight):

    write side, at the module's output:  y <- y - U U^T y
    read side, at the module's input:    x <- x - V V^T x

The pretrained content along the directions goes with what the fine-tune added; GRASP keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.protected import protected_modules

__all__ = ["ablate"]


@contextlib.contextmanager
def ablate(
    model: nn.Module, basis: SpuriousBasis, *, side: str | None = None, rank: int | None = None
) -> Iterator[nn.Module]:
    """Ablate the basis in every forward pass inside the `with` block; the model is as before afterwards.

    side: "write", "read", "both" or None (every side that the basis has); rank: the first k directions alone. Works on
    plain, PEFT-wrapped and `fully_shard`ed models. Products are in fp32 (fp64 for fp64 activations), results in the
    activations' dtype. Raises `InputError` for a weight that the model lacks or of another size.
    """
    if side is not None:
        basis = basis.select(side)
    if rank is not None:
        basis = basis.truncate(rank)
    handles = []
    try:
        for weight, module in protected_modules(model, basis).items():
            if "write" in basis.sides(weight):
                handles.append(module.register_forward_hook(_Output(basis.tensor(weight, "write"))))
            if "read" in basis.sides(weight):
                handles.append(module.register_forward_pre_hook(_Input(basis.tensor(weight, "read"))))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Remover:
    """Holds (dim, k) columns and keeps them on the device of what passes by."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    def removed(self, activations: Tensor) -> Tensor:
        dtype = torch.promote_types(activations.dtype, torch.float32)
        self.columns = self.columns.to(activations.device, dtype)
        along = activations.to(dtype) @ self.columns
        return (activations.to(dtype) - along @ self.columns.T).to(activations.dtype)


class _Output(_Remover):
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.removed(output)


class _Input(_Remover):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.removed(args[0]), *args[1:])
