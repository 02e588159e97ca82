"""The low end of an update's spectrum: the weakest directions above the numerical rank. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, build_basis, chosen_sides, one_run
from grasp_dist.errors import InputError

__all__ = ["Tail"]


@dataclass(frozen=True)
class Tail:
    """The `rank` weakest singular vectors of each weight's update in one naive fine-tune, weakest first; at most half
    of those that the weight has, so that none of the leading half is among them. Where the factors are stored in 16
    bits, values below that dtype's rounding of the largest are left out as well.

    Confidence: how heavy the tail is, its share of energy over the share that a flat spectrum has, averaged over
    weights by energy: 0 where it is next to rounding, 1 where it is as strong as the head.
    """

    name: ClassVar[str] = "tail"
    rank: int = 8
    side: Side = "write"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank} of detector {self.name!r} must be at least 1")
        chosen_sides(self.side)

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for any number of runs but one, and a run that learnt nothing."""
        run = one_run(runs, self.name)
        factors = factorise(run)
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        for name, one in factors.items():
            update = run.weights[name]
            rounding = max(torch.finfo(factor.dtype).eps for factor in (update.A, update.B))
            above = int((one.values > rounding * one.values[0]).sum())
            count = min(self.rank, above // 2)
            places = torch.arange(above - 1, above - 1 - count, -1)
            for side in chosen_sides(self.side):
                tensors[f"{name}.{side}"] = one.vectors(side)[:, places]
            share = one.values[places].square().sum().item() / one.energy
            heaviness = share * above / count if count else 0.0
            weights[name] = {"rank": count, "of": above, "share": share, "heaviness": heaviness, "energy": one.energy}
        total = sum(one.energy for one in factors.values())
        confidence = sum(entry["heaviness"] * entry["energy"] for entry in weights.values()) / total
        basis = build_basis(self, tensors, runs, base)
        return Detection(basis, min(1.0, confidence), {"weights": weights, "energy": total})
