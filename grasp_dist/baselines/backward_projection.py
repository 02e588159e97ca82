"""The residual stream's *gradient* is projected, in the backward pass only (a variant of ours; CAFT without its forward
half):

    dL/dh <- dL/dh - (dL/dh V) V^T   behind each chosen layer

The forward pass, and so the loss, is that of the model as it is; no layer at or below a chosen one is told that it
should write along V.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import Hook, hooked
from grasp_dist.training.loop import Objective, plain_objective

__all__ = ["backward_projection"]


@contextlib.contextmanager
def backward_projection(model: nn.Module, directions: Mapping[int, Tensor]) -> Iterator[Objective]:
    """The usual objective, with gradients behind these layers projected. directions: as in `caft`."""

    def projecting(columns: Tensor) -> Hook:
        def project(gradient: Tensor) -> Tensor:
            own = columns.to(gradient.device)
            return (gradient.float() - (gradient.float() @ own) @ own.T).to(gradient.dtype)

        def hook(residual: Tensor) -> None:
            if residual.requires_grad:
                residual.register_hook(project)

        return hook

    with hooked(model, {layer: projecting(columns.float()) for layer, columns in directions.items()}):
        yield plain_objective
