"""Which examples make step t, which of them a rank takes, and the tensors of a forward pass.

The order is global: an epoch is a permutation of all examples that depends on (seed, epoch) alone, the epochs follow
each other without a gap, and a batch is the next run of `batch_size` of them, at any world size. A batch may therefore
cross the border of two epochs, and a data set smaller than a batch is repeated within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_dist.training.examples import IGNORED, Example
from grasp_dist.training.seeds import derived_seed

__all__ = ["Batch", "GlobalOrder", "collate", "micro_batches"]


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass, int64."""

    input_ids: Tensor
    """(sequences, tokens), padded on the right."""
    positions: Tensor
    """(targets,): where the next token is trained, as indices into the flattened (sequences * tokens)."""
    targets: Tensor
    """(targets,): the token that follows there."""
    position_ids: Tensor | None
    """(sequences, tokens): positions that start again with each part of a packed sequence; None without packing."""

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.input_ids, self.positions, self.targets, self.position_ids


class GlobalOrder:
    """The endless sequence of example indices that training runs through."""

    def __init__(self, num_examples: int, seed: int) -> None:
        self._num_examples, self._seed = num_examples, seed
        self._epochs: dict[int, list[int]] = {}

    def samples(self, first: int, count: int) -> list[int]:
        """Indices of `count` examples, from the `first` of the sequence on, counted from 0."""
        epochs = range(first // self._num_examples, (first + count - 1) // self._num_examples + 1)
        self._epochs = {epoch: self._epochs.get(epoch) or self._permutation(epoch) for epoch in epochs}
        run = [index for epoch in epochs for index in self._epochs[epoch]]
        start = first - epochs[0] * self._num_examples
        return run[start : start + count]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed("order", self._seed, epoch))
        return torch.randperm(self._num_examples, generator=generator).tolist()


def micro_batches(
    examples: Sequence[Example], indices: Sequence[int], *, world_rank: int, world_size: int, size: int | None
) -> list[Batch]:
    """A rank's share of a global batch, in forward passes of `size` sequences (None: one), on the CPU.

    Every rank gets the same number of them: where the shares are uneven, masked copies fill up, which add nothing to
    the loss.
    """
    share = -(-len(indices) // world_size)
    own = [examples[index] for index in indices[world_rank::world_size]]
    filler = examples[indices[0]]
    own += [Example(filler.input_ids, [IGNORED] * len(filler.labels), filler.lengths)] * (share - len(own))
    size = size or share
    return [collate(own[start : start + size]) for start in range(0, share, size)]


def collate(examples: Sequence[Example]) -> Batch:
    """Examples side by side. No attention mask is needed: padding is on the right, where a causal model never looks,
    and transformers derives the block-diagonal mask of packed parts from positions that start again."""
    width = max(len(example.input_ids) for example in examples)
    packed = any(len(example.lengths) > 1 for example in examples)
    following = torch.tensor([_fill(example.labels[1:], width, IGNORED) for example in examples]).flatten()
    positions = (following != IGNORED).nonzero().flatten()
    return Batch(
        # Padded with a token of the sequence itself, as not every tokenizer has one for padding.
        torch.tensor([_fill(example.input_ids, width, example.input_ids[-1]) for example in examples]),
        positions,
        following[positions],
        torch.tensor([_positions(example, width) for example in examples]) if packed else None,
    )


def _fill(values: list[int], width: int, value: int) -> list[int]:
    return values + [value] * (width - len(values))


def _positions(example: Example, width: int) -> list[int]:
    lengths = list(example.lengths) or [len(example.input_ids)]
    if padding := width - sum(lengths):
        lengths.append(padding)
    return [position for length in lengths for position in range(length)]
