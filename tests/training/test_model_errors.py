"""Model directories and adapters that cannot be used: each is refused with what is wrong and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.model import load_adapter, load_model, load_tokenizer, meta_model, save_adapter, save_model
from grasp_dist.training.parallel import init_parallel
from tests.training.training_cases import reference, save_tiny

LORA = TrainingConfig(lora=LoraConfig(rank=4, alpha=8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    reference(tiny).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def _load(path: Path, training: TrainingConfig | None = None):
    parallel = init_parallel(ParallelConfig())
    return load_model(ModelConfig(path=str(path)), parallel, precision="fp32", training=training, seed=0), parallel


def test_paths(tmp_path, tiny):
    with pytest.raises(InputError, match="no directory"):
        _load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        _load(tmp_path)
    with pytest.raises(InputError, match="could not be fetched from the hub"):
        meta_model(ModelConfig(path="nobody/no-such-model"))
    with pytest.raises(InputError, match=r"set model\.tokenizer"):
        load_tokenizer(ModelConfig(path=str(tiny)))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(InputError, match="cannot be loaded as a causal"):
        meta_model(ModelConfig(path=str(tmp_path)))


def test_only_safetensors(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only \*\.bin files.*save_pretrained"):
        _load(copy)


def test_a_file_that_was_cut_short(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is not a readable"):
        _load(copy)


def test_a_file_of_the_index_is_missing(tiny, tmp_path):
    reference(tiny).save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(InputError, match="lacks model-00001"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intermediate_size", 41, "'model.layers.0.mlp.*has shape"),
        ("num_hidden_layers", 3, "has no weight 'model.layers.2"),
    ],
)
def test_weights_of_another_config(copy, key, value, message):
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(InputError, match=message):
        _load(copy)


def test_adapters_of_another_kind(tmp_path, tiny):
    model, parallel = _load(tiny, LORA)
    save_adapter(model, tmp_path / "adapter", parallel)
    larger, _ = _load(tiny, TrainingConfig(lora=LoraConfig(rank=8, alpha=8)))
    with pytest.raises(InputError, match=r"has r 4.*set training\.lora"):
        load_adapter(larger, tmp_path / "adapter", parallel)
    elsewhere, _ = _load(tiny, LORA.model_copy(update={"modules": ["o_proj"]}))
    with pytest.raises(InputError, match=r"also holds.*down_proj"):
        load_adapter(elsewhere, tmp_path / "adapter", parallel)
    with pytest.raises(InputError, match="no PEFT adapter"):
        load_adapter(model, tmp_path, parallel)


def test_unknown_modules_and_a_lora_model_saved_whole(tmp_path, tiny):
    with pytest.raises(InputError, match="dwn_proj"):
        _load(tiny, LORA.model_copy(update={"modules": ["dwn_proj"]}))
    model, parallel = _load(tiny, LORA)
    with pytest.raises(InputError, match="save_adapter"):
        save_model(model, None, tmp_path / "out", parallel)
    assert not (tmp_path / "out").exists()
