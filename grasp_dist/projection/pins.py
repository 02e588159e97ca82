"""Pins: the sketches of the protected weights as they were before training, which every step restores.

They are laid out like the sketches of a pass, so that a pin pass subtracts one flat tensor per bucket. A LoRA factor's
pins are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import Block, stack_shape
from grasp_dist.projection.layout import Entry, Piece
from grasp_dist.projection.plan import Plan, sum_over_groups
from grasp_dist.projection.runtime import Runtime

__all__ = ["Pins", "before_training"]


class Pins:
    """Pins of one plan. `flats`: one tensor per bucket, fp32 or wider."""

    def __init__(self, plan: Plan, runtime: Runtime, weights: Sequence[Tensor | None]) -> None:
        """Record the pins of these local weights, one per entry (None: zero); collective."""
        sources = [
            None if entry.target.is_factor else weight for entry, weight in zip(plan.entries, weights, strict=True)
        ]
        self._plan = plan
        self.flats = [flat.clone() for flat in runtime.sketch(sources)]

    def gains(self, entry: Entry) -> bool:
        """Whether `entry`, of a later plan, has directions that are not among these pins."""
        own = {name: owner.target.ranks(where) for name, owner, where in self._sides()}
        return any(own.get(_name(entry, where), 0) < entry.target.ranks(where) for where in entry.pieces)

    def carry_over(self, old: Pins) -> None:
        """Keep the pins of an earlier plan, whose directions are the first ones of this; collective."""
        earlier = {name: (owner, where) for name, owner, where in old._sides()}
        for name, entry, where in self._sides():
            if name in earlier:
                before, _ = earlier[name]
                for piece, same in zip(entry.pieces[where], before.pieces[where], strict=True):
                    values = same.view.of(old.flats)
                    piece.view.of(self.flats)[:, : values.shape[1]] = values
        self._complete()

    def state_dict(self) -> dict[str, Tensor]:
        """{"<parameter>.write" | "<parameter>.read": (k, length), or (experts, k, length) of a stack}; collective.

        Copies: a DTensor where this rank holds a block of it; whole elsewhere.
        """
        state: dict[str, Tensor] = {}
        loose: list[tuple[str, tuple[dist.ProcessGroup | None, Tensor]]] = []
        for name, entry, where in self._sides():
            pieces = entry.pieces[where]
            if isinstance(entry.fragment, Block):
                (piece,) = pieces
                pin = piece.view.of(self.flats).clone(memory_format=torch.contiguous_format)
                if entry.fragment.distribute is None:
                    state[name] = pin if entry.fragment.shape[0] > 1 else pin[0]
                else:
                    state[name] = entry.fragment.distribute(pin, _along(where))
                continue
            whole = _zeros(entry, where, self.flats)
            for piece in pieces:
                if piece.owned:
                    _range(whole, piece).copy_(piece.view.of(self.flats))
            loose.append((name, (entry.fragment.group, whole)))
        for (name, _), whole in zip(loose, sum_over_groups([term for _, term in loose]), strict=True):
            state[name] = whole if whole.shape[0] > 1 else whole[0]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over values for exactly these names and shapes; collective. Raises `InputError` for others."""
        remedy = "resume with the basis, side and rank that the run was started with"
        wanted = {name: _whole_shape(entry, where) for name, entry, where in self._sides()}
        if differing := sorted(wanted.keys() ^ state.keys()):
            where = "missing from the checkpoint" if differing[0] in wanted else "not protected here"
            raise InputError(f"the pins of {differing[0]!r} are {where} ({len(differing)} such); {remedy}")
        for name, shape in wanted.items():
            local = state[name].to_local() if isinstance(state[name], DTensor) else state[name]
            if not local.isfinite().all():
                raise InputError(f"the pins of {name!r} hold NaN or infinity; resume from an earlier checkpoint")
            if tuple(state[name].shape) != shape:
                raise InputError(
                    f"the pins of {name!r} have shape {tuple(state[name].shape)} in the checkpoint and {shape} here; "
                    f"{remedy}"
                )
        for name, entry, where in self._sides():
            value, block = state[name], entry.fragment
            if isinstance(value, DTensor):
                if isinstance(block, Block) and block.distribute is not None:
                    (piece,) = entry.pieces[where]
                    view = piece.view.of(self.flats)
                    own = block.distribute(view, _along(where))
                    if isinstance(own, DTensor) and own.placements == value.placements:
                        view.copy_(value.to_local().view(view.shape))
                        continue
                value = value.full_tensor()
            value = value if value.ndim == 3 else value.unsqueeze(0)
            for piece in entry.pieces[where]:
                piece.view.of(self.flats).copy_(_range(value, piece))
        self._complete()

    def _complete(self) -> None:
        """The pins of the overlaps that have sums of their own, E0 = C0 Q; collective."""
        terms = []
        views = []
        for entry in self._plan.entries:
            for overlap in entry.overlaps:
                if overlap.own is not None:
                    assert isinstance(entry.fragment, Block)
                    C = overlap.left_view.of(self.flats)
                    terms.append((entry.fragment.column_group, C @ overlap.right.expand(C.shape[0], -1, -1)))
                    views.append(overlap.own)
        for view, total in zip(views, sum_over_groups(terms), strict=True):
            view.of(self.flats).copy_(total)

    def _sides(self) -> Iterator[tuple[str, Entry, str]]:
        for entry in self._plan.entries:
            for where in entry.pieces:
                yield _name(entry, where), entry, where


def before_training(entry: Entry, initial: Mapping[str, Tensor]) -> Tensor | None:
    """This rank's piece of the parameter before training; None for a LoRA factor.

    `initial`: {parameter name: whole or sharded like the parameter}. Raises `InputError` if it is missing or misshapen.
    """
    target = entry.target
    if target.is_factor:
        return None
    start = initial.get(target.name)
    if start is None:
        raise InputError(
            f"{target.name!r} gains directions after training has begun, and its pins must be those of the weight "
            f"before training; pass extend(more, initial={{{target.name!r}: W0, ...}})"
        )
    shape = entry.fragment.shape
    piece = not isinstance(entry.fragment, Block) and start.ndim == 1  # of a flat partition
    if not piece and stack_shape(tuple(start.shape)) != shape:
        raise InputError(
            f"initial[{target.name!r}] has shape {tuple(start.shape)}, but the parameter has {shape[0]} matrices of "
            f"{shape[1:]}; pass the whole weight as the model stores it"
        )
    weight = entry.fragment.storage.weight()
    return entry.fragment.storage.like(start).to(weight.device)


def _zeros(entry: Entry, where: str, flats: Sequence[Tensor]) -> Tensor:
    """The whole sketch (experts, k, length) of one side, as zeros."""
    experts = entry.fragment.shape[0]
    device = entry.fragment.storage.weight().device
    dtype = flats[0].dtype if flats else torch.float32
    return torch.zeros(experts, entry.target.ranks(where), entry.length(where), dtype=dtype, device=device)


def _along(where: str) -> int:
    """The dimension of the stack that a sketch's length runs along."""
    return 2 if where == "left" else 1


def _whole_shape(entry: Entry, where: str) -> tuple[int, ...]:
    experts = entry.fragment.shape[0]
    shape = entry.target.ranks(where), entry.length(where)
    return (experts, *shape) if experts > 1 else shape


def _range(whole: Tensor, piece: Piece) -> Tensor:
    return whole[piece.experts[0] : piece.experts[1], :, piece.length[0] : piece.length[1]]


def _name(entry: Entry, where: str) -> str:
    return f"{entry.target.name}.{entry.side(where)}"
