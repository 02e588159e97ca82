"""Checkpoints of sharded runs: at another world size, of odd and empty shards, and refused when they are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_dist.architecture import canonical_name
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from grasp_dist.training.checkpoints import load_checkpoint, save_checkpoint
from grasp_dist.training.loop import train
from grasp_dist.training.model import load_model
from grasp_dist.training.optimizer import build_optimizer
from grasp_dist.training.parallel import init_parallel
from grasp_dist.training.sharding import whole_tensor
from tests.distributed import run_distributed
from tests.training.training_cases import random_examples, save_tiny

LORA = TrainingConfig(lora=LoraConfig(rank=2, alpha=4), steps=3, batch_size=4)
"""Rank 2 on 3 processes leaves one without a row of A."""
FULL = TrainingConfig(method="full", modules=["down_proj"], steps=3, batch_size=4)


def _build(path: Path, training: TrainingConfig):
    parallel = init_parallel(ParallelConfig())
    model = load_model(ModelConfig(path=str(path)), parallel, precision="fp32", training=training, seed=0)
    generator = torch.Generator().manual_seed(0)
    weight = "model.layers.0.mlp.down_proj.weight"
    sides = {"write": 24, "read": 40}
    basis = {
        f"{weight}.{side}": torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0] for side, dim in sides.items()
    }
    return model, parallel, GraspProjector(model, SpuriousBasis.from_tensors(basis))


def _state(model, optimizer, projector) -> dict[str, torch.Tensor]:
    state = {f"pins.{name}": whole_tensor(value).clone() for name, value in projector.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = canonical_name(name)
            state[name] = whole_tensor(parameter).clone()
            state |= {f"{key}.{name}": whole_tensor(value).clone() for key, value in optimizer.state[parameter].items()}
    return state


def _save(path: Path, out: Path) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, training in (("lora", LORA), ("full", FULL)):
        model, parallel, projector = _build(path, training)
        held: list[Any] = []
        train(
            model, random_examples(9), training, parallel, seed=0, projector=projector,
            on_step=lambda step, state, held=held: held.append(state.optimizer),
        )  # fmt: skip
        save_checkpoint(out / name, model, held[0], projector, {"step": 3, "note": "as given"}, parallel)
        states.append(_state(model, held[0], projector))
    return states


def _restore(path: Path, out: Path) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, training in (("lora", LORA), ("full", FULL)):
        model, parallel, projector = _build(path, training)
        optimizer = build_optimizer(model, training)
        assert load_checkpoint(out / name, model, optimizer, projector, parallel) == {"step": 3, "note": "as given"}
        states.append(_state(model, optimizer, projector))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path, list[dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("checkpoints")
    path = save_tiny(root / "model")
    return path, root / "out", run_distributed(_save, 3, path, root / "out")[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_restores_everything_at_another_world_size(saved, world_size):
    path, out, expected = saved
    found = _restore(path, out) if world_size == 1 else run_distributed(_restore, world_size, path, out)[1]
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        assert any(name.startswith("pins.") for name in before)
        assert {"exp_avg", "exp_avg_sq", "step"} <= {name.partition(".")[0] for name in before}
        for name, value in before.items():
            assert torch.equal(after[name].view(-1), value.view(-1)), name
            assert name.startswith("pins.") or value.any()


def test_what_is_on_disk(saved):
    _, out, _ = saved
    record = json.loads((out / "lora" / "checkpoint.json").read_text())
    assert record["world_size"] == 3
    assert {path.name for path in (out / "lora").iterdir()} == {"checkpoint.json", *record["files"]}
    assert all(name.endswith(".safetensors") for name in record["files"])


@pytest.mark.parametrize("damage", ["no marker", "other bytes", "a file less", "other format"])
def test_a_checkpoint_that_is_not_whole_is_refused(saved, tmp_path, damage):
    import shutil

    path, out, _ = saved
    shutil.copytree(out / "lora", tmp_path / "state")
    file, marker = sorted((tmp_path / "state").glob("*.safetensors"))[0], tmp_path / "state" / "checkpoint.json"
    if damage == "no marker":
        marker.unlink()
    elif damage == "other bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "a file less":
        file.unlink()
    else:
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    model, parallel, projector = _build(path, LORA)
    optimizer = build_optimizer(model, LORA)
    before = _state_of_weights(model)
    with pytest.raises(InputError, match="remove the folder"):
        load_checkpoint(tmp_path / "state", model, optimizer, projector, parallel)
    assert all(torch.equal(a, b) for a, b in zip(before, _state_of_weights(model), strict=True))


def _state_of_weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def test_a_checkpoint_of_another_run_is_refused(saved):
    path, out, _ = saved
    other = LORA.model_copy(update={"lora": LoraConfig(rank=3, alpha=4)})
    model, parallel, projector = _build(path, other)
    with pytest.raises(InputError, match=r"lora_A.*continue with the model, modules, rank and basis"):
        load_checkpoint(out / "lora", model, build_optimizer(model, other), projector, parallel)


def test_a_finished_checkpoint_is_never_written_over(saved, tmp_path):
    path, _, _ = saved
    model, parallel, projector = _build(path, LORA)
    optimizer = build_optimizer(model, LORA)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shard-of-an-interrupted-attempt.safetensors").write_bytes(b"cut")
    save_checkpoint(tmp_path / "state", model, optimizer, projector, {}, parallel)
    with pytest.raises(InputError, match="finished checkpoint already"):
        save_checkpoint(tmp_path / "state", model, optimizer, projector, {}, parallel)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "state", model, optimizer, projector, {}, parallel)
