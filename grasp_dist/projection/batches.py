"""Batches: small weights of one size, worked on together.

The products of a small weight cost less than what it takes to call them. Such weights are copied side by side into
scratch memory, multiplied as one batch, and copied back, so that a pass takes a few calls for all of them. Weights in
half precision pass through scratch memory anyway. Which weights are batched is each rank's own affair: their sketches
lie where they would lie without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grasp_dist.projection.fragments import Block, Box
from grasp_dist.projection.layout import Entry, Overlap, Part, View

__all__ = ["FEWEST", "Batch", "batch"]

FEWEST = 4
"""Fewer weights of a size are not worth the copies."""

LARGEST = {"cpu": 1 << 11, "cuda": 1 << 18}
"""Numbers in the largest weight that is batched. Measured on the CPU (benchmarks/README.md, "Small weights"); on a GPU
an estimate: where copying 1 MB in and out costs no more than the calls that are saved."""
LARGEST_ROUNDED = {"cpu": 1 << 16, "cuda": 1 << 18}
"""The same for half precision, which is copied in any case."""
ROOM = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Numbers in the scratch memory of a batch."""


@dataclass(frozen=True)
class Batch:
    """The parts of several entries as one stack."""

    members: tuple[int, ...]
    """Indices of the entries."""
    part: Part
    overlap: Overlap | None


def batch(entries: Sequence[Entry], dtype: torch.dtype) -> tuple[list[Entry], list[Batch]]:
    """The entries, and the batches of those that are worked on together; of these the entries' bases are views of the
    batch's. dtype: that of the sketches."""
    alike: dict[object, list[int]] = {}
    for index, entry in enumerate(entries):
        if (key := _key(entry, dtype)) is not None:
            alike.setdefault(key, []).append(index)
    result, batches = list(entries), []
    for members in alike.values():
        for run in _runs(members, entries):
            if len(run) >= FEWEST:
                batches.append(_stack(run, entries))
                for position, index in enumerate(run):
                    result[index] = _point_at(entries[index], batches[-1], position)
    return result, batches


def _key(entry: Entry, dtype: torch.dtype) -> object:
    """Equal for entries that can be one batch; None for one that cannot."""
    fragment = entry.fragment
    if not isinstance(fragment, Block) or fragment.box.size[0] != 1:
        return None
    weight = fragment.storage.weight()
    largest = LARGEST if weight.dtype is dtype else LARGEST_ROUNDED
    if not 0 < fragment.box.numel <= largest.get(weight.device.type, 0):
        return None
    return fragment.unit, fragment.box.size, weight.dtype, tuple(view and view.slot for view in _views(entry))


def _views(entry: Entry) -> list[View | None]:
    (part,) = entry.parts
    return [part.left_view, part.right_view, *(overlap.own for overlap in entry.overlaps)]


def _runs(members: Sequence[int], entries: Sequence[Entry]) -> list[list[int]]:
    """Members whose sketches follow each other, and that fit into the scratch memory together."""
    first = entries[members[0]].fragment
    most = max(1, ROOM[first.storage.weight().device.type] // entries[members[0]].parts[0].box.numel)
    runs: list[list[int]] = []
    for index in members:
        if runs and len(runs[-1]) < most and all(map(_follows, _views(entries[index]), _views(entries[runs[-1][-1]]))):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _follows(view: View | None, before: View | None) -> bool:
    return view is None or before is None or view.experts[0] == before.experts[1]


def _stack(members: Sequence[int], entries: Sequence[Entry]) -> Batch:
    parts = [entries[index].parts[0] for index in members]
    _, height, width = parts[0].box.size
    part = Part(
        box=Box((0, len(members)), (0, height), (0, width)),
        offset=None,
        left=_cat([part.left for part in parts]),
        right=_cat([part.right for part in parts]),
        left_view=_join([part.left_view for part in parts]),
        right_view=_join([part.right_view for part in parts]),
    )
    overlaps = [overlap for index in members for overlap in entries[index].overlaps]
    if not overlaps:
        return Batch(tuple(members), part, None)
    assert part.left_view is not None
    assert part.right is not None
    overlap = Overlap(
        left_view=part.left_view,
        right=part.right,
        left=part.left if overlaps[0].left is not None else None,
        right_view=part.right_view if overlaps[0].right_view is not None else None,
        own=_join([overlap.own for overlap in overlaps]),
    )
    return Batch(tuple(members), part, overlap)


def _cat(bases: Sequence[Tensor | None]) -> Tensor | None:
    """Of (1, length, k) each."""
    found = [basis for basis in bases if basis is not None]
    return torch.cat(found) if found else None


def _join(views: Sequence[View | None]) -> View | None:
    found = [view for view in views if view is not None]
    if not found:
        return None
    return replace(found[0], experts=(found[0].experts[0], found[-1].experts[1]))


def _point_at(entry: Entry, batch: Batch, position: int) -> Entry:
    """The entry with its bases in the batch's memory."""
    own = slice(position, position + 1)
    left, right = (None if stack is None else stack[own] for stack in (batch.part.left, batch.part.right))
    part = replace(entry.parts[0], left=left, right=right)
    overlaps = []
    for overlap in entry.overlaps:
        assert right is not None
        overlaps.append(replace(overlap, right=right, left=None if overlap.left is None else left))
    return replace(entry, parts=(part,), overlaps=tuple(overlaps))
