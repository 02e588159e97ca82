"""Sharded loading and saving, held against transformers' and PEFT's own; each world size is one group of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from grasp_dist.architecture import canonical_name
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training import weights
from grasp_dist.training.model import (
    load_adapter,
    load_model,
    load_tokenizer,
    load_weights,
    reset_adapter,
    save_adapter,
    save_model,
)
from grasp_dist.training.parallel import init_parallel
from grasp_dist.training.sharding import whole_tensor
from tests.distributed import run_distributed
from tests.training.training_cases import random_examples, reference, save_mixtral, save_tiny, word_tokenizer

WORLDS = (1, 2, 3)
TOKENS = torch.tensor([example.input_ids[:4] for example in random_examples(3)])
LORA = TrainingConfig(lora=LoraConfig(rank=4, alpha=8))
FULL = TrainingConfig(method="full", modules="write")
ODD = {"hidden_size": 28, "intermediate_size": 41, "num_attention_heads": 2}
"""Sizes that 3 does not divide."""
SAVED = ("qwen2", "gpt_neox", "mixtral")
PRECISIONS = (("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    paths = {"llama": save_tiny(root / "llama", "llama", **ODD), "mixtral": save_mixtral(root / "mixtral")}
    for name in ("gemma", "gpt2", "gpt_neox", "phi3"):
        paths[name] = save_tiny(root / name, name)
    paths["qwen2"] = save_tiny(root / "qwen2", "qwen2", tie_word_embeddings=True)
    paths["many files"] = root / "many"
    reference(paths["llama"]).save_pretrained(root / "many", max_shard_size="10KB")
    paths["no prefix"] = root / "bare"
    reference(paths["gpt2"]).transformer.save_pretrained(root / "bare")
    return paths


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What every rank saw, by world size."""
    out = tmp_path_factory.mktemp("out")
    (out / "file").write_text("")
    runs = {size: run_distributed(_scenario, size, models, out / str(size)) for size in WORLDS if size > 1}
    return {1: [_scenario(models, out / "1")], **runs}


def _scenario(models: dict[str, Path], out: Path) -> dict[str, Any]:
    return {
        "out": out,
        "loaded": {name: _loaded(path) for name, path in models.items()},
        "read": _elements_read(models["llama"]),
        "adapters": {name: _adapter_life(models[name], out / name) for name in ("llama", "gpt2")},
        "saved": {name: _save_full(models[name], out / f"{name}-full") for name in SAVED},
        "gradients": {setting: _gradients(models["llama"], *setting) for setting in PRECISIONS},
        "refusal": _refusal(models["llama"], out.parent / "file" / "adapter"),
    }


def _load(path: Path, *, training: TrainingConfig | None = None, precision: str = "fp32", seed: int = 0):
    parallel = init_parallel(ParallelConfig())
    model = load_model(ModelConfig(path=str(path)), parallel, precision=precision, training=training, seed=seed)
    assert parallel.world_size == 1 or all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, parallel


def _whole(model, *, trainable: bool = False) -> dict[str, torch.Tensor]:
    return {
        canonical_name(name): whole_tensor(parameter).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable
    }


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _loaded(path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model, _ = _load(path)
    return _whole(model), _logits(model)


@pytest.mark.parametrize("world_size", WORLDS)
def test_loads_the_same_weights_as_from_pretrained(runs, models, world_size):
    """Bit for bit; tied and transposed weights, other names, a missing prefix, many files, experts that are fused."""
    for name, path in models.items():
        expected = reference(path)
        parameters, logits = runs[world_size][-1]["loaded"][name]
        assert parameters.keys() == {key for key, _ in expected.named_parameters()}
        different = [key for key, value in expected.named_parameters() if not torch.equal(parameters[key], value)]
        assert not different, name
        torch.testing.assert_close(logits, _logits(expected), rtol=0, atol=1e-5, msg=name)


def _elements_read(path: Path) -> tuple[int, int]:
    counts = []
    read = weights._Source.read

    def counting(self, name, slices):
        counts.append(read(self, name, slices).numel())
        return read(self, name, slices)

    with mock.patch.object(weights._Source, "read", counting):
        model, _ = _load(path)
    return sum(counts), sum(parameter.numel() for parameter in model.parameters())


def test_a_rank_reads_its_own_part_only(runs):
    for world_size in WORLDS:
        counts = [run["read"] for run in runs[world_size]]
        total = counts[0][1]
        assert sum(read for read, _ in counts) == total
        assert max(read for read, _ in counts) < 1.1 * total / world_size


def _adapter_life(path: Path, out: Path) -> dict[str, Any]:
    model, parallel = _load(path, training=LORA, seed=3)
    start = _whole(model, trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            _fill(parameter, torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))
    trained, logits = _whole(model, trainable=True), _logits(model)
    save_adapter(model, out, parallel)
    reset_adapter(model, 4, parallel)
    reset = _whole(model, trainable=True)
    load_adapter(model, out, parallel)
    return {
        "start": start,
        "trained": trained,
        "reset": reset,
        "loaded": _whole(model, trainable=True),
        "logits": logits,
    }


def _fill(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.data.copy_(values)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_start_alike_at_every_world_size(runs, name):
    first = runs[1][0]["adapters"][name]["start"]
    assert len(first) == 2 * 2 * 2
    for world_size in WORLDS:
        found = runs[world_size][0]["adapters"][name]
        for key, value in first.items():
            assert torch.equal(found["start"][key], value)
            assert value.any() == ("lora_A" in key)
            assert torch.equal(found["reset"][key], value) == ("lora_B" in key), "another seed, another A"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_come_back_and_plain_peft_reads_them(runs, models, name):
    from peft import PeftModel

    for world_size in WORLDS:
        found = runs[world_size][0]["adapters"][name]
        for key, value in found["trained"].items():
            assert torch.equal(found["loaded"][key], value)
        folder = runs[world_size][0]["out"] / name
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(models[name])
        logits = _logits(PeftModel.from_pretrained(reference(models[name]), folder).eval())
        torch.testing.assert_close(logits, found["logits"], rtol=0, atol=1e-5)
        assert not torch.allclose(logits, _logits(reference(models[name])), atol=1e-3), "the adapter does something"


def _save_full(path: Path, out: Path) -> dict[str, Any]:
    model, parallel = _load(path, training=FULL)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    trained = sorted(_whole(model, trainable=True))
    save_model(model, word_tokenizer(), out, parallel)
    with mock.patch.object(weights, "_FILE_BYTES", 4000):  # over an existing folder, in many files
        save_model(model, word_tokenizer(), out, parallel)
    load_weights(model, path, parallel)
    return {"trained": trained, "restored": _whole(model)}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_is_read_by_transformers(runs, models, name):
    """Under the names, and with the experts apart, as transformers saves them; `load_weights` undoes the training."""
    old = reference(models[name]).state_dict()
    for world_size in WORLDS:
        run = runs[world_size][-1]
        folder, trained = run["out"] / f"{name}-full", run["saved"][name]["trained"]
        assert 2 <= len(trained) < len(old) / 2
        new = reference(folder).state_dict()
        for key, value in old.items():
            assert torch.equal(new[key], value * (2 if key in trained else 1)), key
        assert all(torch.equal(value, old[key]) for key, value in run["saved"][name]["restored"].items())
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert _names(folder) == _names(models[name])
        assert load_tokenizer(ModelConfig(path=str(folder))).eos_token == "</s>"


def _names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def _gradients(path: Path, precision: str, checkpointing: bool) -> dict[str, Any]:
    training = LORA.model_copy(update={"activation_checkpointing": checkpointing})
    model, _ = _load(path, training=training, precision=precision)
    model(input_ids=TOKENS).logits.float().square().mean().backward()
    trained = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "base": {p.dtype for p in model.parameters() if not p.requires_grad},
        "adapter": {p.dtype for p in trained.values()},
        "gradients": {name: whole_tensor(p.grad) for name, p in trained.items()},
    }


def test_precision_and_activation_checkpointing(runs):
    exact = runs[1][0]["gradients"]["fp32", False]["gradients"]
    for world_size in WORLDS:
        for (precision, checkpointing), found in runs[world_size][0]["gradients"].items():
            assert found["base"] == {torch.bfloat16 if precision == "bf16" else torch.float32}
            assert found["adapter"] == {torch.float32}
            assert found["gradients"].keys() == exact.keys()
            for name, gradient in exact.items():
                gap = (found["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
                assert gap < (1e-5 if precision == "fp32" else 0.05), (world_size, name, precision, checkpointing)


def _refusal(path: Path, out: Path) -> str:
    model, parallel = _load(path, training=LORA)
    with pytest.raises(InputError) as caught:
        save_adapter(model, out, parallel)
    return str(caught.value)


def test_a_failed_write_is_seen_by_every_rank(runs):
    for world_size in WORLDS:
        messages = {run["refusal"] for run in runs[world_size]}
        assert len(messages) == 1
        assert "cannot write" in messages.pop()
