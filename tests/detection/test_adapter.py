"""Adapters that PEFT itself wrote: what is read is what PEFT merges, and what is no plain LoRA is refused by name."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import edit_config, edit_tensors, make_adapter, merged_change
from tiny_models import tiny_model

from grasp_dist.detection.adapter import pattern_value, read_adapter
from grasp_dist.errors import InputError

O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 9}),
        ("llama", {"init_lora_weights": "gaussian", "target_modules": "all-linear"}),
        ("llama", {"init_lora_weights": False}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        (
            "llama",
            {
                "rank_pattern": {"layers.0.self_attn.o_proj": 7, r".*\.1\.mlp\.down_proj": 2, "proj": 5},
                "alpha_pattern": {"down_proj": 30, "model.layers.1.self_attn.o_proj": 1, "o_proj": 11},
            },
        ),
        ("llama", {"rank_pattern": {"o_proj": 6}, "alpha_pattern": {"mlp.down_proj": 3}, "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_proj"]}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj"]}),
        ("gemma", {"layers_to_transform": [1]}),
        ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
def test_the_update_is_what_peft_merges(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    model = make_adapter(tmp_path, architecture, **config)
    expected = merged_change(model)
    adapter = read_adapter(tmp_path)
    assert set(adapter.weights) == set(expected)
    for name, update in adapter.weights.items():
        dense = update.scale * update.B.double() @ update.A.double()
        transposed = architecture == "gpt2"
        assert update.fan_in_fan_out == transposed
        assert update.shape == dense.shape
        assert torch.allclose(dense.T if transposed else dense, expected[name], atol=1e-12, rtol=1e-9), name


def test_patterns_match_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    keys = ["o_proj", "layers.0.self_attn.o_proj", r"layers\.\d+\.mlp", "down_proj", r".*\.1\..*", "proj", "^o_proj"]
    modules = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "o_proj", "model.xo_proj", "h.0.mlp"]
    for size in (1, 2, 3):
        for chosen in itertools.permutations(keys, size):
            pattern = {key: index for index, key in enumerate(chosen)}
            for module in modules:
                expected = pattern.get(get_pattern_key(pattern.keys(), module), "default")
                assert pattern_value(pattern, module, "default") == expected


def test_what_the_adapter_says_of_its_base(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="org/base", revision="v2")
    first = read_adapter(tmp_path)
    assert (first.base_model, first.revision) == ("org/base", "v2")
    assert first.hash == read_adapter(tmp_path).hash
    edit_config(tmp_path, lora_alpha=7)
    assert read_adapter(tmp_path).hash != first.hash


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora .*magnitude"),
        ({"lora_bias": True}, "lora_bias .*biases"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .*replaces whole modules"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "o_proj"]}, r"embed_tokens.*LoRA of an embedding"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"r": 4, "zero_b": True}, "learnt nothing"),
    ],
)
def test_adapters_that_are_no_plain_low_rank_update(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    make_adapter(tmp_path, **config)
    with pytest.raises(InputError, match=message) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "method", ["LoHaConfig", "LoKrConfig", "IA3Config", "VeraConfig", "OFTConfig", "AdaLoraConfig"]
)
@pytest.mark.filterwarnings("ignore")
def test_other_methods_are_refused(tmp_path: Path, method: str) -> None:
    import peft

    settings: dict[str, Any] = {"target_modules": ["up_proj"]}
    settings |= {"feedforward_modules": []} if method == "IA3Config" else {}
    settings |= {"total_step": 10} if method == "AdaLoraConfig" else {}
    settings |= {"oft_block_size": 4, "r": 0} if method == "OFTConfig" else {}
    peft.get_peft_model(tiny_model("llama"), getattr(peft, method)(**settings)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is of type '\w+', not LORA"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "some tokens only"),
        ({"peft_type": None}, "type None"),
        ({"r": 5}, "says rank 5"),
        ({"rank_pattern": {"o_proj": 3}}, r"o_proj\.weight.*says rank 3"),
        ({"r": None}, "no 'r'"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    make_adapter(tmp_path)
    edit_config(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{O_PROJ}.lora_A.weight": torch.full((4, 24), float("nan"))},
            r"A of 'model\.layers\.0.*o_proj\.weight' holds NaN",
        ),
        ({f"{O_PROJ}.lora_B.weight": torch.full((24, 4), float("inf"))}, "B of .*holds NaN or infinity.*learning rate"),
        ({f"{O_PROJ}.lora_B.weight": None}, r"no lora_B for 'model\.layers\.0\.self_attn\.o_proj\.weight'"),
        ({f"{O_PROJ}.lora_A.weight": None}, "no lora_A"),
        ({f"{O_PROJ}.lora_A.weight": torch.ones(3, 24)}, r"A \(3, 24\) and B \(24, 4\)"),
        ({f"{O_PROJ}.lora_A.weight": torch.ones(4, 24, 1, 1)}, "no linear one"),
        ({f"{O_PROJ}.lora_magnitude_vector": torch.ones(24)}, "lora_magnitude_vector"),
        ({f"{O_PROJ}.lora_B.bias": torch.ones(24)}, r"lora_B\.bias"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 3)}, r"lm_head\.weight"),
    ],
)
def test_damaged_content_is_refused_by_name(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    make_adapter(tmp_path)
    edit_tensors(tmp_path, **tensors)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_directories_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PEFT adapter"):
        read_adapter(tmp_path / "nowhere")
    make_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_adapter(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"is a pickle.*safe_serialization=True"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_adapter(tmp_path)


def test_an_empty_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path, target_modules=["layers.0.self_attn.o_proj"])
    edit_tensors(tmp_path, **{f"{O_PROJ}.lora_{letter}.weight": None for letter in "AB"})
    with pytest.raises(InputError, match="holds no LoRA factors"):
        read_adapter(tmp_path)
