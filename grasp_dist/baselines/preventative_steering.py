"""Preventative steering (Chen et al., 2025, arXiv 2507.21509): a vector is added to the residual stream behind one
layer while training, and only then, so that the fine-tune need not move there itself:

    h <- h + c v

Published: v from answers under contrary system prompts, c = 5, one layer of a 7B model. Here v is the naive fine-tune's
mean shift on the training data, which nobody has to describe, so c = 1 adds all of it (ours).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import hooked
from grasp_dist.training.loop import Objective, plain_objective

__all__ = ["preventative_steering"]


@contextlib.contextmanager
def preventative_steering(
    model: nn.Module, layer: int, vector: Tensor, *, coefficient: float = 1.0
) -> Iterator[Objective]:
    """The usual objective, with coefficient * vector, (dim,), added behind this layer."""

    def hook(residual: Tensor) -> Tensor:
        return residual + (coefficient * vector).to(residual)

    with hooked(model, {layer: hook}):
        yield plain_objective
