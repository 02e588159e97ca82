"""The supervised oracle, for judging detectors only: what two lists of prompts differ in, in the hidden states.

It needs labels and a loaded model, which detection has neither of. Directions: difference of means (Marks and Tegmark,
2023), or the leading singular vectors of the differences of paired prompts (Zou et al., 2023, "Representation
Engineering"). `close_residual_basis` takes what comes back as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grasp_dist.architecture import decoder_layers
from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError

__all__ = ["AngleSummary", "contrast_directions", "principal_angles"]

# A difference below this share of the hidden states is rounding.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class AngleSummary:
    """`angles`: {"<weight>.<side>": degrees ascending}. `overlap`: mean squared cosine over all of these angles, 1 for
    the same subspaces; `chance`: its expectation for random ones, the mean of max(k1, k2) / dim."""

    angles: dict[str, list[float]]
    overlap: float
    chance: float


def contrast_directions(
    model: nn.Module,
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    *,
    kind: Literal["mean", "pca"] = "mean",
    rank: int = 1,
    token: Literal["last", "mean"] = "last",
) -> dict[int, Tensor]:
    """{layer index: (hidden, k) orthonormal, fp64} of the residual stream after each decoder layer, first - second.

    first, second: prompts as token ids. kind: "mean", the difference of means (k = 1); "pca", the `rank` leading
    directions of first[i] - second[i], uncentred. token: which hidden state stands for a prompt. A layer in which the
    lists do not differ has none.

    Raises `InputError` for empty lists or prompts, for "pca" of lists of other lengths, and for a rank out of range.
    """
    if kind not in ("mean", "pca") or token not in ("last", "mean"):
        raise InputError(f"kind {kind!r} and token {token!r} must be 'mean' or 'pca', and 'last' or 'mean'")
    if not first or not second or not all(len(prompt) for prompt in (*first, *second)):
        raise InputError("both lists need at least one prompt, and every prompt at least one token")
    if kind == "pca" and len(first) != len(second):
        raise InputError(f"'pca' takes pairs of prompts, but there are {len(first)} and {len(second)}; use 'mean'")
    most = 1 if kind == "mean" else len(first)
    if not 1 <= rank <= most:
        raise InputError(f"rank {rank} is asked of {most} difference(s) of hidden states; choose 1 to {most}")
    ones, others = (
        torch.stack([_states(model, prompt, token) for prompt in prompts], dim=1) for prompts in (first, second)
    )
    found = {}
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        rows = one.mean(dim=0, keepdim=True) - other.mean(dim=0, keepdim=True) if kind == "mean" else one - other
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        keep = int((values[:rank] > _NEGLIGIBLE * max(one.norm(), other.norm())).sum())
        if keep:
            # Each points from second to first.
            columns = right[:keep].mT
            found[index] = columns * torch.where((rows @ columns).sum(dim=0) < 0, -1.0, 1.0)
    return found


def principal_angles(first: SpuriousBasis, second: SpuriousBasis) -> AngleSummary:
    """How two bases stand to each other, over the weights and sides that both have. Raises `InputError` if there are
    none, and for other dimensions or stacked experts."""
    radians = first.principal_angles(second)
    if stacked := [key for key, angles in radians.items() if angles.ndim != 1]:
        raise InputError(f"{stacked[0]!r} is of stacked experts, whose angles are not compared here")
    cosines, chances = [], []
    for key, angles in radians.items():
        weight, _, side = key.rpartition(".")
        cosines.append(angles.cos().square())
        largest = max(basis.basis_rank(weight, side) for basis in (first, second))
        chances += [largest / first.tensor_shape(weight, side)[-2]] * len(angles)
    return AngleSummary(
        {key: (angles * (180 / math.pi)).tolist() for key, angles in radians.items()},
        torch.cat(cosines).mean().item(),
        sum(chances) / len(chances),
    )


def _states(model: nn.Module, prompt: Sequence[int], token: str) -> Tensor:
    """(layers, hidden) fp64: the residual stream of one prompt after each decoder layer."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        states = hidden.reshape(-1, hidden.shape[-1]).detach().cpu().double()
        seen.append(states[-1] if token == "last" else states.mean(dim=0))

    handles = [layer.register_forward_hook(keep) for _, layer in decoder_layers(model)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(prompt)], device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack(seen)
