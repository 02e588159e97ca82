"""Pins: the sketches of the protected weights as they were before training, which every step restores.

They are laid out like the sketches of a pass, so that a pin pass subtracts one flat tensor per bucket. A LoRA factor's
pins are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from grasp_dist.errors import InputError
from grasp_dist.projection.fragments import as_matrix
from grasp_dist.projection.plan import Entry, Plan
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
        own = {name: view.shape[0] for name, view in self._views()}
        return any(own.get(f"{entry.target.name}.{side}", 0) < slot.shape[0] for side, slot, _, _ in entry.slots())

    def carry_over(self, old: Pins) -> None:
        """Keep the pins of an earlier plan, whose directions are the first ones of this."""
        own = dict(self._views())
        for name, values in old._views():
            own[name][: values.shape[0]] = values

    def state_dict(self) -> dict[str, Tensor]:
        """{"<parameter>.write" | "<parameter>.read": (k, length)}, sharing memory; a DTensor where a piece is here."""
        state = {}
        for entry in self._plan.entries:
            for side, slot, length, span in entry.slots():
                pin = slot.view(self.flats)
                if span is not None:
                    assert entry.block.distribute is not None
                    pin = entry.block.distribute(pin, length)
                state[f"{entry.target.name}.{side}"] = pin
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over values for exactly these names and shapes. Raises `InputError` for others."""
        remedy = "resume with the basis, side and rank that the run was started with"
        own = self.state_dict()
        if differing := sorted(own.keys() ^ state.keys()):
            where = "missing from the checkpoint" if differing[0] in own else "not protected here"
            raise InputError(f"the pins of {differing[0]!r} are {where} ({len(differing)} such); {remedy}")
        for name, pin in own.items():
            if tuple(state[name].shape) != tuple(pin.shape):
                raise InputError(
                    f"the pins of {name!r} have shape {tuple(state[name].shape)} in the checkpoint and "
                    f"{tuple(pin.shape)} here; {remedy}"
                )
        for entry in self._plan.entries:
            for side, slot, _, span in entry.slots():
                slot.view(self.flats).copy_(_piece(state[f"{entry.target.name}.{side}"], span))

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self._plan.entries:
            for side, slot, _, _ in entry.slots():
                yield f"{entry.target.name}.{side}", slot.view(self.flats)


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
    if start.shape != target.parameter.shape:
        raise InputError(
            f"initial[{target.name!r}] has shape {tuple(start.shape)}, but the parameter has "
            f"{tuple(target.parameter.shape)}"
        )
    if isinstance(start, DTensor):
        piece = entry.block.local(start)
    else:
        piece = as_matrix(start)[slice(*entry.block.rows), slice(*entry.block.columns)]
    return piece.to(entry.block.local(target.parameter).device)


def _piece(value: Tensor, span: tuple[int, int] | None) -> Tensor:
    """The columns `span` of saved pins, which are whole or this rank's piece of a DTensor."""
    if isinstance(value, DTensor):
        return value.full_tensor() if span is None else value.to_local()
    return value if span is None else value[:, slice(*span)]
