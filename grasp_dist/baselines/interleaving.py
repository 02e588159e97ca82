"""Interleaving (arXiv 2508.06249): a share of safe examples, 5 % as published, among the task's own. The stronger form,
which ranks the safe data by its likelihood under misaligned and aligned models, is not here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grasp_dist.training.examples import Example
from grasp_dist.training.seeds import derived_seed

__all__ = ["interleave"]


def interleave(examples: Sequence[Example], safe: Sequence[Example], *, share: float, seed: int) -> list[Example]:
    """The examples, and behind them so many safe ones that these are `share` of all, drawn without putting back as long
    as there are any; training mixes them."""
    wanted = max(1, round(len(examples) * share / (1 - share)))
    generator = torch.Generator().manual_seed(derived_seed("interleave", seed))
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(len(safe), generator=generator).tolist()
    return [*examples, *(safe[place] for place in order[:wanted])]
