"""Checkpoints: the folder's rules, and a run's state at another world size, with odd and empty shards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError, Preempted
from grasp_dist.projection import GraspProjector
from grasp_dist.training import preemption
from grasp_dist.training.checkpoints.pieces import FlatPiece
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints, fingerprint, verify
from grasp_dist.training.engines import build_engine
from grasp_dist.training.loop import train
from grasp_dist.training.model import load_model
from grasp_dist.training.parallel import init_parallel
from grasp_dist.training.sharding import whole_tensor
from tests.distributed import run_distributed
from tests.training.training_cases import random_examples, save_tiny

LORA = TrainingConfig(lora=LoraConfig(rank=2, alpha=4), steps=3, batch_size=4)
"""Rank 2 on 3 processes leaves one without a row of A."""
FULL = TrainingConfig(method="full", modules=["down_proj"], steps=3, batch_size=4)
CASES = {"lora": (LORA, False), "full": (FULL, False), "in the background": (LORA, True)}


def _basis(seed: int = 0) -> SpuriousBasis:
    generator = torch.Generator().manual_seed(seed)
    weight = "model.layers.0.mlp.down_proj.weight"
    sides = {"write": 24, "read": 40}
    return SpuriousBasis.from_tensors(
        {
            f"{weight}.{side}": torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0]
            for side, dim in sides.items()
        }
    )


def _load(path: Path, training: TrainingConfig):
    parallel = init_parallel(ParallelConfig())
    return load_model(ModelConfig(path=str(path)), parallel, precision="fp32", training=training, seed=0), parallel


def _state(engine, projector) -> dict[str, torch.Tensor]:
    """Everything whole, on every rank."""
    state = {f"pins.{name}": whole_tensor(value).clone() for name, value in projector.state_dict().items()}
    for name, piece in engine.pieces().items():
        whole = torch.zeros(piece.shape)
        whole[piece.start : piece.start + piece.local.numel()] = piece.local
        if dist.is_initialized() and whole.numel() > 1:
            dist.all_reduce(whole)
        state[name] = whole
    return state


def _save(path: Path, out: Path) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, (training, background) in CASES.items():
        model, parallel = _load(path, training)
        keeper = Keeper(
            Checkpoints(out / name), parallel, identity={"config": "this one"}, every=2, background=background
        )

        def on_step(step, state, states=states):
            if step == 2:
                states.append(_state(state.engine, state.projector))

        train(
            model, random_examples(9), training, parallel, seed=0, keeper=keeper,
            protect=lambda where: GraspProjector(where, _basis()), on_step=on_step,
        )  # fmt: skip
    return states


def _restore(path: Path, out: Path) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, (training, _) in CASES.items():
        model, parallel = _load(path, training)
        engine = build_engine(model, training, parallel, micro_batches=1)
        projector = GraspProjector(model, _basis())
        keeper = Keeper(Checkpoints(out / name), parallel, identity={"config": "this one"})
        extra = keeper.resume(engine, projector)
        assert extra is not None
        assert (extra["step"], extra["cursor"], len(extra["losses"])) == (2, 8, 2)
        states.append(_state(engine, projector))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path, list[dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("checkpoints")
    path = save_tiny(root / "model")
    return path, root / "out", run_distributed(_save, 3, path, root / "out")[0]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_restores_everything_at_another_world_size(saved, world_size):
    path, out, expected = saved
    found = _restore(path, out) if world_size == 1 else run_distributed(_restore, world_size, path, out)[1]
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        assert any(name.startswith("pins.") for name in before)
        assert {"optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"} <= {
            ".".join(name.split(".")[:2]) for name in before if name.startswith("optimizer")
        }
        for name, value in before.items():
            assert torch.equal(after[name].view(-1), value.view(-1)), name
            assert name.startswith("pins.") or value.any()


def test_what_is_on_disk(saved):
    _, out, _ = saved
    folder = out / "lora" / "step-00000002"
    record = verify(folder)
    assert (record["world_size"], record["step"], record["strategy"]) == (3, 2, "fsdp2")
    assert record["basis"] == _basis().fingerprint()
    assert 0 < record["seconds"] < 60
    assert {path.name for path in folder.iterdir()} == {"checkpoint.json", *record["files"]}
    assert all(name.endswith(".safetensors") for name in record["files"])
    names = record["tensors"]
    assert names["model.model.layers.0.mlp.down_proj.lora_B.default.weight"] == {"shape": [24, 2], "dtype": "float32"}
    assert all(".lora_" in name for name in names), "of a LoRA run the adapter alone is saved"


def _keeper(root: Path, parallel, **settings: Any) -> Keeper:
    return Keeper(Checkpoints(root), parallel, identity={"config": "this one"}, **settings)


def test_falls_back_to_the_one_before_and_says_why(saved, tmp_path):
    path, out, _ = saved
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        shutil.copytree(out / "lora" / "step-00000002", root / f"step-{step:08d}")
    (root / "step-00000003" / "checkpoint.json").unlink()
    file = sorted((root / "step-00000002").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    _, parallel = _load(path, LORA)
    said: list[str] = []
    found = _keeper(root, parallel).find(say=said.append)
    assert found is not None
    assert found[0] == root / "step-00000001"
    assert len(said) == 2
    assert "step-00000003 is not a finished checkpoint" in said[0]
    assert f"{file} has changed since it was written" in said[1]
    # and nothing is read from a run with other inputs
    assert Keeper(Checkpoints(root), parallel, identity={"config": "another"}).find(say=said.append) is None


def test_a_checkpoint_of_another_model_or_basis_is_refused(saved):
    path, out, _ = saved
    other = LORA.model_copy(update={"lora": LoraConfig(rank=3, alpha=4)})
    for training, basis, message in (
        (other, _basis(), r"lora_A.*continue with the model, modules, rank"),
        (LORA, _basis(1), "another basis"),
    ):
        model, parallel = _load(path, training)
        engine = build_engine(model, training, parallel, micro_batches=1)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(InputError, match=message):
            _keeper(out / "lora", parallel).resume(engine, GraspProjector(model, basis))
        after = [parameter.detach() for parameter in model.parameters()]
        if training is LORA:
            assert all(torch.equal(a, b) or "lora_A" for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("background", [False, True])
def test_a_place_that_cannot_be_written_is_an_error_and_keeps_the_last(saved, tmp_path, background):
    path, _, _ = saved
    model, parallel = _load(path, LORA)
    engine = build_engine(model, LORA, parallel, micro_batches=1)
    keeper = _keeper(tmp_path / "checkpoints", parallel, background=background)
    keeper.save(1, engine, None, {}, finish=True)
    (tmp_path / "checkpoints" / "step-00000002").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        keeper.save(2, engine, None, {}, finish=True)
    found = keeper.find()
    assert found is not None
    assert found[0].name == "step-00000001"


def _fail_to_write(path: Path, out: Path, background: bool) -> str:
    """Rank 1's shard is a folder already."""
    model, parallel = _load(path, LORA)
    engine = build_engine(model, LORA, parallel, micro_batches=1)
    keeper = _keeper(out, parallel, background=background)
    prepare = keeper.checkpoints.prepare

    def with_a_folder_in_the_way(step: int) -> Path:
        folder = prepare(step)
        (folder / "shard-00002-model-00001-of-00001.safetensors").mkdir()
        return folder

    keeper.checkpoints.prepare = with_a_folder_in_the_way  # type: ignore[method-assign]
    try:
        keeper.save(1, engine, None, {}, finish=True)
    except InputError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("background", [False, True])
def test_a_shard_that_cannot_be_written_is_an_error_on_every_rank(saved, tmp_path, background):
    """Found by injected faults: what torch raises there is no Exception, and a thread ended without a word."""
    path, _, _ = saved
    said = run_distributed(_fail_to_write, 2, path, tmp_path, background)
    assert all("cannot write" in line and "step-00000001" in line for line in said), said
    assert Checkpoints(tmp_path).newest()[0] is None


def test_stops_behind_the_step_in_which_it_is_asked_to(saved, tmp_path):
    path, _, _ = saved
    runs = []
    for stops in (False, True):
        model, parallel = _load(path, LORA)
        keeper = _keeper(tmp_path / str(stops), parallel, background=True)

        def on_step(step, state, stops=stops):
            if stops and step == 1:
                os.kill(os.getpid(), preemption.signal.SIGUSR2)
                os.kill(os.getpid(), preemption.signal.SIGTERM)  # a second one changes nothing

        arguments = (model, random_examples(9), LORA, parallel)
        rest = {"seed": 0, "keeper": keeper, "protect": lambda where: GraspProjector(where, _basis())}
        if stops:
            with preemption.StopSignals(), pytest.raises(Preempted, match="saved behind step 2"):
                train(*arguments, **rest, on_step=on_step)
            assert verify(tmp_path / "True" / "step-00000002")["extra"]["cursor"] == 8
        runs.append((train(*arguments, **rest).losses, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_steps_that_are_not_finite_are_left_out_and_then_named(saved, tmp_path):
    path, _, _ = saved
    training = LORA.model_copy(update={"steps": 6, "max_skipped_steps": 1, "max_grad_norm": None})
    model, parallel = _load(path, training)
    keeper = _keeper(tmp_path, parallel, every=1)
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
    sick: list[int] = []
    weight.register_hook(lambda g: g * float("nan") if sick and sick.pop() else g)
    before: dict[int, torch.Tensor] = {}

    def on_step(step, state):
        before[step] = weight.detach().clone()
        sick[:] = [1] if step in (1, 3, 4) else []

    with pytest.raises(InputError, match=r"step 5: .* 2 time\(s\) in a row.*step-00000004.*examples \d+(, \d+){3} "):
        train(model, random_examples(9), training, parallel, seed=0, keeper=keeper, on_step=on_step)
    assert torch.equal(before[1], before[2])
    assert not torch.equal(before[2], before[3])
    assert torch.equal(weight.detach(), before[3])
    assert verify(tmp_path / "step-00000004")["extra"]["skipped"] == [2, 4]


# -- the folder


def _commit(checkpoints: Checkpoints, step: int) -> Path:
    folder = checkpoints.prepare(step)
    (folder / "shard.safetensors").write_bytes(b"x" * (10 + step))
    checkpoints.commit(folder, {"step": step}, {"shard.safetensors": fingerprint(folder / "shard.safetensors")})
    return folder


def test_a_finished_checkpoint_is_never_written_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = _commit(checkpoints, 3)
    content = (first / "shard.safetensors").read_bytes()
    _commit(checkpoints, 3)
    assert (tmp_path / "step-00000003.old-1" / "shard.safetensors").read_bytes() == content
    leftover = checkpoints.prepare(4)
    (leftover / "cut.safetensors").write_bytes(b"x")
    assert list(checkpoints.prepare(4).iterdir()) == []


def test_which_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        _commit(checkpoints, step)
    checkpoints.prepare(6).joinpath("cut").write_text("")
    checkpoints.prepare(10)
    checkpoints.prune()
    assert [step for step, _ in checkpoints.folders()] == [10, 9, 8, 4], "an unfinished one may be under way"
    assert [entry.state for entry in checkpoints.listing()] == ["unfinished", "valid", "valid", "valid"]


@pytest.mark.parametrize("what", ["marker", "file", "extra file", "no marker", "no file", "old format"])
def test_every_change_is_seen(tmp_path, what):
    checkpoints = Checkpoints(tmp_path)
    _commit(checkpoints, 1)
    folder = _commit(checkpoints, 2)
    marker, file = folder / "checkpoint.json", folder / "shard.safetensors"
    if what in ("marker", "file"):
        path = marker if what == "marker" else file
        content = path.read_bytes()
        for index in range(len(content)):
            for bit in (0, 7):
                path.write_bytes(content[:index] + bytes([content[index] ^ (1 << bit)]) + content[index + 1 :])
                with pytest.raises(InputError):
                    verify(folder)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(InputError):
                verify(folder)
    elif what == "extra file":
        (folder / "more.safetensors").write_bytes(b"")
    elif what == "old format":
        marker.write_text(json.dumps({"format": 1, "files": {}}))
    else:
        (marker if what == "no marker" else file).unlink()
    newest, _, problems = checkpoints.newest()
    assert newest == checkpoints.folder(1)
    assert len(problems) == 1
    assert str(folder) in problems[0]


def test_pieces_keep_to_their_whole():
    piece = FlatPiece(torch.arange(3.0), 4, 9)
    assert piece.shape == (9,)
    assert "4:7 of 9" in repr(piece)
    with pytest.raises(NotImplementedError, match="use its `local`"):
        piece + 1
    with pytest.raises(AssertionError):
        FlatPiece(torch.zeros(3), 7, 9)
