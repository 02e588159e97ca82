"""Did a removal work: the share that says so, and fine-tunes that are made again with more blocked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_dist import SpuriousBasis
from grasp_dist.config import CheckConfig, ModelConfig, RunConfig, TrainingConfig
from grasp_dist.detection.adapter import read_adapter
from grasp_dist.evaluation.removal import share_of_naive
from grasp_dist.evaluation.screening import read_prompts
from grasp_dist.training.model import load_model, load_tokenizer, reset_adapter, save_adapter
from grasp_dist.training.parallel import Parallel
from tests.tiny_runs import grasp_dist, tiny_config

ALONE = Parallel("none", 0, 1, torch.device("cpu"))


def config(organism, out, check, steps=8, **arms):
    tree = tiny_config(organism, out)
    tree["training"]["steps"] = steps
    tree["evaluate"] |= {"shift": False, "ablation": False}
    tree["project"] = {"check": check}
    tree["checkpoint"] = {"every": 3}
    if arms:
        tree["project"]["arms"] = arms
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def run(organism, out, check, nproc=1, stage="run", **more):
    done = grasp_dist(stage, config(organism, out, check, **more), nproc=nproc)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def metrics(out, arm="grasp"):
    return json.loads((out / "project" / arm / "seed-0" / "manifest.json").read_text())["metrics"]


def weights(out, arm="grasp"):
    return load_file(out / "project" / arm / "seed-0" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def failed(organism, tmp_path_factory):
    """A run in which every removal fails the check, and what it said."""
    out = tmp_path_factory.mktemp("failed") / "run"
    return out, run(organism, out, {"threshold": 1e-4, "repeats": 2})


@pytest.fixture(scope="module")
def passed(organism, tmp_path_factory):
    """A run in which none does."""
    out = tmp_path_factory.mktemp("passed") / "run"
    return out, run(organism, out, {"threshold": 0.999})


def test_the_share_is_the_ratio_of_total_variations(organism, tmp_path):
    where = ModelConfig(path=str(organism / "model"))
    training = TrainingConfig(modules="write", lora={"rank": 2, "alpha": 8})
    model = load_model(where, ALONE, precision="fp32", training=training, seed=0)
    settings = CheckConfig(prompts=str(organism / "probes" / "neutral.jsonl"), positions=2, limit=9)
    prompts = read_prompts(settings, load_tokenizer(where))
    assert len(prompts) == 9
    for name, size in (("naive", 0.3), ("own", 0.1)):
        reset_adapter(model, 1, ALONE)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_B." in key:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, tmp_path / name, ALONE)
    found = share_of_naive(
        model, tmp_path / "naive", tmp_path / "own", prompts, settings=settings, parallel=ALONE, batch_size=4
    )
    base = AutoModelForCausalLM.from_pretrained(organism / "model").eval()

    def last(model):
        with torch.no_grad():
            return torch.cat([model(torch.tensor([ids])).logits[0, -2:].double().softmax(-1) for ids in prompts])

    plain = last(base)
    moved = {
        name: float(
            (
                last(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(organism / "model"), folder).eval())
                - plain
            )
            .abs()
            .sum(-1)
            .mean()
            / 2
        )
        for name, folder in (("naive", tmp_path / "naive"), ("own", tmp_path / "own"))
    }
    assert found == pytest.approx(moved["own"] / moved["naive"], rel=1e-4)
    assert 0 < found < 1
    reset_adapter(model, 1, ALONE)  # B = 0: nothing has moved
    save_adapter(model, tmp_path / "still", ALONE)
    assert (
        share_of_naive(
            model, tmp_path / "still", tmp_path / "own", prompts, settings=settings, parallel=ALONE, batch_size=4
        )
        is None
    )


def test_a_removal_that_worked_is_left_as_it_is(passed, organism, tmp_path):
    out, said = passed
    assert "as removals do that worked" in said
    assert metrics(out)["extensions"] == 0
    assert 0 < metrics(out)["share_of_naive"] < 0.999
    run(organism, tmp_path / "run", None, stage="run")
    assert all(torch.equal(one, weights(tmp_path / "run")[name]) for name, one in weights(out).items())
    assert "share_of_naive" not in metrics(tmp_path / "run")
    assert "share_of_naive" not in metrics(out, "random"), "the control is what it is"


def test_one_that_failed_is_made_again_with_what_it_found_blocked(failed, passed):
    out, said = failed
    assert said.count("it has found another way, which is blocked now; once again") == 2
    assert said.count("the removal has failed, and project.check.repeats is 2") == 1
    place = out / "project" / "grasp" / "seed-0"
    detected, first, second = (
        SpuriousBasis.load(path)
        for path in (out / "detect" / "basis.safetensors", *(place / f"extended-{n}.safetensors" for n in (1, 2)))
    )
    before = read_adapter(passed[0] / "project" / "grasp" / "seed-0" / "adapter").weights
    after = read_adapter(place / "adapter").weights
    for weight in detected.weights:
        for side in ("write", "read"):
            ranks = [basis.basis_rank(weight, side) for basis in (detected, first, second)]
            assert ranks == [2, 3, 4], weight
            kept = first.tensor(weight, side)[:, :2]
            torch.testing.assert_close(kept, detected.tensor(weight, side))
        # The one that joined is the leading direction of the update that failed, which is that of the other run.
        u, _, vt = torch.linalg.svd(before[weight].B.double() @ before[weight].A.double())
        for side, leading in (("write", u[:, 0]), ("read", vt[0])):
            assert abs(float(first.tensor(weight, side)[:, 2].double() @ leading)) > 0.999
        # And the last update has nothing along all of them.
        update = after[weight].B.double() @ after[weight].A.double()
        assert float((second.tensor(weight, "write").double().T @ update).norm() / update.norm()) < 1e-5
        assert float((update @ second.tensor(weight, "read").double()).norm() / update.norm()) < 1e-5
    assert metrics(out)["extensions"] == 2
    assert metrics(out)["steps"] == 8
    spent = [basis.provenance["seconds"] for basis in (first, second)]
    assert 0 < spent[0] < spent[1] < metrics(out)["seconds"], "what all attempts took"
    states = sorted((place / "checkpoints").iterdir())
    assert [path.name for path in states] == ["step-00000003", "step-00000006"]
    made = (place / "extended-2.safetensors").stat().st_mtime
    assert all(path.stat().st_mtime >= made for path in states), "of the last attempt"
    scores = json.loads((out / "evaluate" / "grasp" / "seed-0" / "scores.json").read_text())
    assert scores["basis_rank"] == {"write": 4, "read": 4}
    assert scores["extensions"] == 2
    report = json.loads((out / "report" / "report.json").read_text())
    assert {model["model"]: model["made_again"] for model in report["models"]}["grasp"] == 1


def test_an_arm_whose_adapter_has_another_shape_is_not_checked(organism, tmp_path):
    """Found in review: it was trained, and could then not be compared with the naive fine-tune."""
    other = {"wide": {"training": {"lora": {"rank": 3}}}, "grasp": {}}
    tree = yaml.safe_load(config(organism, tmp_path / "run", {}, **other).read_text())
    settings = RunConfig.model_validate(tree)
    assert settings.checked("wide") is None
    assert settings.checked("grasp") is not None


def test_nothing_is_done_again(failed):
    out, _ = failed
    done = grasp_dist("run", out.with_suffix(".yaml"))
    assert done.returncode == 0
    assert "project/grasp/seed-0: finished, kept" in done.stdout


@pytest.mark.slow
def test_one_that_is_killed_while_it_is_made_again_goes_on(failed, organism, tmp_path):
    out = tmp_path / "run"
    check = {"threshold": 1e-4, "repeats": 2}
    path = config(organism, out, check)
    process = subprocess.Popen([sys.executable, "-m", "grasp_dist.cli", "run", str(path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    place = out / "project" / "grasp" / "seed-0"
    while not (place / "extended-1.safetensors").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = grasp_dist("run", path)
    assert done.returncode == 0, done.stderr
    assert metrics(out)["extensions"] == 2
    assert all(torch.equal(one, weights(failed[0])[name]) for name, one in weights(out).items())


@pytest.mark.slow
def test_two_processes_find_the_same(failed, organism, tmp_path):
    out = tmp_path / "run"
    run(organism, out, {"threshold": 1e-4, "repeats": 2}, nproc=2)
    assert metrics(out)["share_of_naive"] == pytest.approx(metrics(failed[0])["share_of_naive"], rel=1e-3)
    for name, one in weights(out).items():
        other = weights(failed[0])[name]
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate": {"probes": []}}, "project.check compares fine-tunes on generic prompts"),
        ({"project": {"check": {"prompts": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"project": {"check": {"treshold": 0.5}}}, "did you mean 'threshold'"),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_runs(organism, tmp_path, change, said):
    path = config(organism, tmp_path / "run", {})
    tree = yaml.safe_load(path.read_text()) | change
    path.write_text(yaml.safe_dump(tree))
    done = grasp_dist("run", path)
    assert done.returncode == 2, done.stdout
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "run" / "naive").exists()
