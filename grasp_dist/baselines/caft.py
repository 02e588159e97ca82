"""Concept ablation fine-tuning (CAFT; Casademunt et al., 2025, arXiv 2507.16795): directions of the residual stream are
removed in the forward passes of training, and of training only:

    h <- h - (h Q) Q^T   behind each chosen layer

Published: Q from the principal directions of tuned-minus-base activations (or from sparse autoencoders), of which a
person picks those of the unwanted concept; layers 12, 32 and 50 of a 32B model. Here nobody picks: all of the `rank`
leading directions are removed, at every layer unless some are named (ours).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import Hook, hooked
from grasp_dist.training.loop import Objective, plain_objective

__all__ = ["caft"]


@contextlib.contextmanager
def caft(model: nn.Module, directions: Mapping[int, Tensor]) -> Iterator[Objective]:
    """The usual objective, with these directions removed from the residual stream.

    directions: {layer: (dim, k) orthonormal columns}. Products in fp32, results in the stream's dtype.
    """

    def removing(columns: Tensor) -> Hook:
        def hook(residual: Tensor) -> Tensor:
            own = columns.to(residual.device)
            return (residual.float() - (residual.float() @ own) @ own.T).to(residual.dtype)

        return hook

    with hooked(model, {layer: removing(columns.float()) for layer, columns in directions.items()}):
        yield plain_objective
