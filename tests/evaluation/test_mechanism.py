"""The share of an update inside a basis, against the dense matrices."""

import pytest
import torch

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.evaluation.mechanism import inside

WEIGHT, OTHER = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"


def test_shares_are_those_of_the_dense_update():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {name: (draw(4, 20), draw(12, 4), scale) for name, scale in ((WEIGHT, 2.0), (OTHER, 0.5))}
    update = AdapterUpdate(
        {name: LowRankUpdate(A=a, B=b, scale=scale, fan_in_fan_out=False) for name, (a, b, scale) in factors.items()},
        None,
        None,
        {},
        "",
    )
    write, read = (torch.linalg.qr(draw(size, 3))[0] for size in (12, 20))
    found = inside(update, SpuriousBasis.from_tensors({f"{WEIGHT}.write": write, f"{WEIGHT}.read": read}))
    dense = {name: scale * b @ a for name, (a, b, scale) in factors.items()}
    whole = sum(float(one.square().sum()) for one in dense.values())
    assert found["inside"]["write"] == pytest.approx(float((write.T @ dense[WEIGHT]).square().sum()) / whole)
    assert found["inside"]["read"] == pytest.approx(float((dense[WEIGHT] @ read).square().sum()) / whole)
    energy = {row["weight"]: row["energy"] for row in found["weights"]}
    assert energy[WEIGHT] == pytest.approx(float(dense[WEIGHT].square().sum()) / whole)
    assert sum(energy.values()) == pytest.approx(1)
    assert found["chance"]["write"] == pytest.approx(energy[WEIGHT] * 3 / 12)
    assert found["chance"]["read"] == pytest.approx(energy[WEIGHT] * 3 / 20)
