"""The loop: the same losses however a batch is cut over ranks and micro-batches, and a restart that changes no bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_dist.architecture import canonical_name, linear_modules, logical_shape
from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from grasp_dist.training.batches import collate
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints
from grasp_dist.training.examples import IGNORED, Example
from grasp_dist.training.loop import LoopState, num_steps, token_losses, train
from grasp_dist.training.model import load_model
from grasp_dist.training.packing import check_isolation, pack
from grasp_dist.training.parallel import init_parallel
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.sharding import whole_tensor
from tests.distributed import run_distributed
from tests.training.training_cases import random_examples, save_tiny

STEPS = 12
MODEL = {"hidden_size": 28, "intermediate_size": 41, "num_attention_heads": 2, "attention_bias": True}
COMMON = {
    "steps": STEPS,
    "batch_size": 10,
    "schedule": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lora": LoraConfig(rank=4, alpha=8),
}
SETTINGS = {
    "lora": TrainingConfig(**COMMON, learning_rate=1e-2),
    "lora in micro-batches": TrainingConfig(**COMMON, learning_rate=1e-2, micro_batch_size=2),
    "full": TrainingConfig(**COMMON, method="full", learning_rate=1e-3),
    "full in micro-batches": TrainingConfig(**COMMON, method="full", learning_rate=1e-3, micro_batch_size=3),
    "everything": TrainingConfig(**COMMON, method="full", modules="everything", learning_rate=1e-3),
    "packed": TrainingConfig(**COMMON, learning_rate=1e-2, modules="all"),
}
RUNS = [
    ("lora", False),
    ("full", False),
    ("everything", False),
    *((name, True) for name in SETTINGS if name != "everything"),
]
"""(settings, whether GRASP projects)."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("loop") / "model", **MODEL)


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("runs")
    runs = {size: run_distributed(_scenario, size, model_path, out / str(size)) for size in (2, 3)}
    return {1: [_scenario(model_path, out / "1")], **runs}


def _scenario(path: Path, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"losses": {}, "residual": {}, "tokens": {}}
    for name, grasp in RUNS:
        key = f"{name}, projected" if grasp else name
        results["losses"][key], results["residual"][key], results["tokens"][key] = _train(path, name, grasp)
    results |= _interrupted(path, out)
    results["nan"] = _not_finite(path)
    return results


def _load(path: Path, training: TrainingConfig):
    parallel = init_parallel(ParallelConfig())
    model = load_model(ModelConfig(path=str(path)), parallel, precision="fp32", training=training, seed=0)
    return model, parallel


def _basis(model) -> SpuriousBasis:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in linear_modules(model).items():
        if name.endswith(("o_proj", "down_proj")):
            for side, size in zip(("write", "read"), logical_shape(module), strict=True):
                tensors[f"{name}.weight.{side}"] = torch.linalg.qr(torch.randn(size, 3, generator=generator))[0]
    return SpuriousBasis.from_tensors(tensors)


def _examples(name: str) -> list[Example]:
    examples = random_examples(23)
    return pack(examples, 24) if name == "packed" else examples


def _train(path: Path, name: str, grasp: bool) -> tuple[list[float], float, int]:
    training = SETTINGS[name]
    model, parallel = _load(path, training)
    residuals: list[float] = []

    def on_end(state: LoopState) -> None:
        if state.projector is not None:
            residuals.append(max(state.projector.residual().values()))

    result = train(
        model, _examples(name), training, parallel, seed=7, on_end=on_end,
        protect=lambda where: GraspProjector(where, _basis(where)) if grasp else None,
    )  # fmt: skip
    assert result.final_loss == result.losses[-1]
    return result.losses, residuals[0] if residuals else math.nan, result.tokens


@pytest.mark.parametrize(("name", "projected"), RUNS)
def test_losses_do_not_depend_on_the_world_size(runs, name, projected):
    """10 sequences on 1, 2 and 3 ranks (4, 3 and 3), with clipping, weight decay, warm-up and a schedule."""
    key = f"{name}, projected" if projected else name
    alone = torch.tensor(runs[1][0]["losses"][key], dtype=torch.float64)
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] - 0.05
    for world_size in (2, 3):
        for run in runs[world_size]:
            losses = torch.tensor(run["losses"][key], dtype=torch.float64)
            assert ((losses - alone).abs() / alone).max() < 1e-5, (world_size, losses, alone)
            assert run["tokens"][key] == runs[1][0]["tokens"][key]
    if projected:
        assert max(run["residual"][key] for group in runs.values() for run in group) < 1e-6


def test_losses_do_not_depend_on_the_micro_batches(runs):
    for world_size in (1, 2, 3):
        losses = runs[world_size][0]["losses"]
        for name in ("lora", "full"):
            whole, cut = losses[f"{name}, projected"], losses[f"{name} in micro-batches, projected"]
            torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


def test_the_projector_changes_the_run(runs):
    losses = runs[1][0]["losses"]
    for name in ("lora", "full"):
        assert losses[name][0] == losses[f"{name}, projected"][0]
        assert abs(losses[name][-1] - losses[f"{name}, projected"][-1]) > 1e-4


def _interrupted(path: Path, out: Path) -> dict[str, Any]:
    """A run of 8 steps, and one that is stopped after 6 and continued, from step 5, by another model and optimizer."""
    training = SETTINGS["lora"].model_copy(update={"lora": LoraConfig(rank=4, alpha=8, dropout=0.2)})
    results = {}
    for name, stop in (("whole", None), ("first half", 6), ("second half", None)):
        model, parallel = _load(path, training)
        # The second half starts from other values, so that what is not restored shows.
        if name == "second half":
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" in key:
                    parameter.data.add_(1.0)
        keeper = Keeper(Checkpoints(out / "halves"), parallel, every=5) if name != "whole" else None

        def on_step(step: int, state: LoopState, stop=stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        recorder = Recorder(out / ("whole" if name == "whole" else "halves"), parallel, name)
        try:
            with recorder:
                result = train(
                    model, _examples(""), training, parallel, seed=7, steps=8, recorder=recorder, keeper=keeper,
                    protect=lambda where: GraspProjector(where, _basis(where)), on_step=on_step,
                )  # fmt: skip
        except KeyboardInterrupt:
            continue
        trained = {
            canonical_name(key): whole_tensor(p).clone() for key, p in model.named_parameters() if p.requires_grad
        }
        results[name] = {"losses": result.losses, "weights": trained}
    lines = [json.loads(line) for line in (out / "halves" / "metrics.jsonl").read_text().splitlines()]
    return {"continued": results, "lines": lines}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_continued_run_is_the_same_bit_for_bit(runs, world_size):
    for run in runs[world_size]:
        whole, second = run["continued"]["whole"], run["continued"]["second half"]
        assert second["losses"] == whole["losses"]
        for name, value in whole["weights"].items():
            assert torch.equal(second["weights"][name], value), name
    lines = runs[world_size][0]["lines"]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines] == runs[world_size][0]["continued"]["whole"]["losses"]


def _not_finite(path: Path) -> tuple[str, bool]:
    """One rank's share makes the loss infinite in step 1; every rank sees it, and the weights stay."""
    training = SETTINGS["lora"].model_copy(update={"steps": 3, "batch_size": 4})
    model, parallel = _load(path, training)
    examples = [Example([5, 6], [IGNORED, 6])] * 3 + [Example([7, 8], [IGNORED, 8])]
    embedding = next(p for name, p in model.named_parameters() if "embed_tokens" in name)
    rows = embedding.to_local() if parallel.world_size > 1 else embedding
    share = -(-embedding.shape[0] // parallel.world_size)
    local = 7 - share * parallel.world_rank
    if 0 <= local < len(rows):
        rows.data[local] = math.inf
    before = [whole_tensor(p).clone() for p in model.parameters() if p.requires_grad]
    with pytest.raises(InputError) as caught:
        train(model, examples, training, parallel, seed=0)
    after = [whole_tensor(p) for p in model.parameters() if p.requires_grad]
    return str(caught.value), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_loss_that_is_not_finite_stops_every_rank(runs):
    for group in runs.values():
        for run in group:
            message, unchanged = run["nan"]
            assert "step 1: the loss is nan" in message
            assert unchanged


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "mistral", "gpt2", "gpt_neox", "phi3"])
def test_packed_examples_attend_to_themselves_only(tmp_path, architecture):
    path = save_tiny(tmp_path / "model", architecture)
    parallel = init_parallel(ParallelConfig())
    model = load_model(ModelConfig(path=str(path)), parallel, precision="fp32", training=None, seed=0)
    examples = random_examples(7)
    packed = pack(examples, 24)
    assert 1 < len(packed) < len(examples)
    with torch.no_grad():
        apart = torch.cat([token_losses(model, collate([example])) for example in examples])
        together = token_losses(model, collate(packed))
        padded = token_losses(model, collate(examples))
    torch.testing.assert_close(padded, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.sort().values, apart.sort().values, rtol=1e-5, atol=1e-5)
    check_isolation(model, packed, parallel.device)


@pytest.mark.parametrize("architecture", ["opt", "falcon"])
def test_packing_is_refused_where_parts_would_see_each_other(tmp_path, architecture):
    """These ignore positions that start again; packed examples would have trained on their neighbours unnoticed."""
    path = save_tiny(tmp_path / "model", architecture)
    model, parallel = _load(path, SETTINGS["lora"])
    with pytest.raises(InputError, match="packing: false"):
        train(model, pack(random_examples(7), 24), SETTINGS["lora"], parallel, seed=0)
    train(model, random_examples(7), SETTINGS["lora"].model_copy(update={"steps": 1}), parallel, seed=0)


def test_steps_and_bad_examples(model_path):
    assert num_steps(TrainingConfig(steps=5), 100) == 5
    assert num_steps(TrainingConfig(batch_size=32), 100) == 4
    assert num_steps(TrainingConfig(epochs=2.5, batch_size=10), 100) == 25
    model, parallel = _load(model_path, SETTINGS["lora"])
    with pytest.raises(InputError, match="no training examples"):
        train(model, [], SETTINGS["lora"], parallel, seed=0)
    with pytest.raises(InputError, match="65 tokens, and the model takes 64"):
        train(model, [Example([3] * 65, [3] * 65)], SETTINGS["lora"], parallel, seed=0)


def test_full_training_matches_a_plain_pytorch_loop(model_path):
    """An independent oracle: transformers' own loss, torch's own clipping and AdamW, one example at a time."""
    from transformers import AutoModelForCausalLM

    training = TrainingConfig(method="full", modules="everything", steps=3, batch_size=4, learning_rate=1e-3,
                              max_grad_norm=0.1, weight_decay=0.0)  # fmt: skip
    model, parallel = _load(model_path, training)
    examples = random_examples(4)
    losses = train(model, examples, training, parallel, seed=0).losses
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for expected in losses:
        total = sum(example.num_targets for example in examples)
        parts = [
            plain(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss * e.num_targets / total
            for e in examples
        ]
        loss = torch.stack(parts).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
