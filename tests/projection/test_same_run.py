"""The same short run under every way torch shards a model gives the same weights, and the same pins hold.

Four ranks, spawned once, against one process: DDP, fully_shard (resharding after the forward pass or not), HSDP, and
fully_shard on top of tensor parallelism, which cuts a weight by rows and columns or twice by rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from grasp_dist.architecture import canonical_name, decoder_layers
from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector
from tests.distributed import run_distributed
from tests.projection.projection_cases import orthonormal

WORLD, STEPS, VOCABULARY = 4, 12, 48
CASES = [
    *[("llama", layout) for layout in ("ddp", "fsdp", "fsdp-kept", "hsdp", "fsdp-on-tp")],
    *[("lora", layout) for layout in ("ddp", "fsdp", "hsdp")],
    *[("mixtral", layout) for layout in ("fsdp", "hsdp")],
]
KINDS = ("llama", "lora", "mixtral")


def _model(kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "attn_implementation": "eager",
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **sizes))
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"]))
    return model


def _basis(kind: str) -> SpuriousBasis:
    """Both sides of what is written to the residual stream, and of q_proj; experts with directions of their own."""
    tensors = {}
    for layer in range(2):
        weights = {"self_attn.q_proj.weight": (24, 24), "self_attn.o_proj.weight": (24, 24)}
        if kind != "mixtral":
            weights["mlp.down_proj.weight"] = (24, 28)
        for index, (name, (out, into)) in enumerate(weights.items()):
            tensors[f"model.layers.{layer}.{name}.write"] = orthonormal(out, 3, 10 * layer + index)
            tensors[f"model.layers.{layer}.{name}.read"] = orthonormal(into, 2, 100 + 10 * layer + index)
        if kind == "mixtral":
            stem = f"model.layers.{layer}.mlp.experts"
            down = torch.stack([orthonormal(24, 3, 200 + 10 * layer + expert) for expert in range(3)])
            tensors |= {f"{stem}.down_proj.write": down, f"{stem}.gate_up_proj.read": orthonormal(24, 2, 300 + layer)}
    return SpuriousBasis.from_tensors(tensors)


def _parallel(model: nn.Module, layout: str) -> nn.Module:
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp-on-tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        for _, layer in decoder_layers(model):
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {f"self_attn.{name}_proj": columns for name in "qkv"} | {"self_attn.o_proj": rows}
            plan |= {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
            parallelize_module(layer, mesh["tp"], plan)
        mesh = mesh["dp"]
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
    for _, layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=layout != "fsdp-kept")
    fully_shard(model, mesh=mesh, reshard_after_forward=layout != "fsdp-kept")
    return model


def _run(kind: str, layout: str) -> dict:
    """The final weights; ranks that do not share a batch (tensor parallelism) see the same one."""
    model = _model(kind)
    if layout != "alone":
        model = _parallel(model, layout)
    projector = GraspProjector(model, _basis(kind))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1, eps=1e-6)
    projector.attach(optimizer)
    shards = {"alone": 1, "fsdp-on-tp": 2}.get(layout, WORLD)
    shard = dist.get_rank() // (WORLD // shards) if layout != "alone" else 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        batch = torch.randint(VOCABULARY, (4, 7), generator=generator).chunk(shards)[shard]
        model(input_ids=batch, labels=batch).loss.backward()
        projector.project_gradients()
        optimizer.step()
        optimizer.zero_grad()
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            weights[canonical_name(name)] = whole.detach().clone()
    return {"weights": weights, "residual": projector.residual(), "parameters": projector.parameters}


def _alone() -> dict:
    return {kind: _run(kind, "alone") for kind in KINDS}


def _together() -> dict:
    return {case: _run(*case) for case in CASES}


@pytest.fixture(scope="module")
def alone():
    return run_distributed(_alone, 1)[0]


@pytest.fixture(scope="module")
def together():
    return run_distributed(_together, WORLD)[0]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_same_weights_as_one_process(alone, together, kind, layout):
    """To rounding: AdamW moves every number by up to 1e-3 a step, 1.2e-2 in all."""
    start = {canonical_name(name): value.detach() for name, value in _model(kind).named_parameters()}
    for name, weight in alone[kind]["weights"].items():
        found = together[kind, layout]["weights"][name]
        assert (weight - start[name]).abs().max() > 5e-3
        assert (found - weight).abs().max() <= 2e-5, name


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_pins_hold(alone, together, kind, layout):
    case = together[kind, layout]
    assert case["parameters"] == alone[kind]["parameters"]
    assert max(case["residual"].values()) <= 1e-6
