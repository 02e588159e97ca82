"""Residual consensus: directions of the residual stream that the updates of many layers write to, or read from. Ours.

Legend: hidden is the width of the stream; X (hidden, c) the pooled votes; k the number of directions kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.closure import close_residual_basis
from grasp_dist.detection.detectors.factors import Factors, energy_shares, factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, chosen_sides, need_base, one_run, provenance
from grasp_dist.detection.rank_choice import RankRule, above_null, check_rule, hard_threshold, spectral_gap
from grasp_dist.detection.residual_maps import Stream, close_residual_reads
from grasp_dist.detection.signs import fix_signs
from grasp_dist.detection.svd import numerical_rank
from grasp_dist.errors import InputError

__all__ = ["Consensus"]


@dataclass(frozen=True)
class Consensus:
    """The residual directions common to the updates of one naive fine-tune: each weight's effective writes (reads) are
    mapped into the residual stream, its `depth` leading ones cast a vote of total 1 (or, with vote="energy", of the
    weight's share of the update's energy), in proportion to their energy, and the leading eigenvectors of the pooled
    votes are closed over the model's weights again.

    `through`: also map writes of v_proj, up_proj and gate_proj, and reads of o_proj and down_proj, through their frozen
    neighbours. `closure`: block the directions in those neighbours as well, not only in the modules at the stream.

    The null turns each weight's directions at random, independently, with their strengths kept; rank "parallel" counts
    the leading directions beyond it. A side on which the k leading directions hold no more energy than the strongest of
    `draws` nulls is left out. Confidence: (share - mean null share) / (1 - mean null share) of the energy in the k
    leading directions; of two sides the mean.
    """

    name: ClassVar[str] = "consensus"
    rank: RankRule = 8
    side: Side = "write"
    through: bool = True
    closure: bool = True
    vote: Literal["equal", "energy"] = "equal"
    depth: int = 8
    draws: int = 19
    seed: int = 0

    def __post_init__(self) -> None:
        check_rule(self.rank)
        chosen_sides(self.side)
        if self.vote not in ("equal", "energy") or self.depth < 1 or self.draws < 1:
            raise InputError(
                f"vote {self.vote!r}, depth {self.depth} and draws {self.draws} of detector {self.name!r} must be "
                "'equal' or 'energy', at least 1, and at least 1"
            )

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for any number of runs but one, no base model, a run whose weights do not touch the
        residual stream, and what `close_residual_basis` and `close_residual_reads` refuse."""
        run, base = one_run(runs, self.name), need_base(base, self.name)
        factors = factorise(run)
        stream = Stream(base)
        found: list[SpuriousBasis] = []
        evidence: dict[str, Any] = {}
        scores = []
        for side in chosen_sides(self.side):
            blocks, unmapped = self._votes(stream, factors, side)
            directions, score, evidence[side] = self._pool(blocks)
            evidence[side]["unmapped"] = unmapped
            scores.append(score)
            if not directions.shape[1]:
                continue
            if side == "write":
                found.append(close_residual_basis(directions, base.model, neighbours=self.closure))
            else:
                found.append(close_residual_reads(directions, base, through=self.closure))
        basis = None
        if found:
            joined = found[0] if len(found) == 1 else found[0].union(found[1])
            basis = joined.with_provenance(**provenance(self, runs, base))
        return Detection(basis, sum(scores) / len(scores), evidence)

    def _votes(self, stream: Stream, factors: Mapping[str, Factors], side: str) -> tuple[dict[str, Tensor], list[str]]:
        """{weight: (hidden, c)}, of the vote's energy each; and the weights that have none."""
        shares = energy_shares(factors)
        blocks, unmapped = {}, []
        for name, update in factors.items():
            mapped = (stream.writes if side == "write" else stream.reads)(name, update, through=self.through)
            if mapped is None:
                unmapped.append(name)
                continue
            left, values, _ = torch.linalg.svd(mapped, full_matrices=False)
            block = (left * values)[:, : self.depth]
            weight = 1.0 if self.vote == "equal" else shares[name]
            blocks[name] = block * (weight**0.5 / block.norm())
        if not blocks:
            raise InputError(
                f"none of the adapted weights ({next(iter(factors))!r}, ..) is known to {side} the residual stream"
                f"{'' if self.through else ' itself; try through=True'}"
            )
        return blocks, unmapped

    def _pool(self, blocks: Mapping[str, Tensor]) -> tuple[Tensor, float, dict[str, Any]]:
        """Directions (hidden, k), the confidence, and the evidence of one side."""
        votes = torch.cat(list(blocks.values()), dim=1)
        left, values, _ = torch.linalg.svd(votes, full_matrices=False)
        null = self._null(blocks, votes.shape[0])
        count = self._count(values, null, votes.shape)
        shares = values.square().cumsum(0) / values.square().sum()
        null_shares = (null.square().cumsum(1) / null.square().sum(1, keepdim=True))[:, max(count, 1) - 1]
        share, chance = shares[max(count, 1) - 1].item(), null_shares.mean().item()
        real = count > 0 and share > null_shares.max().item()
        directions = fix_signs(left[:, : count if real else 0])
        evidence = {
            "rank": directions.shape[1],
            "share": share,
            "null_share": chance,
            "null_largest": null_shares.max().item(),
            "values": values[: max(count, 1) + 8].tolist(),
            "weights": {
                name: ((directions.mT @ block).square().sum() / block.square().sum()).item()
                for name, block in blocks.items()
            },
        }
        confidence = (share - chance) / (1 - chance) if real and chance < 1 else 0.0
        return directions, min(1.0, max(0.0, confidence)), evidence

    def _null(self, blocks: Mapping[str, Tensor], hidden: int) -> Tensor:
        """Singular values (draws, min(hidden, c)) of the votes with every weight's directions turned at random."""
        generator = torch.Generator().manual_seed(self.seed)
        strengths = [block.norm(dim=0) for block in blocks.values()]
        draws = []
        for _ in range(self.draws):
            turned = [
                torch.linalg.qr(torch.randn(hidden, len(one), dtype=torch.float64, generator=generator))[0] * one
                for one in strengths
            ]
            votes = torch.cat(turned, dim=1)
            gram = votes.mT @ votes if votes.shape[1] <= hidden else votes @ votes.mT
            draws.append(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0))
        return torch.stack(draws)

    def _count(self, values: Tensor, null: Tensor, shape: Sequence[int]) -> int:
        if isinstance(self.rank, int):
            return min(self.rank, numerical_rank(values))
        if self.rank == "gap":
            return spectral_gap(values)
        if self.rank == "gavish_donoho":
            return hard_threshold(values, min(shape) / max(shape))
        return above_null(values, null)
