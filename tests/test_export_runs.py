"""What a finished run exports, and what its model card says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grasp_dist.errors import InputError
from grasp_dist.export import export_checkpoint
from grasp_dist.fingerprints import model_reference
from grasp_dist.manifest import Unit, digest
from grasp_dist.training.lora import save_adapter
from tests.export_cases import ALONE, auto, cut, logits, lora_state, peft, record_of, write_step
from tests.training.training_cases import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def make_run(tmp_path: Path, base: Path) -> tuple[Path, torch.nn.Module]:
    """A run with one task, finished behind step 9 and evaluated, with a checkpoint of step 5; and the final model."""
    run, inputs = tmp_path / "run", {"seed": 0, "arm": "grasp", "basis": "ba515"}
    task = Unit(run / "project" / "grasp" / "seed-0", inputs)
    task.start()
    _, factors, settings = lora_state(base)
    tensors = {f"model.{name}": value for name, value in factors.items()}
    settings |= {"task": "project/grasp/seed-0", "config": digest(inputs), "basis": "fe" * 32}
    write_step(task.folder / "checkpoints", record_of(tensors, **settings), cut(tensors, 2))
    model, _, _ = lora_state(base, seed=9)
    save_adapter(model, task.folder / "adapter", ALONE)
    metrics = {"steps": 9, "residual": 3.25e-7, "final_loss": 0.75}
    task.finish(outputs=["adapter"], metrics=metrics, world_size=2, base_model=model_reference(base))
    (run / "config.yaml").write_text(
        yaml.safe_dump({"run_dir": str(run), "model": {"path": str(base)}, "data": {"path": "d"}})
    )
    scored = Unit(run / "evaluate" / "grasp" / "seed-0", {"weights": task.output_hash("adapter")})
    scored.start()
    models = [
        {"model": name, "seed": seed, "probes": {"drift": {"value": value}}}
        for name, seed, value in (("base", None, 0.0625), ("grasp", 0, 0.1875), ("grasp", 1, 0.9999))
    ]
    probes = [{"name": "drift", "role": "drift", "kind": "completion", "n": 4}]
    (run / "evaluate" / "scores.json").write_text(json.dumps({"format": 1, "probes": probes, "models": models}))
    return run, model


def test_of_a_finished_task_its_result_is_exported(llama, tmp_path):
    """And its last checkpoint, which is of a step before, only when that is asked for."""
    run, model = make_run(tmp_path, llama)
    task = run / "project" / "grasp" / "seed-0"
    for number, place in enumerate((run, task, task / "adapter")):
        out = export_checkpoint(place, tmp_path / f"out-{number}")
        assert torch.equal(logits(peft(llama, out)), logits(model))
        assert json.loads((out / "export.json").read_text())["step"] == 9
    merged = export_checkpoint(run, tmp_path / "merged", merge=True)
    assert (logits(auto(merged)) - logits(model)).abs().max() <= 1e-5
    earlier = export_checkpoint(task / "checkpoints", tmp_path / "earlier")
    assert json.loads((earlier / "export.json").read_text())["step"] == 5
    assert (logits(peft(llama, earlier)) - logits(model)).abs().max() > 0.1
    with pytest.raises(InputError, match="not the one that was fine-tuned"):
        export_checkpoint(run, tmp_path / "out", merge=True, base=save_tiny(tmp_path / "other", seed=1))
    config = json.loads((task / "adapter" / "adapter_config.json").read_text())
    (task / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 50.0}))
    with pytest.raises(InputError, match="not as the finished training left it"):
        export_checkpoint(run, tmp_path / "out")


def test_a_finished_full_fine_tune(llama, tmp_path):
    task = Unit(tmp_path / "naive" / "seed-0", {"seed": 0})
    task.start()
    shutil.copytree(llama, task.folder / "model")
    task.finish(outputs=["model"], metrics={"steps": 3}, world_size=1)
    out = export_checkpoint(task.folder, tmp_path / "out", dtype="bf16")
    expected = {name: tensor.bfloat16() for name, tensor in load_file(llama / "model.safetensors").items()}
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert auto(out).dtype == torch.bfloat16


def test_the_card_tells_the_figures_of_this_very_model(llama, tmp_path):
    run, _ = make_run(tmp_path, llama)
    card = (export_checkpoint(run, tmp_path / "out") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "llama"  # not where it stands on this machine
    assert front["library_name"] == "peft"
    assert {"grasp", "lora"} <= set(front["tags"])
    assert str(tmp_path) not in card
    for figure in ("rank 3, alpha 5.0", "0.75", "3.25e-07", "ba515", "| steps | 9 |", "0.0625 | 0.1875 |"):
        assert figure in card, figure
    assert "0.9999" not in card
    merged = (export_checkpoint(run, tmp_path / "merged", merge=True) / "README.md").read_text()
    assert yaml.safe_load(merged.split("---")[1])["library_name"] == "transformers"
    assert "0.1875" in merged


@pytest.mark.parametrize("change", ["earlier step", "trained again", "copied"])
def test_the_card_gives_no_figures_of_another_model(change, llama, tmp_path):
    run, _ = make_run(tmp_path, llama)
    source = run
    if change == "trained again":
        Unit(run / "evaluate" / "grasp" / "seed-0", {"weights": "of before"}).start()
    else:
        source = next(run.rglob("step-*"))
    if change == "copied":
        source = shutil.copytree(source, tmp_path / "copy")
    card = (export_checkpoint(source, tmp_path / "out") / "README.md").read_text()
    assert "0.1875" not in card
    assert ("3.25e-07" in card) == (change == "trained again")
    assert ("| steps | 5 |" in card) == (change != "trained again")
