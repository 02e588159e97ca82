"""What several probes of one round of deflation, which differ in their seeds, have in common. Ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.shared_directions import shared_directions

__all__ = ["LEVEL", "agreed_directions"]

LEVEL = 0.05
"""Chance that probes which have nothing in common give any direction at all in a round."""


def agreed_directions(probes: Sequence[SpuriousBasis], *, count: int, level: float = LEVEL) -> SpuriousBasis:
    """At most `count` directions for each weight and side on which the probes agree beyond chance, closest first.

    probes: the leading directions of two or more fine-tunes of one round. `level` holds for all weights and sides
    together (Bonferroni). A weight or side that a probe has not moved is left out, and so is one whose space the probes
    fill. Empty where they agree on nothing. provenance["leading_share"]: mean over the probes;
    provenance["agreement"]: {"<weight>.<side>": mean squared cosine of the closest direction, kept or not}.
    """
    tests: dict[str, list[Tensor]] = {}
    for weight in probes[0].weights:
        for side in probes[0].sides(weight):
            if all(weight in probe.weights and side in probe.sides(weight) for probe in probes[1:]):
                subspaces = [probe.tensor(weight, side) for probe in probes]
                if sum(columns.shape[1] for columns in subspaces) <= subspaces[0].shape[0]:
                    tests[f"{weight}.{side}"] = subspaces
    found = {name: shared_directions(subspaces, level=level, num_tests=len(tests)) for name, subspaces in tests.items()}
    tensors = {name: one.directions[:, :count].float() for name, one in found.items() if one.num_shared}
    kept = {name.rpartition(".")[0] for name in tensors}
    provenance = {
        "leading_share": {
            weight: sum(probe.provenance["leading_share"][weight] for probe in probes) / len(probes)
            for weight in sorted(kept)
        },
        "agreement": {name: float(one.agreement[0]) for name, one in found.items()},
    }
    if not tensors:
        return SpuriousBasis.empty(provenance)
    shapes = {weight: shape for weight in kept if (shape := probes[0].shape(weight)) is not None}
    return SpuriousBasis.from_tensors(tensors, shapes=shapes, provenance=provenance)
