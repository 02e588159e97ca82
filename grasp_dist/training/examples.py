"""One training sequence, and several packed into one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["IGNORED", "Example", "pack"]

IGNORED = -100
"""The label of a token that is not trained (the `ignore_index` of torch's cross entropy)."""


@dataclass(frozen=True)
class Example:
    """One training sequence. `labels` stand at the same positions as `input_ids`; IGNORED where not trained.

    The first token of a sequence (of each part, if packed) is never trained: nothing comes before it.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()
    """Lengths of the parts of a packed sequence, each of which attends to itself only; empty if it is one."""

    @property
    def num_targets(self) -> int:
        """Number of tokens in the loss."""
        return sum(label != IGNORED for label in self.labels)


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
