"""Intruder dimensions, the bound on cosines, and base alignment, against dense decompositions."""

from pathlib import Path

import pytest
import torch
from planted import generator, unit
from tiny_models import tiny_model

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.detection.alignment import base_alignment
from grasp_dist.detection.base_weights import open_base
from grasp_dist.detection.detectors import Intruder
from grasp_dist.detection.detectors.intruder import leading_tuned
from grasp_dist.detection.spectral_mass import largest_cosines
from grasp_dist.errors import InputError

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def _gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def _columns(weight: torch.Tensor) -> torch.Tensor:
    """Random directions, singular vectors, mixtures of them, and a direction beyond the column space of a tall one."""
    left = torch.linalg.svd(weight, full_matrices=False)[0]
    full = torch.linalg.svd(weight)[0]
    noise = _gaussian(weight.shape[0], 3, seed=1)
    mixed = left[:, 2] + 0.5 * noise[:, 0] / noise[:, 0].norm()
    columns = torch.cat(
        [noise, left[:, [0, 7]], torch.stack([left[:, 3] + left[:, 4], mixed, full[:, -1]], dim=1)], dim=1
    )
    return columns / columns.norm(dim=0)


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24), (200, 200), (300, 120), (120, 300)])
def test_the_bound_holds_and_tightens(shape: tuple[int, int]) -> None:
    weight = _gaussian(*shape)
    columns = _columns(weight)
    true = (torch.linalg.svd(weight, full_matrices=False)[0].mT @ columns).abs().amax(dim=0)
    bounds = torch.stack([largest_cosines(weight, columns, steps=steps) for steps in (12, 24, 48)])
    assert (bounds >= true - 1e-3).all()
    assert bounds[-1].sub(true).max() < 0.15
    exact = largest_cosines(weight, columns, steps=min(shape))
    assert exact.allclose(true, atol=1e-5)


def test_leading_vectors_of_the_tuned_weight() -> None:
    weight = _gaussian(50, 80)
    update = LowRankUpdate(_gaussian(3, 80, seed=1).float(), _gaussian(50, 3, seed=2).float(), 0.5, False)
    left, values, right = leading_tuned(weight, update, 5, iterations=12)
    dense = torch.linalg.svd(weight + 0.5 * update.B.double() @ update.A.double(), full_matrices=False)
    assert values.allclose(dense[1][:5], rtol=1e-4)
    assert ((left * dense[0][:, :5]).sum(0).abs() > 0.999).all()
    assert (left.mT @ (weight + 0.5 * update.B.double() @ update.A.double()) @ right).allclose(
        torch.diag(values), atol=1e-6
    )


def _planted(
    name: str, strength: float, *, along: torch.Tensor | None = None
) -> tuple[AdapterUpdate, torch.Tensor, torch.nn.Module]:
    """A run that adds strength * |W| u v^T to one weight; u random, or given."""
    model = tiny_model("llama", hidden_size=96, intermediate_size=160).double()
    weight = model.get_parameter(name).detach()
    u = unit(weight.shape[0], 3) if along is None else along
    size = torch.linalg.matrix_norm(weight, ord=2)
    update = LowRankUpdate(unit(weight.shape[1], 4).unsqueeze(0), (strength * size * u).unsqueeze(1), 1.0, False)
    return AdapterUpdate({name: update}, None, None, {}, "hash"), u, model


@pytest.mark.parametrize("name", [O_PROJ, UP, DOWN])
def test_a_planted_intruder_is_found(name: str) -> None:
    run, u, model = _planted(name, 3.0)
    found = Intruder(side="both")([run], open_base(model))
    columns = found.basis.tensor(name, "write")
    assert columns.shape[1] == 1
    assert abs(columns[:, 0].double() @ u) > 0.95
    assert found.basis.tensor(name, "read").shape[1] == 1
    assert found.evidence["weights"][name]["intruders"] == [0]
    assert found.confidence > 0.9


def test_what_the_base_weight_has_is_no_intruder() -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160).double()
    left, _, right = torch.linalg.svd(model.get_parameter(O_PROJ).detach())
    run, _, model = _planted(O_PROJ, 3.0, along=left[:, 5])
    update = run.weights[O_PROJ]
    run.weights[O_PROJ] = LowRankUpdate(right[5:6], update.B, 1.0, False)
    found = Intruder(steps=96)([run], open_base(model))
    assert found.basis is None
    assert found.confidence == 0.0
    weak, _, model = _planted(O_PROJ, 1e-3)
    assert Intruder(steps=96)([weak], open_base(model)).basis is None


def test_the_count_is_that_of_the_papers_algorithm() -> None:
    """Where the Lanczos steps exhaust the weight, dense SVDs must call the same directions intruders."""
    torch.manual_seed(5)
    model = tiny_model("llama", hidden_size=48, intermediate_size=64).double()
    update = LowRankUpdate(torch.randn(4, 48), 0.35 * torch.randn(48, 4), 1.0, False)
    run = AdapterUpdate({O_PROJ: update}, None, None, {}, "hash")
    found = Intruder(top=10, rank=10, steps=48, oversampling=38)([run], open_base(model))
    weight = model.get_parameter(O_PROJ).detach()
    before = torch.linalg.svd(weight)[0]
    after = torch.linalg.svd(weight + update.B.double() @ update.A.double())[0]
    expected = ((before.mT @ after[:, :10]).abs().amax(dim=0) < 0.5).nonzero().flatten().tolist()
    assert expected
    assert found.evidence["weights"][O_PROJ]["intruders"] == expected


def test_a_base_of_another_shape() -> None:
    run, _, _ = _planted(O_PROJ, 1.0)
    with pytest.raises(InputError, match=r"\(24, 24\) in the base model and \(96, 96\) in the adapter"):
        Intruder()([run], open_base(tiny_model("llama")))
    with pytest.raises(InputError, match="has no weight"):
        Intruder()([run], open_base(tiny_model("gpt2")))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_base_alignment_from_a_directory(tmp_path: Path, architecture: str) -> None:
    """1 on average over a whole orthonormal basis; the leading singular vectors have more, the last less."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    name = O_PROJ if architecture == "llama" else "transformer.h.0.attn.c_attn.weight"
    stored = model.get_parameter(name).detach().double()
    weight = stored if architecture == "llama" else stored.mT
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    shape = tuple(weight.shape)
    basis = SpuriousBasis.from_tensors({f"{name}.write": left, f"{name}.read": right.mT}, shapes={name: shape})
    found = base_alignment(basis, open_base(tmp_path))
    energy = values.square() / values.square().sum()
    assert found[f"{name}.write"].allclose(shape[0] * energy, atol=1e-5)
    assert found[f"{name}.read"].allclose(shape[1] * energy, atol=1e-5)


def test_base_alignment_of_another_model() -> None:
    basis = SpuriousBasis.from_tensors({f"{O_PROJ}.write": torch.eye(20, 2)})
    with pytest.raises(InputError, match="different models"):
        base_alignment(basis, open_base(tiny_model("llama")))
