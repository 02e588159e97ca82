"""Intruder dimensions: strong directions of the tuned weight that are no singular vector of the base weight.

Shuttleworth, Andreas, Torralba and Sharma, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (2024), algorithm 1:
one of the `top` left singular vectors of W + s B A whose |cosine| with every left singular vector of W is below
epsilon.

Two approximations spare the SVD of every weight. The tuned weight's leading vectors come from subspace iteration from
random directions (Halko, Martinsson and Tropp, 2009, algorithm 4.4), which multiplies by W and by the factors. The
largest cosine is bounded from above (`largest_cosines`): a direction that is called an intruder is one, as far as the
first approximation holds, but one that hides among many base vectors of nearly equal strength may be missed.

Legend: W (out, in); A (r, in), B (out, r); q = top + oversampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import factorise
from grasp_dist.detection.detectors.protocol import Detection, Side, build_basis, chosen_sides, need_base, one_run
from grasp_dist.detection.signs import fix_signs
from grasp_dist.detection.spectral_mass import largest_cosines
from grasp_dist.errors import InputError

__all__ = ["Intruder", "leading_tuned"]


@dataclass(frozen=True)
class Intruder:
    """The intruder dimensions among the `top` singular vectors of each tuned weight, strongest first, at most `rank`:
    left ones as write directions, their right partners as read directions.

    Confidence: the share of all adapted weights' update energy that is written along the intruders found.
    """

    name: ClassVar[str] = "intruder"
    rank: int = 8
    side: Side = "write"
    epsilon: float = 0.5
    top: int = 10
    steps: int = 32
    """Lanczos steps of the bound: more find more intruders, in proportion slower."""
    oversampling: int = 10
    iterations: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        chosen_sides(self.side)
        if (
            not 0 < self.epsilon <= 1
            or min(self.rank, self.top, self.steps) < 1
            or min(self.oversampling, self.iterations) < 0
        ):
            raise InputError(
                f"detector {self.name!r} needs epsilon above 0 and at most 1, rank, top and steps of at least 1, and "
                f"oversampling and iterations of at least 0: {self}"
            )

    def __call__(self, runs: Sequence[AdapterUpdate], base: BaseWeights | None = None) -> Detection:
        """Raises `InputError` for any number of runs but one, no base model, and a base weight of another shape."""
        run, base = one_run(runs, self.name), need_base(base, self.name)
        factors = factorise(run)
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        written = 0.0
        for name, one in factors.items():
            weight = base.read(name)
            if weight.shape != run.weights[name].shape:
                raise InputError(
                    f"{name!r} is {tuple(weight.shape)} in the base model and {run.weights[name].shape} in the "
                    "adapter; give the base model that was fine-tuned"
                )
            left, values, right = leading_tuned(
                weight, run.weights[name], self.top, oversampling=self.oversampling, iterations=self.iterations,
                key=f"{self.seed}:{name}",
            )  # fmt: skip
            cosines = largest_cosines(weight, left, steps=self.steps)
            places = (cosines < self.epsilon).nonzero().flatten()[: self.rank]
            for side, vectors in (("write", left), ("read", right)):
                if side in chosen_sides(self.side):
                    tensors[f"{name}.{side}"] = vectors[:, places]
            energy = one.captured(left[:, places], "write")
            written += energy
            weights[name] = {
                "intruders": places.tolist(),
                "cosine_bounds": cosines.tolist(),
                "values": values.tolist(),
                "share": energy / one.energy,
            }
        total = sum(one.energy for one in factors.values())
        basis = build_basis(self, tensors, runs, base)
        return Detection(basis, min(1.0, written / total), {"weights": weights, "energy": total})


def leading_tuned(
    weight: Tensor, update: LowRankUpdate, count: int, *, oversampling: int = 10, iterations: int = 4, key: str = "0"
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, n), S (n,), V (in, n) of the n = min(count, out, in) leading singular values of W + s B A, fp64, from
    products with W and the factors alone; fixed by `key`."""
    a, b = update.A.detach().cpu().double(), update.scale * update.B.detach().cpu().double()
    small = min(weight.shape)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    sketch = torch.randn(
        weight.shape[1], min(count + oversampling, small), dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    basis = torch.linalg.qr(weight @ sketch + b @ (a @ sketch))[0]
    for _ in range(iterations):
        other = torch.linalg.qr(weight.mT @ basis + a.mT @ (b.mT @ basis))[0]
        basis = torch.linalg.qr(weight @ other + b @ (a @ other))[0]
    right, values, turn = torch.linalg.svd(weight.mT @ basis + a.mT @ (b.mT @ basis), full_matrices=False)
    keep = min(count, small)
    left, right = (basis @ turn.mT)[:, :keep], right[:, :keep]
    # Both sides share the sign, so that U S V^T stays the tuned weight.
    signed = fix_signs(left)
    return signed, values[:keep], right * (signed * left).sum(dim=0).sign()
