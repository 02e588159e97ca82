"""Directions that a run takes early and keeps: early adapters of one training against its last. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import Factors, factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, build_basis, chosen_sides, several_runs
from grasp_dist.detection.rank_choice import RankRule, check_rule, choose_rank
from grasp_dist.detection.signs import fix_signs
from grasp_dist.errors import InputError
from grasp_dist.subspaces import independent_columns

__all__ = ["Trajectory"]

# A later direction joins if the sine of its angle to those that stand is above this.
_NEW = 0.5


@dataclass(frozen=True)
class Trajectory:
    """Adapters of one training, in the order of its steps: per weight and side, the principal vectors of each earlier
    update's `rank` leading directions that lie in the last one's, their cosine being at least `min_cosine`. Those of
    the first adapter stand first, each adapter's by the energy they carry in it.

    A learns little next to its random start, so read directions persist in any run: "write" is the side that tells.

    Confidence: the share of the last update's energy, over all weights, along the directions that were early and kept.
    """

    name: ClassVar[str] = "trajectory"
    rank: RankRule = 8
    side: Side = "write"
    min_cosine: float = 0.7
    seed: int = 0
    """Of the null that rank "parallel" draws."""

    def __post_init__(self) -> None:
        check_rule(self.rank)
        chosen_sides(self.side)
        if not 0 < self.min_cosine <= 1:
            raise InputError(f"min_cosine {self.min_cosine} of detector {self.name!r} must be above 0 and at most 1")

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for fewer than two adapters, and adapters of other weights."""
        runs = several_runs(runs, self.name)
        *early, late = (factorise(run) for run in runs)
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        sides = chosen_sides(self.side)
        captured = 0.0
        for name, last in late.items():
            last_rank = choose_rank(runs[-1].weights[name], self.rank, seed=self.seed)
            for side in sides:
                kept = last.vectors(side)[:, :0]
                steps: list[int] = []
                cosines: list[float] = []
                for index, factors in enumerate(early):
                    if name not in factors:
                        continue
                    first_rank = choose_rank(runs[index].weights[name], self.rank, seed=self.seed)
                    columns, found = self._persistent(factors[name], first_rank, last, last_rank, side)
                    added, places = independent_columns(kept, columns, _NEW)
                    kept = torch.cat([kept, added], dim=1)
                    steps += [index] * len(places)
                    cosines += [found[place] for place in places]
                tensors[f"{name}.{side}"] = kept
                share = last.captured(kept, side) / last.energy
                captured += share * last.energy
                weights[f"{name}.{side}"] = {"first_seen": steps, "cosines": cosines, "share": share}
        total = sum(one.energy for one in late.values()) * len(sides)
        evidence = {"weights": weights, "adapters": len(runs)}
        return Detection(build_basis(self, tensors, runs, base), min(1.0, captured / total), evidence)

    def _persistent(
        self, first: Factors, first_rank: int, last: Factors, last_rank: int, side: str
    ) -> tuple[Tensor, list[float]]:
        """Orthonormal directions of the earlier update (dim, j) and their cosines, strongest in it first."""
        early, late = first.vectors(side)[:, :first_rank], last.vectors(side)[:, :last_rank]
        turn, cosines, _ = torch.linalg.svd(early.mT @ late, full_matrices=False)
        turn = turn[:, cosines >= self.min_cosine]
        # Principal vectors of near-equal cosines are any rotation of each other: the earlier update settles it.
        _, _, rotation = torch.linalg.svd(first.values[:first_rank].unsqueeze(1) * turn, full_matrices=False)
        columns = fix_signs(early @ (turn @ rotation.mT))
        return columns, (late.mT @ columns).norm(dim=0).clamp(max=1.0).tolist()
