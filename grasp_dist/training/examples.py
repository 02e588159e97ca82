"""One training sequence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IGNORED", "Example"]

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
