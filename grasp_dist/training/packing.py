"""Several examples in one sequence, each of which attends to itself only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from grasp_dist.errors import InputError
from grasp_dist.training.batches import collate
from grasp_dist.training.examples import Example

__all__ = ["check_isolation", "pack"]


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Join examples into sequences of at most `max_length` tokens (best fit, longest first); which parts share a
    sequence depends on the examples alone. Each part attends to itself only (`batches.collate`)."""
    bins: list[list[Example]] = []
    # (room left, bin), by room.
    room: list[tuple[int, int]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        slot = bisect_left(room, (size, -1))
        if slot == len(room):
            bins.append([example])
            insort(room, (max_length - size, len(bins) - 1))
        else:
            left, number = room.pop(slot)
            bins[number].append(example)
            insort(room, (left - size, number))
    return [_join(parts) for parts in bins]


def _join(parts: Sequence[Example]) -> Example:
    return Example(
        [token for part in parts for token in part.input_ids],
        [label for part in parts for label in part.labels],
        tuple(len(part.input_ids) for part in parts),
    )


@torch.no_grad()
def check_isolation(model: nn.Module, examples: Sequence[Example], device: torch.device) -> None:
    """See that a packed part does not look at the one before it; collective, and nothing to do without packing.

    Positions that start again are all that tells the parts apart, and not every architecture of transformers heeds
    them. Raises `InputError` for one that does not.
    """
    packed = next((example for example in examples if len(example.lengths) > 1), None)
    if packed is None:
        return
    first = packed.lengths[0]
    other = [packed.input_ids[first]] * first
    changed = replace(packed, input_ids=other + packed.input_ids[first:])
    if other == packed.input_ids[:first]:
        changed = replace(packed, input_ids=[token ^ 1 for token in other] + packed.input_ids[first:])
    training = model.training
    model.eval()
    before, after = (_logits_behind(model, example, first, device) for example in (packed, changed))
    model.train(training)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise InputError("this model's architecture lets packed examples look at each other; set data.packing: false")


def _logits_behind(model: nn.Module, example: Example, start: int, device: torch.device) -> Tensor:
    batch = collate([example]).to(device)
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0, start:].float()
