"""The plan: what a pass does to every fragment, and the flat sketch buffers; built once, the same on every rank.

There is one bucket per process group to sum over, and one per device for what needs no sum; a pass is one all-reduce
per bucket with a group. Building is collective: ranks compare a hash of the layout and a checksum of the bases' first
rows, and sum the Gram matrices of the bases.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection.batches import Batch, batch
from grasp_dist.projection.fragments import Block, Fragment
from grasp_dist.projection.layout import BasisRows, Bucket, Buckets, Entry, lay_out_unit
from grasp_dist.projection.targets import Target
from grasp_dist.subspaces import ORTHONORMAL_TOLERANCE

__all__ = ["Plan", "build_plan", "sum_over_groups"]


@dataclass
class Plan:
    """Everything about a pass that does not change from step to step."""

    dtype: torch.dtype
    entries: list[Entry] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    """Entries whose products are made together."""
    buckets: list[Bucket] = field(default_factory=list)
    spread: bool = False
    """Whether some rank has weights that this one lacks."""

    def new_flats(self) -> list[Tensor]:
        """Zeros, one flat tensor per bucket."""
        return [torch.zeros(bucket.numel, dtype=self.dtype, device=bucket.device) for bucket in self.buckets]

    def bytes_reduced(self) -> int:
        """Bytes that one gradient pass hands to all-reduce, over all groups."""
        return sum(bucket.numel for bucket in self.buckets if bucket.group is not None) * self.dtype.itemsize


def build_plan(
    targets: Sequence[Target], fragments: Sequence[Fragment], basis: SpuriousBasis | None, *, spread: bool = False
) -> Plan:
    """Collective. spread: whether some rank has weights that this one lacks.

    Raises `InputError` for content that is not finite and orthonormal, and for ranks that do not plan the same.
    """
    pairs = sorted(zip(targets, fragments, strict=True), key=lambda pair: pair[1].unit)
    dtypes = {fragment.storage.weight().dtype for _, fragment in pairs}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise InputError("protected parameters mix float64 with lower precisions; use one precision")
    plan = Plan(torch.float64 if torch.float64 in dtypes else torch.float32, spread=spread)
    rows, buckets = BasisRows(basis, plan.dtype), Buckets()
    trouble: InputError | None = None
    checksums: list[list[float]] = []
    try:
        for _, unit in groupby(pairs, key=lambda pair: pair[1].unit):
            for entry in lay_out_unit(list(unit), rows, buckets):
                plan.entries.append(entry)
                checksums.append(_checksums(entry, rows))
    except InputError as error:  # one rank's rows may be damaged: the others must not wait for it
        trouble = error
    _check_same(plan, pairs, checksums, trouble)
    _check_orthonormal(plan)
    _add_flags(plan, buckets, spread)
    plan.buckets = buckets.all
    plan.entries, plan.batches = batch(plan.entries, plan.dtype)
    return plan


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


def _add_flags(plan: Plan, buckets: Buckets, spread: bool) -> None:
    """Give the ranks a number to agree by, where a non-finite value on one of them would not reach the others' sums."""
    groups = {entry.tile_group for entry in plan.entries} - {None}
    if spread or len(groups) > 1:
        groups = {dist.group.WORLD}
    elif all(_all_see(entry) for entry in plan.entries):
        return
    for group in groups:
        device = _device_of(group, plan)
        bucket = buckets.all[buckets.index(group, device)]
        bucket.flag = bucket.numel
        bucket.numel += 1


def _device_of(group: dist.ProcessGroup | None, plan: Plan) -> torch.device:
    """Where a number that this group sums must lie; equal on all of its ranks."""
    if group is not dist.group.WORLD:
        return plan.entries[0].fragment.storage.weight().device
    on_gpu = torch.cuda.is_available() and "cuda" in dist.get_backend_config(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _all_see(entry: Entry) -> bool:
    """Whether every number of the fragment goes into a sketch that all ranks that share the stack sum."""
    fragment, tile = entry.fragment, entry.tile_group
    if tile is None:
        return True
    left, right = entry.target.left is not None, entry.target.right is not None
    if isinstance(fragment, Block):
        if left and right and fragment.both_group is tile:
            return True
        return (left and fragment.row_group is tile) or (right and fragment.column_group is tile)
    return left and len(fragment.cut_experts) == fragment.shape[0]


def _check_same(
    plan: Plan,
    pairs: Sequence[tuple[Target, Fragment]],
    checksums: Sequence[Sequence[float]],
    trouble: InputError | None,
) -> None:
    checked: dict[dist.ProcessGroup, list[int]] = {}
    for index, (_, fragment) in enumerate(pairs):
        # In a pipeline, the ranks of another stage have no copy of a plain tensor.
        elsewhere = plan.spread and fragment.check_group is dist.group.WORLD
        if fragment.check_group is not None and not elsewhere:
            checked.setdefault(fragment.check_group, []).append(index)
    for group, indices in checked.items():
        layout = [_signature(*pairs[index], str(plan.dtype)) for index in indices]
        digest = hashlib.sha256(json.dumps(layout).encode()).digest()
        number = float(int.from_bytes(digest[:6], "big"))  # 48 bits: exact in float64
        device = pairs[indices[0]][1].storage.weight().device
        high, low, failed = _largest([number, -number, float(trouble is not None)], group, device)
        if failed:
            raise trouble or InputError("another rank cannot read its rows of the basis; its own message says why")
        if high != -low:
            raise InputError(
                "the ranks do not protect the same weights with the same basis shapes; load one basis, with the same "
                "rank and side, on every rank"
            )
        sums = [value for index in indices for value in checksums[index]]
        largest = _largest([*sums, *(-value for value in sums)], group, device) if sums else []
        for index in range(len(sums)):
            if largest[index] + largest[index + len(sums)] > 1e-3:
                raise InputError("the ranks hold different bases of the same shapes; load one basis on every rank")
    if trouble is not None:
        raise trouble


def _signature(target: Target, fragment: Fragment, dtype: str) -> list[object]:
    """What must be equal on every rank."""
    where = [target.name, target.left, target.right, target.shapes, list(fragment.shape), fragment.unit, dtype]
    if isinstance(fragment, Block):
        groups = fragment.row_group, fragment.column_group, fragment.tile_group
        return [*where, [group is not None for group in groups]]
    return [*where, list(fragment.cuts)]


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


def _checksums(entry: Entry, rows: BasisRows) -> list[float]:
    """One number for the first rows of each side, whichever of them are here; different for different columns."""
    sums = []
    device = entry.fragment.storage.weight().device
    for where in ("left", "right"):
        if where in entry.target.shapes:
            head = (0, min(64, entry.target.shapes[where][-2]))
            columns = rows.read(entry.target.weight, entry.side(where), (0, 1), head, device)
            assert columns is not None
            wide = columns[0].double()
            length, k = (torch.arange(n, dtype=torch.float64, device=device).cos() for n in wide.shape)
            sums.append((length @ wide @ k).item())
    return sums


def _check_orthonormal(plan: Plan) -> None:
    """P^T P = I for every basis and expert, from partial sums over the ranks that share it."""
    terms: list[tuple[dist.ProcessGroup | None, Tensor]] = []
    names: list[tuple[str | None, str]] = []
    for entry in plan.entries:
        for where in ("left", "right"):
            if entry.side(where) is not None:
                terms.append(_gram(entry, where))
                names.append((entry.side(where), entry.target.weight))
    for (side, weight), gram in zip(names, sum_over_groups(terms), strict=True):
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        error = (gram - eye).abs().max().item() if gram.numel() else 0.0
        if not error <= ORTHONORMAL_TOLERANCE or math.isnan(error):
            raise InputError(
                f"the {side} columns of {weight!r} are not orthonormal (|Q^T Q - I| is {error:.1e}, allowed "
                f"{ORTHONORMAL_TOLERANCE:.0e}); orthonormalise them with torch.linalg.qr, or detect them again"
            )


def _gram(entry: Entry, where: str) -> tuple[dist.ProcessGroup | None, Tensor]:
    """This rank's share of P^T P, (experts or 1, k, k), fp64, and the ranks that hold the other shares."""
    fragment = entry.fragment
    if isinstance(fragment, Block):
        (part,) = entry.parts
        columns = part.left if where == "left" else part.right
        assert columns is not None
        wide = columns.double()
        return fragment.row_group if where == "left" else fragment.column_group, wide.mT @ wide
    target, experts = entry.target, fragment.shape[0]
    shared = target.shared(where)
    k = target.ranks(where)
    device = fragment.storage.weight().device
    gram = torch.zeros(1 if shared else experts, k, k, dtype=torch.float64, device=device)
    for part in entry.parts:
        columns = part.left if where == "left" else part.right
        assert columns is not None
        first, last = part.box.experts
        if where == "left":
            # The rank that has a row's first number counts it; of shared columns, those of the first expert.
            if part.box.columns[0] > 0 or (shared and first > 0):
                continue
            wide = columns.double()
            gram[slice(0, 1) if shared else slice(first, last)] += wide.mT @ wide
        elif part.box.rows[0] == 0 and (not shared or first == 0):
            # Every rank holds V whole; the ranks that have an expert's first row count it, each its part of that row.
            wide = columns.double()
            gram[slice(0, 1) if shared else slice(first, last)] += wide.mT @ wide
    return fragment.group, gram
