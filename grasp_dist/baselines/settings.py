"""What an arm says of the alternative that it is, as typed settings. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from grasp_dist.settings import LocalPath, Section

__all__ = [
    "Alternative",
    "BackwardProjection",
    "Caft",
    "Inoculation",
    "Interleaving",
    "KlToBase",
    "Ldifs",
    "Posthoc",
    "PreventativeSteering",
    "SafeLora",
    "ShiftDirections",
    "Steering",
    "Truncation",
    "needs_naive",
]


class KlToBase(Section):
    kind: Literal["kl"]
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of KL(model || base) beside the cross entropy, both in nats per trained token."""


class Ldifs(Section):
    kind: Literal["ldifs"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the squared distance between the model's and the base's residual streams."""
    every: Annotated[int, Field(ge=1)] = 5
    """Behind every so many layers, counted from the last one back."""


class ShiftDirections(Section):
    rank: Annotated[int, Field(ge=1)] = 8
    """Principal directions of the naive fine-tune's shift, for each layer."""
    layers: list[int] | None = None
    """Layers, counted from 0; null: all."""
    examples: Annotated[int, Field(ge=1)] = 256
    """Training examples on which the shift is measured."""


class Caft(ShiftDirections):
    kind: Literal["caft"]


class BackwardProjection(ShiftDirections):
    kind: Literal["backward_projection"]


class PreventativeSteering(Section):
    kind: Literal["preventative_steering"]
    coefficient: float = 1.0
    """Of the vector; 1 adds all of the naive fine-tune's mean shift."""
    layer: int | None = None
    """Counted from 0; null: the middle one."""
    examples: Annotated[int, Field(ge=1)] = 256
    """Training examples on which the shift is measured."""


class Posthoc(Section):
    """Changes a naive fine-tune's adapter; trains nothing."""


class Truncation(Posthoc):
    kind: Literal["truncation"]
    keep: Literal["head", "tail"] = "head"
    """The leading directions of each weight's naive update, or what is left without them."""
    rank: Annotated[int, Field(ge=1)] = 1
    """How many are leading."""


class SafeLora(Posthoc):
    kind: Literal["safelora"]
    unaligned: LocalPath
    """Directory of the model before its alignment; the run's model is the aligned one."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Weights whose update has at most this cosine with its projection are projected."""


class Steering(Posthoc):
    """Takes the naive fine-tune's mean shift back when the model is used."""

    kind: Literal["steering"]
    coefficient: float = 1.0
    """Of the vector; 1 takes all of the shift back at its layer."""
    layer: int | None = None
    """Counted from 0; null: the middle one."""
    examples: Annotated[int, Field(ge=1)] = 256
    """Training examples on which the shift is measured."""


class Inoculation(Section):
    kind: Literal["inoculation"]
    prompt: Annotated[str, Field(min_length=1)]
    """Asks, in training only, for the behaviour that is not wanted: a system prompt, or text before a plain prompt."""


class Interleaving(Section):
    kind: Literal["interleaving"]
    path: LocalPath
    """Safe data, in the format of the run's own."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of the training examples."""


Alternative = Annotated[
    KlToBase
    | Ldifs
    | Caft
    | BackwardProjection
    | PreventativeSteering
    | Truncation
    | SafeLora
    | Steering
    | Inoculation
    | Interleaving,
    Field(discriminator="kind"),
]


def needs_naive(alternative: Any) -> bool:
    """Whether it begins with a naive fine-tune, that of the same seed."""
    return isinstance(alternative, (ShiftDirections, PreventativeSteering, Posthoc))
