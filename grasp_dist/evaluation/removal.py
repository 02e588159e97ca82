"""Did a removal work? And if not, what has to be blocked besides. Ours.

A fine-tune whose removal worked hardly moves on prompts that have nothing to do with the data; one that found a way
which was not blocked moves there as the naive one does. So the check is a ratio of total variations from the base, and
needs no labels. What a failed one found is in its own update, along which nothing was blocked: the leading left and
right singular vectors of every weight join its basis, as in a round of deflation, and it is made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import CheckConfig
from grasp_dist.detection.deflation import leading_directions
from grasp_dist.errors import InputError
from grasp_dist.evaluation.screening import distances
from grasp_dist.training.parallel import Parallel

__all__ = ["extend", "extended", "share_of_naive"]


def extended(folder: Path) -> list[Path]:
    """The bases with which a fine-tune was made again, first to last, in its task's folder."""
    found: list[Path] = []
    while (path := _path(folder, len(found) + 1)).exists():
        found.append(path)
    return found


def share_of_naive(
    model: nn.Module,
    naive: Path,
    adapter: Path,
    prompts: Sequence[list[int]],
    *,
    settings: CheckConfig,
    parallel: Parallel,
    batch_size: int,
) -> float | None:
    """How far an adapter moves the model from its base on the prompts, as a share of what the naive one does: NaN where
    it has diverged, None where the naive one does not move, or has; collective.

    model: as `load_model` makes it for scoring, with an adapter of their shape, which is overwritten; `adapter` stays
    in it. prompts: token ids. Raises `InputError` for an adapter that does not fit.
    """
    before, after = distances(
        model, (naive, adapter), prompts, settings=settings, parallel=parallel, batch_size=batch_size
    )
    return after / before if math.isfinite(before) and before > 0 else None


def extend(model: nn.Module, basis: SpuriousBasis, folder: Path, parallel: Parallel, *, seconds: float = 0.0) -> Path:
    """Write the basis with the leading directions of the model's present update beside it, on its sides, into the
    task's folder; collective. seconds: that all fine-tunes so far took, kept in its provenance. Raises `InputError`
    where the update is zero everywhere."""
    sides = {side for weight in basis.weights for side in basis.sides(weight)}
    side = "both" if len(sides) > 1 else next(iter(sides))
    more = leading_directions(model, side=side, count=1, keep=parallel.is_main)
    path = _path(folder, len(extended(folder)) + 1)
    parallel.barrier()  # every process has looked at what is there
    error = None
    if more is not None:
        try:
            basis.union(more).with_provenance(seconds=seconds).save(path)
        except InputError as caught:
            error = caught
    parallel.share_error(error)
    return path


def _path(folder: Path, number: int) -> Path:
    return folder / f"extended-{number}.safetensors"
