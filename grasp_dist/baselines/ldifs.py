"""Feature-space distance (LDIFS; Mukhoti et al., 2023, arXiv 2308.13320): cross entropy + w sum_l |h_l - h_l,base|^2
over each trained token, h_l the residual stream behind layer l. For language models as in arXiv 2508.06249, behind
every fifth layer and with w = 1; a published implementation of that computes the distance under no_grad, so that it has
no gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from grasp_dist.architecture import decoder_layers
from grasp_dist.baselines.residual_stream import Hook, hooked, without_adapter
from grasp_dist.training.batches import Batch
from grasp_dist.training.loop import Objective, token_losses

__all__ = ["ldifs"]


@contextlib.contextmanager
def ldifs(model: nn.Module, *, weight: float = 1.0, every: int = 5) -> Iterator[Objective]:
    """The objective of a fine-tune whose features are held near the base's.

    every: behind which layers, counted from the last one back, so that there is always one. Distances are in fp32,
    summed over layers and dimensions.
    """
    chosen = range(len(decoder_layers(model)) - 1, -1, -every)
    seen: dict[int, Tensor] = {}

    def tap(layer: int) -> Hook:
        def hook(residual: Tensor) -> None:
            seen[layer] = residual

        return hook

    def features(batch: Batch) -> dict[int, Tensor]:
        return {layer: residual.flatten(0, 1)[batch.positions].float() for layer, residual in seen.items()}

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), without_adapter(model):
            token_losses(model, batch)
        base = features(batch)
        loss = token_losses(model, batch).sum()
        distances = [(own - base[layer]).square().sum() for layer, own in features(batch).items()]
        seen.clear()
        return loss + weight * torch.stack(distances).sum()

    with without_adapter(model):
        pass  # raises for a model that has none
    with hooked(model, {layer: tap(layer) for layer in chosen}):
        yield objective
