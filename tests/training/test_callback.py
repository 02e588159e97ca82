"""GraspCallback in transformers' Trainer: pins across checkpoints, and no silent no-op."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_dist import InputError, SpuriousBasis
from grasp_dist.architecture import canonical_name
from grasp_dist.training.callback import PINS_NAME, GraspCallback
from tests.distributed import run_distributed
from tests.projection.projection_cases import orthonormal
from tests.tiny_models import tiny_model

DATA = torch.randint(3, 64, (40, 12), generator=torch.Generator().manual_seed(3))
ROWS = [{"input_ids": row, "labels": row} for row in DATA]


def model_and_basis(*, lora: bool = False, seed: int = 0) -> tuple[torch.nn.Module, SpuriousBasis]:
    model = tiny_model("llama", seed=seed)
    tensors = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            tensors[f"{name}.weight.write"] = orthonormal(module.out_features, 3, index)
            tensors[f"{name}.weight.read"] = orthonormal(module.in_features, 2, 100 + index)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["o_proj", "down_proj"]))
    return model, SpuriousBasis.from_tensors(tensors)


def arguments(folder, **settings) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, weight_decay=0.1, logging_steps=100,
        train_sampling_strategy="sequential", per_device_train_batch_size=4 // world, **(defaults | settings),
    )  # fmt: skip


def train(folder, *, lora: bool = False, resume=None, seed: int = 0, callbacks=(), **settings):
    """(trainer, callback) after training."""
    model, basis = model_and_basis(lora=lora, seed=seed)
    callback = GraspCallback(basis)
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=ROWS, callbacks=[callback, *callbacks])
    for extra in callbacks:
        extra.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {canonical_name(name): value.detach().double().clone() for name, value in model.named_parameters()}


def worst_residual(before: dict, after: dict, basis: SpuriousBasis) -> float:
    """By its definition, against the weights before training."""
    worst = 0.0
    for name in basis.weights:
        U, V = basis.tensor(name, "write").double(), basis.tensor(name, "read").double()
        change = after[name] - before[name]
        worst = max(worst, (max((U.T @ change).norm(), (change @ V).norm()) / after[name].norm()).item())
    return worst


def test_protects_and_reports(tmp_path, caplog):
    model, basis = model_and_basis()
    before = weights(model)
    caplog.set_level(logging.INFO, "grasp_dist.training.callback")
    trainer, callback = train(tmp_path)
    after = weights(trainer.model)
    assert worst_residual(before, after, basis) <= 1e-6
    assert max((after[name] - before[name]).norm() for name in basis.weights) > 0.1
    assert callback.projector.steps == 6
    assert 0 < max(callback.residual.values()) <= 1e-6
    assert trainer.state.log_history[-1] == {"step": 6, "grasp_residual": max(callback.residual.values())}
    assert "6 steps projected; largest residual" in caplog.text
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks  # detached


def test_without_the_callback_weights_move_along_the_basis(tmp_path):
    """What the test above would find if the callback did nothing."""
    model, basis = model_and_basis()
    before = weights(model)
    Trainer(model, arguments(tmp_path), train_dataset=ROWS).train()
    assert worst_residual(before, weights(model), basis) > 1e-2


def test_options_reach_the_projector(tmp_path):
    model, basis = model_and_basis()
    basis.save(tmp_path / "basis.safetensors")
    callback = GraspCallback(tmp_path / "basis.safetensors", side="write", rank=2, gradient=False)
    Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()
    kept = callback.projector.basis
    assert {kept.sides(name) for name in kept.weights} == {("write",)}
    assert {kept.basis_rank(name, "write") for name in kept.weights} == {2}


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    model, basis = model_and_basis()
    before = weights(model)
    through, _ = train(tmp_path / "through")
    train(tmp_path / "cut", max_steps=3, save_strategy="steps", save_steps=3)
    saved = load_file(tmp_path / "cut" / "checkpoint-3" / PINS_NAME)
    resumed, callback = train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"), save_steps=3)
    after = weights(resumed.model)
    for name, wanted in weights(through.model).items():
        assert torch.equal(after[name], wanted), name
    for name, pin in callback.projector.state_dict().items():
        assert torch.equal(saved[name], pin)
    assert callback.projector.steps == 3
    assert worst_residual(before, after, basis) <= 1e-6


def test_resume_takes_pins_of_a_moved_run(tmp_path):
    """Another folder, other output_dir, other checkpoint of the same run: its id counts, not its path."""
    train(tmp_path / "old", max_steps=4, save_strategy="steps", save_steps=2)
    shutil.move(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new" / "checkpoint-4" / PINS_NAME).unlink()  # checkpoint-2 has the same
    _, callback = train(tmp_path / "new", resume=str(tmp_path / "new" / "checkpoint-4"))
    assert callback.projector.steps == 2


def test_resume_without_pins_is_refused(tmp_path):
    train(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / PINS_NAME).unlink()
    with pytest.raises(InputError, match="weights before training"):
        train(tmp_path / "run", resume=str(checkpoint))


def test_pins_of_another_run_are_not_taken(tmp_path):
    for name, seed in (("run", 0), ("other", 1)):
        train(tmp_path / name, max_steps=2, save_strategy="steps", save_steps=2, seed=seed)
    mine, other = (tmp_path / name / "checkpoint-2" for name in ("run", "other"))
    shutil.copy(other / PINS_NAME, mine / PINS_NAME)
    with pytest.raises(InputError, match=PINS_NAME):
        train(tmp_path / "run", resume=str(mine))


def test_run_that_began_without_grasp_is_refused(tmp_path):
    model, _ = model_and_basis()
    Trainer(model, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=ROWS).train()
    with pytest.raises(InputError, match="start from the base model again"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-2"))


def test_lora_resumes_without_pins(tmp_path):
    """They are zero. What the file holds are zeros, too."""
    through, _ = train(tmp_path / "through", lora=True)
    train(tmp_path / "cut", lora=True, max_steps=3, save_strategy="steps", save_steps=3)
    path = tmp_path / "cut" / "checkpoint-3" / PINS_NAME
    assert all(not pin.any() for pin in load_file(path).values())
    path.unlink()
    resumed, callback = train(tmp_path / "cut", lora=True, resume=str(path.parent))
    assert max(callback.residual.values()) <= 1e-6
    for name, wanted in weights(through.model).items():
        assert torch.allclose(weights(resumed.model)[name], wanted, rtol=0, atol=1e-6), name


def test_second_train_keeps_the_first_pins(tmp_path):
    model, basis = model_and_basis()
    before, callback = weights(model), GraspCallback(basis)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=ROWS, callbacks=[callback])
    trainer.train()
    first = {name: pin.clone() for name, pin in callback.projector.state_dict().items()}
    with torch.no_grad():  # what load_best_model_at_end or a user may do in between
        for parameter in model.parameters():
            parameter.mul_(1.01)
    trainer.train()
    assert all(torch.equal(pin, first[name]) for name, pin in callback.projector.state_dict().items())
    assert worst_residual(before, weights(model), basis) <= 1e-6


# -- never a silent no-op


class ReplaceOptimizer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.optimizer = torch.optim.SGD(self.trainer.model.parameters(), lr=1e-3)


def test_replaced_optimizer_is_noticed(tmp_path):
    with pytest.raises(InputError, match=r"at step 3 .* should have stepped 3 times, but GRASP's hooks ran 2"):
        train(tmp_path, callbacks=[ReplaceOptimizer()])


class AddLate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.add_callback(GraspCallback(model_and_basis()[1]))


def test_added_late_is_noticed(tmp_path):
    model, _ = model_and_basis()
    late = AddLate()
    late.trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[late])
    with pytest.raises(InputError, match="added after training had begun"):
        late.trainer.train()


def test_skipped_steps_are_no_steps(tmp_path):
    """fp16: a scaler that finds an infinite gradient leaves the step out, and the Trainer counts it all the same."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    args, state, control = arguments(tmp_path), TrainerState(), TrainerControl()
    Accelerator(cpu=True)
    model, basis = model_and_basis()
    before = weights(model)
    inner, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    callback = GraspCallback(basis)
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    for step, bad in enumerate([False, True, True, False, False]):
        rows = DATA[4 * step : 4 * step + 4]
        scaler.scale(model(input_ids=rows, labels=rows).loss * (torch.inf if bad else 1.0)).backward()
        held = weights(model)
        optimizer.step()
        assert optimizer.step_was_skipped is bad
        assert all(torch.equal(held[name], value) for name, value in weights(model).items()) is bad
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control, optimizer=optimizer)
    callback.on_train_end(args, state, control)
    assert callback.projector.steps == 3
    assert worst_residual(before, weights(model), basis) <= 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_model_that_was_compiled_beforehand(tmp_path, backend):
    model, basis = model_and_basis()
    before = weights(model)
    compiled = torch.compile(model, backend=backend)
    callback = GraspCallback(basis)
    args = arguments(tmp_path, max_steps=3, remove_unused_columns=False)  # the wrapper hides forward's arguments
    Trainer(compiled, args, train_dataset=ROWS, callbacks=[callback]).train()
    assert callback.projector.steps == 3
    assert worst_residual(before, weights(model), basis) <= 1e-6


# -- two ranks


def _sharded(folder: str) -> dict:
    """The callback on an FSDP2 model, driven by hand (Accelerate has no FSDP on CPU); and a Trainer asked for FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, basis = model_and_basis()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args, state, control = arguments(folder), TrainerState(), TrainerControl()
    callback = GraspCallback(basis)
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    for rows in DATA[:8].split(4):
        rows = rows.chunk(2)[torch.distributed.get_rank()]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control, optimizer=optimizer)
    checkpoint = os.path.join(folder, f"checkpoint-{state.global_step}")  # noqa: PTH118
    os.makedirs(checkpoint, exist_ok=True)  # noqa: PTH103
    callback.on_save(args, state, control)
    torch.distributed.barrier()
    callback.on_train_end(args, state, control)

    # Resumed, with weights that are not those before training.
    again, _ = model_and_basis(seed=5)
    for layer in again.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(again, mesh=mesh)
    second = GraspCallback(basis)
    second.on_train_begin(args, state, control, model=again, optimizer=torch.optim.AdamW(again.parameters()))
    same = {
        name: torch.equal(pin.full_tensor() if hasattr(pin, "full_tensor") else pin, other)
        for (name, pin), other in zip(
            second.projector.state_dict().items(),
            [v.full_tensor() if hasattr(v, "full_tensor") else v for v in callback.projector.state_dict().values()],
            strict=True,
        )
    }
    sharded = sum(hasattr(pin, "full_tensor") for pin in callback.projector.state_dict().values())
    said = _asked_for_fsdp(folder)
    return {
        "residual": callback.residual,
        "same": same,
        "sharded": sharded,
        "steps": callback.projector.steps,
        "said": said,
    }


def _asked_for_fsdp(folder: str) -> str:
    """What a Trainer that is asked for FSDP on the CPU says."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grasp_dist.training.callback").addHandler(handler)
    train(folder, max_steps=2, fsdp=True)
    return "\n".join(records)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_distributed(_sharded, 2, str(folder))


def check_pins(path) -> None:
    """Those of the weights before training, whole."""
    model, basis = model_and_basis()
    before, saved = weights(model), load_file(path)
    assert saved.keys() == {f"{name}.{side}" for name in basis.weights for side in ("write", "read")}
    for name in basis.weights:
        U, V = basis.tensor(name, "write").double(), basis.tensor(name, "read").double()
        assert torch.allclose(saved[f"{name}.write"].double(), U.T @ before[name], atol=1e-5)
        assert torch.allclose(saved[f"{name}.read"].double(), (before[name] @ V).T, atol=1e-5)


def test_sharded_pins_are_saved_whole(sharded):
    folder, (first, _) = sharded
    assert first["sharded"] > 0
    assert first["steps"] == 2
    assert 0 < max(first["residual"].values()) <= 1e-6
    path = folder / "checkpoint-2" / PINS_NAME
    check_pins(path)
    with safe_open(path, framework="pt") as file:
        assert len(json.loads(file.metadata()["grasp_pins"])["run"]) == 32


def test_sharded_pins_are_read_back(sharded):
    for rank in sharded[1]:
        assert rank["same"]
        assert all(rank["same"].values())


def test_lost_sharding_is_said(sharded):
    first, second = (rank["said"] for rank in sharded[1])
    assert first.count("FSDP was asked for, but Accelerate did not shard") == 1
    assert "FSDP was asked for" not in second


def _interrupted(folder: str, settings: dict) -> dict:
    """Weights of a run of 4 steps, and of one that is resumed after 2."""
    import deepspeed
    from accelerate.state import AcceleratorState

    def final(part: str, **more) -> tuple[dict[str, torch.Tensor], GraspCallback]:
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer, callback = train(f"{folder}/{part}", **settings, **more)
        assert (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine") is ("deepspeed" in settings)
        found = {}
        for name, parameter in trainer.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[canonical_name(name)] = parameter.detach().double().clone()
        return found, callback

    through, _ = final("through", max_steps=4)
    final("cut", max_steps=2, save_strategy="steps", save_steps=2)
    resumed, callback = final("cut", max_steps=4, resume=f"{folder}/cut/checkpoint-2")
    return {"through": through, "resumed": resumed, "residual": callback.residual}


def _deepspeed(stage: int) -> dict:
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    return {"deepspeed": config}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3], ids=["DDP", "ZeRO-2", "ZeRO-3"])
def test_resume_on_two_ranks(tmp_path, stage):
    pytest.importorskip("deepspeed")
    first, _ = run_distributed(_interrupted, 2, str(tmp_path), _deepspeed(stage) if stage else {})
    check_pins(tmp_path / "cut" / "checkpoint-2" / PINS_NAME)
    before, basis = model_and_basis()
    assert max(first["residual"].values()) <= 1e-6
    assert worst_residual(weights(before), first["resumed"], basis) <= 1e-6
    for name, wanted in first["through"].items():
        assert torch.allclose(first["resumed"][name], wanted, rtol=0, atol=1e-6), name
