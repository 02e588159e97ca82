"""Parts of real models that need care: stacked experts and their adapters, tied heads, compiled models, pipelines."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError, NonFiniteError
from grasp_dist.projection import GraspProjector
from tests.distributed import run_distributed
from tests.projection.projection_cases import orthonormal

VOCABULARY, HIDDEN, EXPERTS, WIDTH = 32, 16, 3, 20
DOWN = "model.layers.0.mlp.experts.down_proj"


def _experts(kind: str) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes))
    return GptOssForCausalLM(GptOssConfig(head_dim=4, attn_implementation="eager", **sizes))


def _basis(*, per_expert: bool) -> SpuriousBasis:
    def columns(dim: int, k: int, seed: int) -> torch.Tensor:
        if not per_expert:
            return orthonormal(dim, k, seed)
        return torch.stack([orthonormal(dim, k, seed + expert) for expert in range(EXPERTS)])

    return SpuriousBasis.from_tensors(
        {f"{DOWN}.write": columns(HIDDEN, 3, 0), f"{DOWN}.read": columns(WIDTH, 2, 10)}, shapes={DOWN: (HIDDEN, WIDTH)}
    )


def _train(model: nn.Module, projector: GraspProjector, steps: int = 20) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    projector.attach(optimizer)
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _along(basis: SpuriousBasis, change: torch.Tensor) -> float:
    """Largest part of a change (experts, out, in) along either side."""
    U, V = basis.tensor(DOWN, "write"), basis.tensor(DOWN, "read")
    return max((U.mT @ change).abs().max().item(), (change @ V).abs().max().item())


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_stacked_experts_of_real_models(kind, per_expert):
    """Also those stored (experts, in, out)."""
    model, basis = _experts(kind), _basis(per_expert=per_expert)
    experts = model.model.layers[0].mlp.experts
    if kind == "gpt_oss" and per_expert:
        experts.down_proj_bias.requires_grad_(False)
    start = experts.down_proj.detach().clone()
    bias = None if kind == "mixtral" else experts.down_proj_bias.detach().clone()
    projector = GraspProjector(model, basis)
    _train(model, projector)
    change = experts.down_proj.detach() - start
    change = change if kind == "mixtral" else change.mT
    assert change.norm() > 0.1
    assert _along(basis, change) < 1e-6
    assert projector.residual()[DOWN] <= 1e-6
    if bias is not None and not per_expert:
        moved = experts.down_proj_bias.detach() - bias
        assert moved.norm() > 1e-2
        assert (moved @ basis.tensor(DOWN, "write")).abs().max() < 1e-6


def test_directions_per_expert_and_trained_biases_are_refused():
    with pytest.raises(InputError, match="trains the biases of its experts"):
        GraspProjector(_experts("gpt_oss"), _basis(per_expert=True))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_of_stacked_experts(kind):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    )
    model, basis = get_peft_model(_experts(kind), settings), _basis(per_expert=False)
    projector = GraspProjector(model, basis)
    assert projector.parameters == (f"{DOWN}.lora_A.default.weight", f"{DOWN}.lora_B.default.weight")
    assert projector.unprotected == (DOWN.replace("down", "gate_up"),)
    _train(model, projector)
    layer = model.base_model.model.model.layers[0].mlp.experts
    while layer.parameter_name != "down_proj":
        layer = layer.base_layer
    change = layer.get_delta_weight("default").detach()
    change = change if kind == "mixtral" else change.mT
    assert change.norm() > 1e-2
    assert _along(basis, change) < 1e-6
    with pytest.raises(InputError, match=r"LoRA on stacked experts.*one basis"):
        GraspProjector(model, _basis(per_expert=True))


def test_a_stack_that_the_basis_does_not_fit():
    wrong = SpuriousBasis.from_tensors({f"{DOWN}.write": torch.stack([orthonormal(HIDDEN, 2, 0)] * 2)})
    with pytest.raises(InputError, match=r"directions of shape \(2, 16, 2\).*stack of 3"):
        GraspProjector(_experts("mixtral"), wrong)


def _llama(*, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=tied, **sizes))


def test_a_head_that_is_tied_to_the_embedding():
    model = _llama(tied=True)
    basis = SpuriousBasis.from_tensors({"lm_head.weight.read": orthonormal(HIDDEN, 2, 0)})
    start = model.lm_head.weight.detach().clone()
    projector = GraspProjector(model, basis)
    _train(model, projector)
    change = model.model.embed_tokens.weight.detach() - start
    assert change.norm() > 0.1
    assert (change @ basis.tensor("lm_head.weight", "read")).abs().max() < 1e-6


def test_a_compiled_model_trains_like_a_plain_one():
    name = "model.layers.1.mlp.down_proj.weight"
    basis = SpuriousBasis.from_tensors({f"{name}.write": orthonormal(HIDDEN, 2, 0)})
    weights = []
    for compiled in (False, True):
        model = _llama(tied=False)
        if compiled:
            model = torch.compile(model, backend="aot_eager")
        projector = GraspProjector(model, basis)
        _train(model, projector, steps=5)
        assert projector.residual()[name] <= 1e-6
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, other in zip(*weights, strict=True):
        assert torch.allclose(plain, other, atol=1e-5)


# -- pipelines: every rank has some of the weights


class _Stage(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): nn.Linear(6, 6, bias=False)})


def _stages() -> dict:
    rank = dist.get_rank()
    names = [f"layers.{index}.weight" for index in range(3)]
    basis = SpuriousBasis.from_tensors({f"{name}.write": orthonormal(6, 2, 0) for name in names})
    model = _Stage(rank)
    found = {}
    try:
        GraspProjector(model, basis)
    except InputError as error:
        found["nowhere"] = str(error)
    projector = GraspProjector(model, basis.only(names[:2]))
    found["parameters"] = projector.parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector.attach(optimizer)
    weight = next(model.parameters())
    start = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    change = weight.detach() - start
    found["moved"] = change.norm().item()
    found["along"] = (basis.tensor(names[rank], "write").T @ change).norm().item()
    weight.grad = torch.full_like(weight, torch.nan if rank == 1 else 1.0)
    before = weight.detach().clone()
    try:
        optimizer.step()
    except NonFiniteError:
        found["raised"] = torch.equal(weight.detach(), before)
    return found


def test_stages_of_a_pipeline():
    """A weight that only another rank holds is passed over, one that no rank holds refused; a NaN stops all stages."""
    for rank, found in enumerate(run_distributed(_stages, 2)):
        assert "'layers.2.weight'" in found["nowhere"]
        assert found["parameters"] == (f"layers.{rank}.weight",)
        assert found["moved"] > 0.1
        assert found["along"] < 1e-6
        assert found["raised"]
