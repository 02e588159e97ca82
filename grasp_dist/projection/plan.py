"""The plan: fragments, basis rows, and the layout of the flat sketch buffers; built once, the same on every rank.

Every sketch has a slot in a bucket. There is one bucket per process group to sum over, and one per device for what
needs no sum; a pass is one all-reduce per bucket with a group. Building is collective: ranks compare a hash of the
layout and a checksum of what each of them holds whole, and sum the Gram matrices of the sharded bases.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import make_fragment
from grasp_dist.projection.fragments import Block
from grasp_dist.projection.targets import Target
from grasp_dist.subspaces import ORTHONORMAL_TOLERANCE

__all__ = ["Bucket", "Entry", "Plan", "Slot", "build_plan", "sum_over_groups"]


@dataclass
class Bucket:
    """One flat buffer: `numel` numbers on `device`, summed over `group` (None: already whole)."""

    group: dist.ProcessGroup | None
    device: torch.device
    numel: int = 0


@dataclass(frozen=True)
class Slot:
    """Where a sketch of shape (k, dim) lies: `bucket`, from `start`."""

    bucket: int
    start: int
    shape: tuple[int, int]

    def view(self, flats: Sequence[Tensor]) -> Tensor:
        return flats[self.bucket].narrow(0, self.start, self.shape[0] * self.shape[1]).view(self.shape)


@dataclass(frozen=True)
class Entry:
    """One protected parameter: its fragment, and the basis rows and sketch slots of its sides."""

    target: Target
    block: Block
    left: Tensor | None
    """(local rows, k), on the parameter's device."""
    right: Tensor | None
    """(local columns, k)."""
    left_slot: Slot | None
    """C = P^T M: (k, local columns)."""
    right_slot: Slot | None
    """D^T = Q^T M^T: (k, local rows)."""

    def slots(self) -> Iterator[tuple[str, Slot, int, tuple[int, int] | None]]:
        """(side of the basis, slot, length of the whole sketch, which part of it is here; None: all)."""
        block = self.block
        if self.left_slot is not None:
            assert self.target.left is not None
            yield self.target.left, self.left_slot, block.shape[1], block.columns if block.column_group else None
        if self.right_slot is not None:
            assert self.target.right is not None
            yield self.target.right, self.right_slot, block.shape[0], block.rows if block.row_group else None


@dataclass
class Plan:
    """Everything about a pass that does not change from step to step."""

    dtype: torch.dtype
    entries: list[Entry] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)

    def new_flats(self) -> list[Tensor]:
        """Zeros, one flat tensor per bucket."""
        return [torch.zeros(bucket.numel, dtype=self.dtype, device=bucket.device) for bucket in self.buckets]

    def bytes_reduced(self) -> int:
        """Bytes that one pass hands to all-reduce, over all groups."""
        return sum(bucket.numel for bucket in self.buckets if bucket.group is not None) * self.dtype.itemsize


def build_plan(targets: Sequence[Target], basis: SpuriousBasis | None) -> Plan:
    """Collective. Raises `InputError` for tensors that no adapter handles, content that is not finite and orthonormal,
    and ranks that do not plan the same."""
    dtypes = {target.parameter.dtype for target in targets}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise InputError("protected parameters mix float64 with lower precisions; use one precision")
    plan = Plan(torch.float64 if torch.float64 in dtypes else torch.float32)
    builder = _Builder(plan, basis)
    blocks = [make_fragment(target.name, target.parameter) for target in targets]
    trouble: InputError | None = None
    try:
        for target, block in zip(targets, blocks, strict=True):
            plan.entries.append(builder.entry(target, block))
    except InputError as error:  # one rank's rows may be damaged: the others must not wait for it
        trouble = error
    _check_same(plan, targets, blocks, trouble)
    _check_orthonormal(plan)
    return plan


class _Builder:
    def __init__(self, plan: Plan, basis: SpuriousBasis | None) -> None:
        self.plan, self.basis = plan, basis
        self._buckets: dict[tuple[dist.ProcessGroup | None, torch.device], int] = {}
        self._rows: dict[tuple[str, str, tuple[int, int], torch.device], Tensor] = {}

    def entry(self, target: Target, block: Block) -> Entry:
        device = block.local(target.parameter).device
        left = self._read(target.weight, target.left, block.rows, device)
        right = self._read(target.weight, target.right, block.columns, device)
        rows, columns = block.size
        return Entry(
            target=target,
            block=block,
            left=left,
            right=right,
            left_slot=None if left is None else self._slot(block.row_group, device, (left.shape[1], columns)),
            right_slot=None if right is None else self._slot(block.column_group, device, (right.shape[1], rows)),
        )

    def _read(self, weight: str, side: str | None, span: tuple[int, int], device: torch.device) -> Tensor | None:
        if side is None:
            return None
        assert self.basis is not None
        key = (weight, side, span, device)
        if key not in self._rows:
            rows = self.basis.rows(weight, side, *span)
            self._rows[key] = rows.to(device, self.plan.dtype, copy=True, memory_format=torch.contiguous_format)
        return self._rows[key]

    def _slot(self, group: dist.ProcessGroup | None, device: torch.device, shape: tuple[int, int]) -> Slot:
        index = self._buckets.setdefault((group, device), len(self._buckets))
        if index == len(self.plan.buckets):
            self.plan.buckets.append(Bucket(group, device))
        bucket = self.plan.buckets[index]
        slot = Slot(index, bucket.numel, shape)
        bucket.numel += shape[0] * shape[1]
        return slot


def sum_over_groups(terms: Sequence[tuple[dist.ProcessGroup | None, Tensor]]) -> list[Tensor]:
    """Each tensor summed over its group, with one all-reduce per group; the order of groups is that of the terms."""
    members: dict[dist.ProcessGroup, list[int]] = {}
    for index, (group, _) in enumerate(terms):
        if group is not None:
            members.setdefault(group, []).append(index)
    results = [tensor for _, tensor in terms]
    for group, indices in members.items():
        flat = torch.cat([results[index].reshape(-1) for index in indices])
        dist.all_reduce(flat, group=group)
        for index, piece in zip(indices, flat.split([results[index].numel() for index in indices]), strict=True):
            results[index] = piece.view(results[index].shape)
    return results


def _check_same(plan: Plan, targets: Sequence[Target], blocks: Sequence[Block], trouble: InputError | None) -> None:
    layout = [
        [target.name, block.shape, block.row_group is not None, block.column_group is not None, str(plan.dtype)]
        + [None if side is None else list(side.shape[1:]) for side in (entry.left, entry.right)]
        for target, block, entry in zip(targets, blocks, plan.entries, strict=False)
    ]
    digest = hashlib.sha256(json.dumps(layout).encode()).digest()
    number = float(int.from_bytes(digest[:6], "big"))  # 48 bits: exact in float64
    checked: dict[dist.ProcessGroup, list[int]] = {}
    for index, block in enumerate(blocks):
        if block.check_group is not None:
            checked.setdefault(block.check_group, []).append(index)
    for group, indices in checked.items():
        device = blocks[indices[0]].local(targets[indices[0]].parameter).device
        high, low, failed = _largest([number, -number, float(trouble is not None)], group, device)
        if failed:
            raise trouble or InputError("another rank cannot read its rows of the basis; its own message says why")
        if high != -low:
            raise InputError(
                "the ranks do not protect the same weights with the same basis shapes; load one basis, with the same "
                "rank and side, on every rank"
            )
        sums = [value for index in indices for value in _checksums(plan.entries[index])]
        largest = _largest([*sums, *(-value for value in sums)], group, device) if sums else []
        for index in range(len(sums)):
            if largest[index] + largest[index + len(sums)] > 1e-3:
                raise InputError("the ranks hold different bases of the same shapes; load one basis on every rank")
    if trouble is not None:
        raise trouble


def _largest(values: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    try:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:
        if "backend" not in str(error).lower():
            raise
        raise InputError(
            f"the process group cannot sum tensors on {device}, where the protected weights are ({error}); start it "
            "with a backend for both, e.g. init_process_group('cpu:gloo,cuda:nccl')"
        ) from None
    return tensor.tolist()


def _checksums(entry: Entry) -> list[float]:
    """One number for each side that the rank holds whole, different for different columns."""
    sums = []
    whole = ((entry.left, entry.block.row_group), (entry.right, entry.block.column_group))
    for columns in (side for side, group in whole if side is not None and group is None):
        wide = columns.double()
        rows, k = (torch.arange(n, dtype=torch.float64, device=wide.device).cos() for n in wide.shape)
        sums.append((rows @ wide @ k).item())
    return sums


def _check_orthonormal(plan: Plan) -> None:
    """P^T P = I for every basis, from partial sums over the ranks that share it."""
    sides = []
    for entry in plan.entries:
        sides.append((entry, entry.target.left, entry.left, entry.block.row_group))
        sides.append((entry, entry.target.right, entry.right, entry.block.column_group))
    present = [(entry, side, columns.double(), group) for entry, side, columns, group in sides if columns is not None]
    grams = sum_over_groups([(group, columns.T @ columns) for _, _, columns, group in present])
    for (entry, side, _, _), gram in zip(present, grams, strict=True):
        error = (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().max().item()
        if not error <= ORTHONORMAL_TOLERANCE or math.isnan(error):
            raise InputError(
                f"the {side} columns of {entry.target.weight!r} are not orthonormal (|Q^T Q - I| is {error:.1e}, "
                f"allowed {ORTHONORMAL_TOLERANCE:.0e}); orthonormalise them with torch.linalg.qr, or detect them again"
            )
