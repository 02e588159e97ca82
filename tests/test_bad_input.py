"""Bad input: one paragraph that names what is wrong and the remedy, exit code 2, no traceback, before any training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from grasp_dist import SpuriousBasis
from grasp_dist.cli import main
from tests.tiny_runs import grasp_dist, tiny_config


@pytest.fixture
def refused(capsys):
    """Run the command line in this process; returns what it said on standard error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 2
        return capsys.readouterr().err

    return run


def basis_file(tmp_path, weight="model.layers.0.mlp.down_proj.weight", dim=32, rank=2):
    columns = torch.linalg.qr(torch.randn(dim, rank, generator=torch.Generator().manual_seed(0)))[0]
    path = tmp_path / "basis.safetensors"
    SpuriousBasis.from_tensors({f"{weight}.write": columns}).save(path)
    return {"method": "file", "basis": str(path)}


@pytest.fixture
def sections(organism, tmp_path):
    """Configurations that are wrong in one place each, and what the message must say."""

    def data(rows) -> dict:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path)}

    adapter = tmp_path / "nan-adapter"
    return {
        "misspelt weight": ({"detect": basis_file(tmp_path, "model.layers.0.mlp.down_porj.weight")}, "down_proj"),
        "another model": ({"detect": basis_file(tmp_path, dim=64)}, "belongs to another model"),
        "rank above the weight": ({"training": {"lora": {"rank": 4096}}}, "lora.rank is 4096"),
        "rank above what is found": ({"project": {"rank": 99}}, "project.rank (for the arm grasp) is 99"),
        "one-shot rank above LoRA's": (
            {"project": {"arms": {"one": {"basis": "one_shot"}}}, "training": {"lora": {"rank": 1}}},
            "detect.rank is 2",
        ),
        "no probes": ({"evaluate": {"probes": []}}, "evaluate.probes is empty"),
        "more rounds than steps": ({"detect": {"rounds": 99}}, "detect.rounds is 99"),
        "empty data": ({"data": data([])}, "data.jsonl"),
        "all masked": ({"data": data([{"prompt": "d0 q0", "completion": ""}])}, "data.jsonl"),
        "unknown columns": ({"data": data([{"question": "x"}])}, "question"),
        "unknown module": ({"training": {"modules": ["o_porj"]}}, "o_proj"),
        "no such model": ({"model": {"path": str(tmp_path / "nowhere")}}, "nowhere"),
        "no such adapter": ({"detect": {"method": "one_shot", "adapter": str(adapter)}}, "nan-adapter"),
    }


CASES = [
    "misspelt weight",
    "another model",
    "rank above the weight",
    "rank above what is found",
    "one-shot rank above LoRA's",
    "no probes",
    "more rounds than steps",
    "empty data",
    "all masked",
    "unknown columns",
    "unknown module",
    "no such model",
    "no such adapter",
]


@pytest.mark.parametrize("case", CASES)
def test_refused_before_training(case, refused, sections, organism, tmp_path):
    changed, message = sections[case]
    tree = tiny_config(organism, tmp_path / "run")
    for key, value in changed.items():
        tree[key] = {**tree.get(key, {}), **value} if key in ("training", "model") else value
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    if case == "another model":  # rewritten by the fixture's last basis: make the one that is meant
        basis_file(tmp_path, dim=64)
    if case == "misspelt weight":
        basis_file(tmp_path, "model.layers.0.mlp.down_porj.weight")
    said = refused("run", config)
    assert message in said
    assert said.startswith("error: ")
    assert not (tmp_path / "run" / "naive").exists()


def test_nan_in_an_adapter(refused, organism, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    get_peft_model(model, LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    said = refused("detect", "--adapter", tmp_path / "adapter", "--out", tmp_path / "b.safetensors")
    assert "o_proj" in said
    assert not (tmp_path / "b.safetensors").exists()


def test_a_run_directory_of_another_run(refused, write_config, organism, tmp_path):
    config = write_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump({"run_dir": "x", "model": {"path": "/elsewhere"}, "data": {"path": "y"}})
    )
    assert "was made with model.path /elsewhere" in refused("run", config)


def test_a_stage_before_its_upstream(refused, write_config):
    assert "grasp-dist detect CONFIG" in refused("project", write_config())


def test_an_error_in_a_worker_is_one_message_too(write_config, organism, tmp_path):
    """Data that passes the sample check and fails later is found by the processes of the group."""
    bad = tmp_path / "long.jsonl"
    lines = (organism / "train.jsonl").read_text().splitlines()
    too_long = json.dumps({"prompt": "d0 q0", "completion": "a0 " * 500})
    bad.write_text("\n".join(lines * 60 + [too_long]) + "\n")
    config = write_config(data={"path": str(bad)})
    done = grasp_dist("run", config, "--nproc", 2)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "lower data.max_length to 64" in done.stderr
    assert "what was finished is kept" in done.stderr


def test_a_full_disk_loses_nothing(refused, write_config, organism, tmp_path):
    """A file that no writer can replace stands in for a disk that fills up in mid-run."""
    config = write_config()
    assert grasp_dist("naive", config).returncode == 0
    manifest = (tmp_path / "run" / "naive" / "seed-0" / "manifest.json").read_text()
    shutil.rmtree(tmp_path / "run" / "detect", ignore_errors=True)
    (tmp_path / "run" / "detect").write_text("in the way")
    said = refused("run", config)
    assert "detect" in said
    assert (tmp_path / "run" / "naive" / "seed-0" / "manifest.json").read_text() == manifest
