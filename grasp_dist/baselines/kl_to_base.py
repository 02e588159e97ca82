"""KL to the base: cross entropy + w KL(p_model || p_base) over each trained token; the base is the model without its
adapter. As in Kaczér et al. (2025), arXiv 2508.06249, with their w = 0.1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import without_adapter
from grasp_dist.training.batches import Batch
from grasp_dist.training.loop import Objective, target_logits

__all__ = ["kl_to_base"]


@contextlib.contextmanager
def kl_to_base(model: nn.Module, *, weight: float = 0.1) -> Iterator[Objective]:
    """The objective of a fine-tune that is held near its base: CE + weight * KL(p_model || p_base), nats."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), without_adapter(model):
            base = target_logits(model, batch).log_softmax(-1)
        own = target_logits(model, batch).log_softmax(-1)
        return F.nll_loss(own, batch.targets, reduction="sum") + weight * _divergence(own, base)

    with without_adapter(model):
        pass  # raises for a model that has none
    yield objective


def _divergence(own: Tensor, base: Tensor) -> Tensor:
    """KL(own || base) of log-probabilities (tokens, vocabulary), summed over tokens."""
    return (own.exp() * (own - base)).sum()
