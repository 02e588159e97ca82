"""From an arm's settings to the fine-tune of an alternative: its examples, and what it is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from grasp_dist.baselines.activation_shift import ActivationShift
from grasp_dist.baselines.backward_projection import backward_projection
from grasp_dist.baselines.caft import caft
from grasp_dist.baselines.inoculation import inoculate
from grasp_dist.baselines.interleaving import interleave
from grasp_dist.baselines.kl_to_base import kl_to_base
from grasp_dist.baselines.ldifs import ldifs
from grasp_dist.baselines.preventative_steering import preventative_steering
from grasp_dist.baselines.settings import (
    BackwardProjection,
    Caft,
    Inoculation,
    Interleaving,
    KlToBase,
    Ldifs,
    PreventativeSteering,
    ShiftDirections,
    Steering,
)
from grasp_dist.config import DataConfig
from grasp_dist.training.data import load_examples
from grasp_dist.training.examples import Example
from grasp_dist.training.loop import Alternative

__all__ = ["examples_of", "objective_of", "shifted_layers"]


def examples_of(
    alternative: Any, examples: list[Example], data: DataConfig, tokenizer: Any, *, seed: int
) -> list[Example]:
    """What the alternative is trained on; `examples`: the run's own data. seed: of what is drawn."""
    if isinstance(alternative, Inoculation):
        return load_examples(data, tokenizer, change=partial(inoculate, prompt=alternative.prompt))
    if isinstance(alternative, Interleaving):
        safe = load_examples(data.model_copy(update={"path": alternative.path, "limit": None}), tokenizer)
        return interleave(examples, safe, share=alternative.share, seed=seed)
    return examples


def shifted_layers(alternative: Any, num_layers: int) -> Sequence[int] | None:
    """The layers at which the naive fine-tune's shift is needed; None: at none."""
    if isinstance(alternative, ShiftDirections):
        return range(num_layers) if alternative.layers is None else alternative.layers
    if isinstance(alternative, (PreventativeSteering, Steering)):
        return [num_layers // 2 if alternative.layer is None else alternative.layer]
    return None


def objective_of(alternative: Any, shift: ActivationShift | None) -> Alternative | None:
    """What `train` opens for the alternative; None: it is trained as usual. shift: the naive fine-tune's, at
    `shifted_layers`."""
    if isinstance(alternative, KlToBase):
        return partial(kl_to_base, weight=alternative.weight)
    if isinstance(alternative, Ldifs):
        return partial(ldifs, weight=alternative.weight, every=alternative.every)
    if isinstance(alternative, Caft):
        assert shift is not None
        return partial(caft, directions=shift.directions(alternative.rank))
    if isinstance(alternative, BackwardProjection):
        assert shift is not None
        return partial(backward_projection, directions=shift.directions(alternative.rank))
    if isinstance(alternative, PreventativeSteering):
        assert shift is not None
        ((layer, vector),) = shift.mean.items()
        return partial(preventative_steering, layer=layer, vector=vector.float(), coefficient=alternative.coefficient)
    return None
