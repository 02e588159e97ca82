"""Leading singular vectors of one run's updates, weight by weight: one-shot detection as a detector. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, build_basis, chosen_sides, one_run
from grasp_dist.detection.rank_choice import RankRule, check_rule, choose_rank

__all__ = ["Leading"]


@dataclass(frozen=True)
class Leading:
    """The `rank` leading singular vectors of each weight's update in one naive fine-tune, as `detect_basis` gives them.

    Confidence: the share of all weights' update energy |dW|_F^2 that the kept directions carry.
    """

    name: ClassVar[str] = "leading"
    rank: RankRule = 8
    side: Side = "write"
    seed: int = 0
    """Of the null that rank "parallel" draws."""

    def __post_init__(self) -> None:
        check_rule(self.rank)
        chosen_sides(self.side)

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for any number of runs but one, and a run that learnt nothing."""
        run = one_run(runs, self.name)
        factors = factorise(run)
        ranks = {name: choose_rank(run.weights[name], self.rank, seed=self.seed) for name in factors}
        tensors, values, weights = {}, {}, {}
        for name, one in factors.items():
            for side in chosen_sides(self.side):
                tensors[f"{name}.{side}"] = one.vectors(side)[:, : ranks[name]]
                values[f"{name}.{side}"] = one.values
            share = one.values[: ranks[name]].square().sum().item() / one.energy
            weights[name] = {"rank": ranks[name], "share": share, "energy": one.energy}
        total = sum(one.energy for one in factors.values())
        kept = sum(entry["share"] * entry["energy"] for entry in weights.values())
        basis = build_basis(self, tensors, runs, base, singular_values=values)
        return Detection(basis, min(1.0, kept / total), {"weights": weights, "energy": total})
