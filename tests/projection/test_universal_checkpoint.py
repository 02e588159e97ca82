"""A DeepSpeed loop of the user's own, with DeepSpeed's own checkpoints: the pins beside them fit at any world size."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from grasp_dist.projection import GraspProjector
from tests.distributed import run_distributed
from tests.projection.flat_cases import inputs_of, make_model, odd_basis
from tests.projection.zero_cases import configuration, prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
STAGES = (1, 2, 3)
STEPS, DECAY = 3, 0.1


def _build(stage: int, universal: bool = False) -> tuple[Any, GraspProjector]:
    """An engine in bf16 with fp32 masters, which decay moves; `universal`: load_checkpoint reads such ones."""
    prepare()
    import deepspeed

    model = make_model("full")
    settings = configuration(stage, dtype="bf16", accumulate_in="fp32")
    if universal:
        settings["checkpoint"] = {"load_universal": True}
        with torch.no_grad():  # not the weights that training began with: the pins must come from the checkpoint
            for parameter in model.parameters():
                parameter.mul_(0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=DECAY)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    projector = GraspProjector(engine, odd_basis("both"))
    projector.attach(engine)
    return engine, projector


def _step(engine: Any) -> None:
    engine.backward(engine(inputs_of(dist.get_rank(), 0, torch.bfloat16)))
    engine.step()


def _state(engine: Any, projector: GraspProjector) -> dict[str, torch.Tensor]:
    """Masters, moments and pins, whole, by DeepSpeed's own accessors."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {f"pins of {name}": pin.clone() for name, pin in projector.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state[name] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key} of {name}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return state


def _save(folder: str) -> dict[int, dict[str, torch.Tensor]]:
    states = {}
    for stage in STAGES:
        engine, projector = _build(stage)
        for _ in range(STEPS):
            _step(engine)
        engine.save_checkpoint(f"{folder}/{stage}")
        pins = projector.state_dict()  # collective; whole on every rank
        if dist.get_rank() == 0:
            save_file(pins, f"{folder}/{stage}/pins.safetensors")
        states[stage] = _state(engine, projector)
    return states


def _resume(folder: str) -> dict[tuple[int, int], dict[str, Any]]:
    result = {}
    for saved, stage in ((1, 1), (2, 2), (3, 3), (1, 2)):  # DeepSpeed itself has no way between stage 3 and the others
        engine, projector = _build(stage, universal=True)
        engine.load_checkpoint(f"{folder}/{saved}-universal")
        projector.load_state_dict(load_file(f"{folder}/{saved}/pins.safetensors"))
        loaded, residual = _state(engine, projector), max(projector.residual().values())
        _step(engine)
        after = max(projector.residual().values())
        moved = (_state(engine, projector)["wide.weight"] - loaded["wide.weight"]).abs().max()
        result[saved, stage] = {"loaded": loaded, "residuals": (residual, after), "moved": float(moved)}
    return result


def _convert(folder: Path, stage: int) -> None:
    tag, out = f"global_step{STEPS}", folder / f"{stage}-universal"
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1",
         "--num_merge_workers=1", "--inject_missing_state",
         "--input_folder", folder / str(stage) / tag, "--output_folder", out / tag],
        env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("universal")
    states = run_distributed(_save, 2, str(folder))[0]
    for stage in STAGES:
        _convert(folder, stage)
    return folder, states


@pytest.mark.parametrize("world", [1, 3])
def test_pins_beside_a_universal_checkpoint_hold_at_another_world_size_and_stage(saved, world):
    folder, states = saved
    for (stage, _), seen in run_distributed(_resume, world, str(folder))[0].items():
        assert seen["loaded"].keys() == states[stage].keys()
        for name, value in states[stage].items():
            assert torch.equal(seen["loaded"][name], value), (stage, name)
        assert max(seen["residuals"]) <= 1e-6, (stage, seen["residuals"])
        assert seen["moved"] > 1e-4
