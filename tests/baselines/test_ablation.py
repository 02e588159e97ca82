"""Inference-time ablation against models whose weights are projected instead."""

import pytest
import torch

from grasp_dist.baselines.ablation import ablate
from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from tests.evaluation.evaluation_cases import WEIGHTS, make_basis, tuned_model
from tests.tiny_models import tiny_model

IDS = torch.tensor([[5, 9, 33, 2, 17]])


@torch.no_grad()
def _logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def _projected_by_hand(basis, side, rank):
    """The tuned model with W + s B A merged and (I - U U^T) W (I - V V^T) in its place."""
    model = tuned_model().merge_and_unload().eval()
    for weight in WEIGHTS:
        parameter = model.get_parameter(weight)
        if side in ("write", "both"):
            u = basis.tensor(weight, "write")[:, :rank]
            parameter.copy_(parameter - u @ (u.T @ parameter))
        if side in ("read", "both"):
            v = basis.tensor(weight, "read")[:, :rank]
            parameter.copy_(parameter - (parameter @ v) @ v.T)
    return _logits(model)


@pytest.mark.parametrize("side", ["write", "read", "both"])
@pytest.mark.parametrize("rank", [None, 2])
def test_ablating_activations_is_projecting_the_bias_free_weights(side, rank):
    model, basis = tuned_model().eval(), make_basis()
    before = _logits(model)
    with ablate(model, basis, side=side, rank=rank):
        inside = _logits(model)
    torch.testing.assert_close(inside, _projected_by_hand(basis, side, rank or 3), rtol=1e-4, atol=1e-5)
    assert (inside - before).abs().max() > 0.01
    assert torch.equal(_logits(model), before)


def test_default_is_every_side_and_direction():
    model, basis = tuned_model().eval(), make_basis()
    with ablate(model, basis):
        inside = _logits(model)
    torch.testing.assert_close(inside, _projected_by_hand(basis, "both", 3), rtol=1e-4, atol=1e-5)


def test_gpt2_whose_weights_are_stored_transposed_and_have_a_bias():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias.normal_()
    weight = "transformer.h.1.mlp.c_proj.weight"
    u = torch.linalg.qr(torch.randn(24, 2, generator=torch.Generator().manual_seed(0)))[0]
    with ablate(model, SpuriousBasis.from_tensors({f"{weight}.write": u})):
        inside = _logits(model)
    with torch.no_grad():
        module = model.transformer.h[1].mlp.c_proj
        module.weight.copy_(module.weight - (module.weight @ u) @ u.T)
        module.bias.copy_(module.bias - u @ (u.T @ module.bias))
    torch.testing.assert_close(inside, _logits(model), rtol=1e-4, atol=1e-5)


def test_activations_keep_their_dtype():
    model = tiny_model("llama").bfloat16()
    with ablate(model, make_basis()):
        assert _logits(model).dtype == torch.bfloat16


def test_hooks_are_gone_after_an_error():
    model = tuned_model()
    with pytest.raises(RuntimeError, match="inside"), ablate(model, make_basis()):
        raise RuntimeError("inside")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("model.layers.1.mlp.down_porj.weight.write", 24, r"down_porj.*nearest is model\.layers\.1\.mlp\.down_proj"),
        ("model.layers.1.mlp.down_proj.weight.read", 24, r"down_proj\.weight.*40"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused_by_name(name, rows, words):
    basis = SpuriousBasis.from_tensors({name: torch.eye(rows)[:, :2]})
    with pytest.raises(InputError, match=words), ablate(tuned_model(), basis):
        pass
