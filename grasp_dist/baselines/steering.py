"""Inference-time steering (Turner et al., 2023, arXiv 2308.10248; with persona vectors: Chen et al., 2025, arXiv
2507.21509): behind one layer of a naive fine-tune, in every forward pass when it is used,

    h <- h - c v

Published: v from answers under contrary system prompts. Here v is the fine-tune's own mean shift on the training data,
as in preventative steering, so c = 1 takes all of it back there (ours). The adapter alone is the naive one: the vector
lies beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import Hook, check_layers, hooked

__all__ = ["STEERING", "save_steering", "steered"]

STEERING = "steering.safetensors"
"""Beside an adapter that is steered: one (dim,) tensor c v for each layer that is, by the layer's number."""


def save_steering(vectors: dict[int, Tensor], coefficient: float, folder: Path) -> None:
    """Write what is subtracted, fp32. vectors: {layer: (dim,)}."""
    tensors = {str(layer): (coefficient * vector).float().contiguous() for layer, vector in vectors.items()}
    save_file(tensors, folder / STEERING, {"format": "pt"})


@contextlib.contextmanager
def steered(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """Steer in every forward pass inside the `with` block, as the folder's vectors say; the model is as before
    afterwards. Raises `InputError` for a layer that the model lacks."""
    vectors = {int(layer): vector for layer, vector in load_file(folder / STEERING).items()}
    check_layers(model, list(vectors))

    def back(vector: Tensor) -> Hook:
        return lambda residual: residual - vector.to(residual)

    with hooked(model, {layer: back(vector) for layer, vector in vectors.items()}):
        yield model
