"""Directions that several runs share beyond chance: other seeds, other halves of the data, other ranks. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import Factors, energy_shares, factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, build_basis, chosen_sides, several_runs
from grasp_dist.detection.rank_choice import RankRule, check_rule, choose_rank
from grasp_dist.detection.shared_directions import shared_directions
from grasp_dist.errors import InputError

__all__ = ["Agreement"]


@dataclass(frozen=True)
class Agreement:
    """Per weight and side, the directions on which the `rank` leading singular vectors of two or more runs agree more
    than the closest pair of random subspaces does (`shared_directions`), closest first.

    `level`: the chance that independent runs give any direction at all, over all weights and sides (Bonferroni). Runs
    of one seed start from one random A, so that their read directions agree without having learnt the same: that is
    noticed, and refused for side "read" and "both". Write directions start from B = 0 and are not affected.

    Confidence: the share of tested weights and sides with a shared direction, by energy.
    """

    name: ClassVar[str] = "agreement"
    rank: RankRule = 8
    side: Side = "write"
    level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_rule(self.rank)
        chosen_sides(self.side)
        if not 0 < self.level < 1:
            raise InputError(f"level {self.level} of detector {self.name!r} must be above 0 and below 1")

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for fewer than two runs, runs of other weights, and read sides of one seed's runs."""
        runs = several_runs(runs, self.name)
        if self.side != "write" and (name := _shared_start(runs, self.level, self.seed)) is not None:
            raise InputError(
                f"the runs' A factors agree in most of their directions (as in {name!r}), as runs of one seed do, so "
                "their read directions agree by their common start; use side 'write', or runs of other seeds"
            )
        factors = [factorise(run) for run in runs]
        tests = {
            (name, side): subspaces
            for name in factors[0]
            if all(name in one for one in factors)
            for side in chosen_sides(self.side)
            if (subspaces := self._leading(name, side, runs, factors)) is not None
        }
        shares = [energy_shares(one) for one in factors]
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        for (name, side), subspaces in tests.items():
            found = shared_directions(subspaces, level=self.level, num_tests=len(tests), seed=self.seed)
            tensors[f"{name}.{side}"] = found.directions
            weights[f"{name}.{side}"] = {
                "shared": found.num_shared,
                "agreement": found.agreement[: max(u.shape[1] for u in subspaces)].tolist(),
                "threshold": found.threshold,
                "energy": sum(share[name] for share in shares) / len(runs),
            }
        total = sum(entry["energy"] for entry in weights.values())
        significant = sum(entry["energy"] for entry in weights.values() if entry["shared"])
        evidence = {"weights": weights, "tests": len(tests), "runs": len(runs)}
        basis = build_basis(self, tensors, runs, base)
        return Detection(basis, min(1.0, significant / total) if total else 0.0, evidence)

    def _leading(
        self, name: str, side: str, runs: Sequence[AdapterUpdate], factors: Sequence[dict[str, Factors]]
    ) -> list[Tensor] | None:
        """The leading subspaces of one weight; None where a run has none. At most a quarter of the space in all: larger
        ones would agree anyway."""
        found = []
        for run, one in zip(runs, factors, strict=True):
            vectors = one[name].vectors(side)
            most = max(1, vectors.shape[0] // (4 * len(runs)))
            found.append(vectors[:, : min(most, choose_rank(run.weights[name], self.rank, seed=self.seed))])
        return found if all(columns.shape[1] for columns in found) else None


def _shared_start(runs: Sequence[AdapterUpdate], level: float, seed: int) -> str | None:
    """A weight whose A factors agree in more than half of their directions, if most weights are so: one seed's runs."""
    alike = []
    for name, update in runs[0].weights.items():
        rows = [torch.linalg.qr(run.weights[name].A.detach().cpu().double().mT)[0] for run in runs]
        smallest = min(columns.shape[1] for columns in rows)
        if sum(columns.shape[1] for columns in rows) > update.shape[1]:
            continue  # too narrow to tell
        found = shared_directions(rows, level=level, num_tests=len(runs[0].weights), seed=seed)
        if found.num_shared > smallest / 2:
            alike.append(name)
    return alike[0] if len(alike) > len(runs[0].weights) / 2 else None
