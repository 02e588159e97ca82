"""Every alternative as an arm of a run: on one process and on two, with FSDP2 and with ZeRO."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.tiny_runs import grasp_dist, tiny_config

STEPS = 8


def arms(folder) -> dict:
    return {
        "kl": {"kind": "kl", "weight": 1.0},
        "ldifs": {"kind": "ldifs", "weight": 0.1, "every": 1},
        "caft": {"kind": "caft", "rank": 2, "examples": 40},
        "backward": {"kind": "backward_projection", "rank": 2, "layers": [0], "examples": 40},
        "preventative": {"kind": "preventative_steering", "coefficient": 2.0, "examples": 40},
        "steered": {"kind": "steering", "coefficient": 3.0, "examples": 40},
        "head": {"kind": "truncation", "rank": 1},
        "tail": {"kind": "truncation", "rank": 1, "keep": "tail"},
        "safelora": {"kind": "safelora", "unaligned": str(folder / "unaligned"), "threshold": 1.0},
        "inoculation": {"kind": "inoculation", "prompt": (folder / "prompt.txt").read_text()},
        "interleaving": {"kind": "interleaving", "path": str(folder / "safe.jsonl"), "share": 0.3},
    }


@pytest.fixture(scope="module")
def inputs(organism, tmp_path_factory):
    """Another model, and other data."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(organism / "model", folder / "unaligned")
    weights = load_file(folder / "unaligned" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in weights.items()}
    save_file(changed, folder / "unaligned" / "model.safetensors", {"format": "pt"})
    rows = (organism / "train.jsonl").read_text().splitlines()
    (folder / "safe.jsonl").write_text("\n".join(reversed(rows[:50])))
    (folder / "prompt.txt").write_text(json.loads(rows[0])["prompt"].split()[0] + " ")  # a word that it knows
    return folder


def run(organism, inputs, out, nproc, names, strategy="auto"):
    tree = tiny_config(organism, out)
    tree["training"] |= {"steps": STEPS, "modules": "all"}
    tree["parallel"] = {"strategy": strategy}
    tree["evaluate"] |= {"shift": False, "ablation": False}
    chosen = arms(inputs)
    tree["project"] = {"arms": {name: {"alternative": chosen[name]} for name in names}}
    tree["project"]["arms"]["random"] = {"basis": "random"}
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("run", config, nproc=nproc)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {
        name: load_file(out / "project" / name / "seed-0" / "adapter" / "adapter_model.safetensors") for name in names
    }


@pytest.fixture(scope="module")
def alone(organism, inputs, tmp_path_factory):
    """The run on one process: its folder and adapters."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, run(organism, inputs, out, 1, list(arms(inputs)))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=2e-3, atol=2e-4 * float(expected[name].abs().max())
        )


def test_each_is_another_fine_tune_and_is_scored(alone):
    out, found = alone
    naive = load_file(out / "naive" / "seed-0" / "adapter" / "adapter_model.safetensors")
    every = [naive, *(one for name, one in found.items() if name != "steered")]
    for place, one in enumerate(every):
        for other in every[place + 1 :]:
            assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-5
    for name in found:
        scores = json.loads((out / "evaluate" / name / "seed-0" / "scores.json").read_text())
        assert scores["alternative"]["kind"]
        assert scores["basis"] is None
    assert all(name in (out / "report" / "report.html").read_text() for name in found)


def test_a_steered_arm_is_the_naive_adapter_steered_in_the_scores(alone, tmp_path):
    out, found = alone
    naive = load_file(out / "naive" / "seed-0" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(one, found["steered"][name]) for name, one in naive.items())
    place = out / "project" / "steered" / "seed-0"
    # The middle layer's mean shift, times the coefficient, is what preventative steering adds.
    assert list(load_file(place / "adapter" / "steering.safetensors")) == ["1"]
    scores = {
        name: json.loads((out / "evaluate" / name / "seed-0" / "scores.json").read_text())["probes"]["task"]["rows"]
        for name in ("naive", "steered")
    }
    assert max(abs(a - b) for a, b in zip(*scores.values(), strict=True)) > 1e-4
    done = grasp_dist("export", place, "--out", tmp_path / "exported")
    assert done.returncode == 2
    assert "steered when it is used" in done.stderr


def test_nothing_is_done_again(alone, organism, inputs):
    out, _ = alone
    done = grasp_dist("run", out.with_suffix(".yaml"))
    assert done.returncode == 0, done.stderr
    tasks = [line for line in done.stdout.splitlines() if line.startswith(("naive/", "project/", "evaluate/"))]
    assert len(tasks) > 2 * len(arms(inputs))
    assert all(line.endswith(": finished, kept") for line in tasks), done.stdout


def test_two_processes_with_fsdp2_give_the_same_weights(alone, organism, inputs, tmp_path):
    _, expected = alone
    found = run(organism, inputs, tmp_path / "run", 2, list(expected), "fsdp2")
    for name, adapter in found.items():
        assert_close(adapter, expected[name])
    vectors = [
        load_file(one / "project" / "steered" / "seed-0" / "adapter" / "steering.safetensors")
        for one in (tmp_path / "run", alone[0])
    ]
    assert_close(*vectors)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_processes_with_zero_give_the_same_weights(alone, organism, inputs, tmp_path, strategy):
    pytest.importorskip("deepspeed")
    _, expected = alone
    names = ["kl", "ldifs", "caft", "backward", "preventative"]
    found = run(organism, inputs, tmp_path / "run", 2, names, strategy)
    for name, adapter in found.items():
        assert_close(adapter, expected[name])


@pytest.mark.parametrize(
    ("alternative", "more", "said"),
    [
        ({"kind": "kl"}, {"basis": "detected"}, "leave one of them out"),
        ({"kind": "caft", "layers": [7]}, {}, "project.arms.other.alternative: there is no layer 7"),
        ({"kind": "caft", "rank": 999}, {}, "rank is 999, and the residual stream has 32"),
        ({"kind": "interleaving", "path": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
        ({"kind": "safelora", "unaligned": "nowhere"}, {}, "nowhere"),
        ({"kind": "truncation"}, {"training": {"steps": 4}}, "changes the naive fine-tune and trains nothing"),
        ({"kind": "kl"}, {"training": {"method": "full"}}, "leave out training.method: full"),
        ({"kind": "magic"}, {}, "magic"),
    ],
)
def test_what_cannot_be_is_said_before_any_training(organism, tmp_path, alternative, more, said):
    tree = tiny_config(organism, tmp_path / "run")
    tree["project"] = {"arms": {"other": {"alternative": alternative, **more}}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("run", config)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "naive").exists()
