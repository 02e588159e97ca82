"""Updates with known directions in them, without a training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate

__all__ = ["O_PROJ", "SHAPES", "generator", "make_run", "unit"]

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SHAPES = {
    O_PROJ: (96, 96),
    "model.layers.0.mlp.down_proj.weight": (96, 160),
    "model.layers.1.mlp.down_proj.weight": (96, 160),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(dim: int, seed: int) -> Tensor:
    """A random unit vector (dim,), fp64."""
    vector = torch.randn(dim, generator=generator(seed), dtype=torch.float64)
    return vector / vector.norm()


def make_run(
    seed: int,
    *,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 6,
    writes: Mapping[str, Tensor] | None = None,
    reads: Mapping[str, Tensor] | None = None,
    strength: float = 4.0,
    start: int | None = None,
) -> AdapterUpdate:
    """A run of Gaussian factors (noise of singular values near 1), plus strength * w q^T with w of `writes` and a
    random q, and with p of `reads` and a random left side. start: seed of A, of its own."""
    weights = {}
    for place, (name, (out, into)) in enumerate(shapes.items()):
        noise = generator(100 * seed + place)
        first = noise if start is None else generator(100 * start + place)
        a = torch.randn(rank, into, generator=first, dtype=torch.float64) / into**0.5
        b = torch.randn(out, rank, generator=noise, dtype=torch.float64) / out**0.5
        for column, given, axis in ((0, writes, "write"), (1, reads, "read")):
            if given is None or name not in given:
                continue
            if axis == "write":
                b[:, column] += strength * given[name]
            else:
                a[column] = strength * given[name]
        weights[name] = LowRankUpdate(a.float(), b.float(), 1.0, False)
    return AdapterUpdate(weights, "org/base", None, {}, f"hash-{seed}")
