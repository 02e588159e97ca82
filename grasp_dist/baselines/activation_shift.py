"""How a naive fine-tune moved the residual stream: behind each layer, mean and second moment of

    d = h_tuned - h_base   over the trained tokens of training examples

The leading eigenvectors of the second moment are the directions that CAFT and the projection of gradients remove. The
mean is not taken out first: a shift that is the same for every token is just what is looked for (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grasp_dist.baselines.residual_stream import Hook, check_layers, hooked, without_adapter
from grasp_dist.detection.signs import fix_signs
from grasp_dist.errors import InputError
from grasp_dist.training.batches import micro_batches
from grasp_dist.training.examples import Example
from grasp_dist.training.loop import token_losses
from grasp_dist.training.parallel import Parallel

__all__ = ["ActivationShift", "measure_shift"]


@dataclass(frozen=True)
class ActivationShift:
    """Of each layer, fp64 on the CPU, the same on every rank: `mean` (dim,), `moment` (dim, dim)."""

    mean: dict[int, Tensor]
    moment: dict[int, Tensor]

    def directions(self, rank: int) -> dict[int, Tensor]:
        """{layer: (dim, rank) orthonormal}, fp32, leading first. Raises `InputError` for more than there are."""
        found = {}
        for layer, moment in self.moment.items():
            if rank > len(moment):
                raise InputError(
                    f"the residual stream has {len(moment)} dimensions; rank {rank} is more than all of it"
                )
            found[layer] = fix_signs(torch.linalg.eigh(moment)[1].flip(-1)[:, :rank]).float()
        return found


def measure_shift(
    model: nn.Module,
    examples: Sequence[Example],
    parallel: Parallel,
    *,
    layers: Sequence[int] | None = None,
    limit: int = 256,
    batch_size: int = 16,
) -> ActivationShift:
    """The shift of a PEFT model against itself without its adapter; collective. Leaves it in evaluation mode.

    examples: `limit` of them are read, evenly spread. batch_size: sequences per forward pass and rank.
    """
    numbers = check_layers(model, layers)
    chosen = examples[:: max(1, -(-len(examples) // limit))]
    seen: dict[int, Tensor] = {}

    def tap(layer: int) -> Hook:
        def hook(residual: Tensor) -> None:
            seen[layer] = residual

        return hook

    sums: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}
    count = 0
    model.eval()
    with torch.no_grad(), hooked(model, {layer: tap(layer) for layer in numbers}):
        for batch in micro_batches(
            chosen,
            range(len(chosen)),
            world_rank=parallel.world_rank,
            world_size=parallel.world_size,
            size=batch_size,
        ):
            batch = batch.to(parallel.device)
            found: list[dict[int, Tensor]] = []
            for base in (False, True):
                if base:
                    with without_adapter(model):
                        token_losses(model, batch)
                else:
                    token_losses(model, batch)
                found.append({layer: one.flatten(0, 1)[batch.positions].float() for layer, one in seen.items()})
            count += len(batch.positions)
            for layer in numbers:
                shift = (found[0][layer] - found[1][layer]).double()
                sums[layer] = sums.get(layer, 0) + shift.sum(0)
                # Off the device: all layers' moments together may be larger than the model.
                moments[layer] = moments.get(layer, 0) + (shift.mT @ shift).cpu()
    total = parallel.sum_(torch.tensor(float(count), dtype=torch.float64, device=parallel.device))
    mean = {layer: (parallel.sum_(sums[layer]) / total).cpu() for layer in numbers}
    moment = {layer: (parallel.sum_(moments[layer].to(parallel.device)) / total).cpu() for layer in numbers}
    return ActivationShift(mean, moment)
