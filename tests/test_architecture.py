"""Module resolution on real transformers models, bare, PEFT-wrapped and on the meta device."""

import pytest
import torch
from tiny_models import ARCHITECTURES, WRITERS, tiny_model
from torch import nn

from grasp_dist.architecture import (
    WRITE_MODULES,
    canonical_name,
    decoder_layers,
    is_conv1d,
    linear_modules,
    logical_shape,
    resolve_modules,
)
from grasp_dist.errors import InputError


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_write_modules_are_those_whose_output_has_the_hidden_size(architecture: str) -> None:
    model = tiny_model(architecture)
    found = resolve_modules(model, "write")
    layers = [name for name, _ in decoder_layers(model)]
    assert len(layers) == 2
    assert found == [f"{layer}.{writer}" for layer in layers for writer in WRITERS[architecture]]
    modules = dict(model.named_modules())
    assert all(logical_shape(modules[name])[0] == 24 for name in found)
    everything = resolve_modules(model, "all")
    assert set(found) < set(everything)
    assert all(name.startswith(tuple(layers)) for name in everything)
    assert not any("lm_head" in name or "embed" in name for name in everything)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_write_module_has_a_known_neighbour(architecture: str) -> None:
    model = tiny_model(architecture)
    modules = linear_modules(model)
    for name in resolve_modules(model, "write"):
        parent, _, leaf = name.rpartition(".")
        assert any(f"{parent}.{sibling}" in modules for sibling in WRITE_MODULES[leaf]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_peft_model_and_a_meta_model_resolve_like_the_base_model(architecture: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(architecture)
    expected = {kind: resolve_modules(model, kind) for kind in ("write", "all", "everything")}
    shapes = {name: logical_shape(module) for name, module in linear_modules(model).items()}
    layers = [name for name, _ in decoder_layers(model)]

    with torch.device("meta"):
        bare = type(model)(model.config)
    leaf = WRITERS[architecture][0].rpartition(".")[2]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[leaf], fan_in_fan_out=architecture == "gpt2"))
    for other in (bare, wrapped, nn.ModuleDict({"module": wrapped})):
        assert {kind: resolve_modules(other, kind) for kind in expected} == expected
        assert {name: logical_shape(module) for name, module in linear_modules(other).items()} == shapes
        assert [name for name, _ in decoder_layers(other)] == layers
    assert resolve_modules(wrapped, [leaf]) == [name for name in expected["all"] if name.endswith(f".{leaf}")]


def test_conv1d_shapes_are_logical() -> None:
    modules = linear_modules(tiny_model("gpt2"))
    c_fc = modules["transformer.h.0.mlp.c_fc"]
    assert is_conv1d(c_fc)
    assert not is_conv1d(modules["lm_head"])
    assert logical_shape(c_fc) == (96, 24)
    assert tuple(c_fc.weight.shape) == (24, 96)


def test_lists_of_names() -> None:
    model = tiny_model("llama")
    assert resolve_modules(model, ["o_proj"]) == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert resolve_modules(model, ["layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj.weight"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert resolve_modules(model, ["base_model.model.lm_head"]) == ["lm_head"]
    assert resolve_modules(model, "everything")[-1] == "lm_head"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["o_porj"], "no linear module 'o_porj'; did you mean .*'o_proj'"),
        (["self_attn.o_porj"], "did you mean .*'o_proj'"),
        (["zzz"], "its linear modules are .*down_proj.*lm_head"),
        (["proj"], "no linear module 'proj'"),
        (["embed_tokens"], "'embed_tokens' .*is not linear"),
        ([], "empty"),
        ("writes", "'writes' is not 'write', 'all'"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(modules: str | list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_modules(tiny_model("llama"), modules)


def test_a_model_without_known_writers_or_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"mixer": nn.Linear(3, 3)}) for _ in range(3))
            self.short = nn.ModuleList([nn.Linear(2, 2)])

    assert [name for name, _ in decoder_layers(Odd())] == ["blocks.0", "blocks.1", "blocks.2"]
    assert resolve_modules(Odd(), "all") == [f"blocks.{i}.mixer" for i in range(3)]
    with pytest.raises(InputError, match=r"no known module that writes.*mixer.*training\.modules"):
        resolve_modules(Odd(), "write")
    with pytest.raises(InputError, match="no list of layers"):
        decoder_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight", "model.layers.0.mlp.down_proj.weight"),
        ("module.base_model.model.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("base_model.model.h.0.c.lora_A.default.weight", "h.0.c.lora_A.default.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


def test_canonical_names_of_a_peft_model_are_the_base_models() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen3")
    base = {name for name, _ in model.named_parameters()}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
    names = {canonical_name(name) for name, _ in wrapped.named_parameters()}
    assert {name for name in names if "lora_" not in name} == base


def test_layers_whose_class_fully_shard_replaced_are_still_found() -> None:
    """`fully_shard` gives every sharded module a class derived from its own, with another name."""
    model = tiny_model("llama")
    expected = [name for name, _ in decoder_layers(model)]
    for layer in model.model.layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    model.extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))  # longer than the list of layers
    assert [name for name, _ in decoder_layers(model)] == expected
