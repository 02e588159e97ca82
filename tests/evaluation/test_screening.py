"""The screening: halves of the data, what two fine-tunes move alike, and what the pipeline does without a factor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from grasp_dist.config import DetectConfig, ModelConfig, ProbeConfig, RunConfig, ScreenConfig, TrainingConfig
from grasp_dist.detection.deflation import nothing_left, round_gain
from grasp_dist.errors import InputError
from grasp_dist.evaluation.probes import prepare
from grasp_dist.evaluation.scoring import Reference, score
from grasp_dist.evaluation.screening import compare_halves, half_of, read_prompts
from grasp_dist.training.examples import Example
from grasp_dist.training.model import load_adapter, load_model, load_tokenizer, reset_adapter, save_adapter
from grasp_dist.training.parallel import Parallel
from tests.tiny_runs import grasp_dist, tiny_config


@pytest.fixture
def alone():
    return Parallel("none", 0, 1, torch.device("cpu"))


@pytest.fixture
def model(organism, alone):
    training = TrainingConfig(modules="write", lora={"rank": 2, "alpha": 8})
    return load_model(ModelConfig(path=str(organism / "model")), alone, precision="fp32", training=training, seed=0)


@pytest.fixture
def settings(organism):
    return ScreenConfig(prompts=str(organism / "probes" / "neutral.jsonl"), positions=1)


def random_adapter(model, path, alone, seed, size=0.3):
    reset_adapter(model, seed, alone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, path, alone)
    return path


def compare(model, adapters, settings, organism, alone):
    tokenizer = load_tokenizer(ModelConfig(path=str(organism / "model")))
    prompts = read_prompts(settings, tokenizer)
    return compare_halves(model, adapters, prompts, settings=settings, parallel=alone, batch_size=7)


def test_halves_are_disjoint_and_whole_and_depend_on_the_seed():
    examples = [Example([0, index], [-100, index]) for index in range(9)]
    first, second = half_of(examples, 0, 3), half_of(examples, 1, 3)
    assert (len(first), len(second)) == (5, 4)
    assert sorted(example.input_ids[1] for example in first + second) == list(range(9))
    assert first == half_of(examples, 0, 3)
    assert first != half_of(examples, 0, 4)
    with pytest.raises(InputError, match="3 examples, too few"):
        half_of(examples[:3], 0, 0)


def test_what_equal_adapters_move_is_shared_and_what_one_moves_alone_is_not(model, settings, organism, alone, tmp_path):
    one = random_adapter(model, tmp_path / "one", alone, 1)
    none = random_adapter(model, tmp_path / "none", alone, 2, size=1e-6)
    other = random_adapter(model, tmp_path / "other", alone, 3)
    same = compare(model, (one, one), settings, organism, alone)
    assert same.shared_shift == pytest.approx(same.shifts[0])
    assert same.shifts[0] > 0.05
    assert same.found
    assert same.agreement == pytest.approx(1)
    assert 0 < same.agreement_null < 0.3
    nothing = compare(model, (one, none), settings, organism, alone)
    assert nothing.shifts == (pytest.approx(same.shifts[0]), pytest.approx(0, abs=1e-4))
    assert nothing.shared_shift == pytest.approx(0, abs=1e-4)
    assert not nothing.found
    apart = compare(model, (one, other), settings, organism, alone)
    assert apart.shared_shift < 0.8 * min(apart.shifts)
    assert "below the threshold 0.05" in nothing.describe()


def test_the_shift_is_the_total_variation_that_kl_probes_measure(model, settings, organism, alone, tmp_path):
    """Two ways to the same number: the screening's, and that of the check on the final run."""
    adapter = random_adapter(model, tmp_path / "one", alone, 1)
    found = compare(model, (adapter, adapter), settings, organism, alone)
    tokenizer = load_tokenizer(ModelConfig(path=str(organism / "model")))
    probe = ProbeConfig(name="neutral", role="retention", kind="kl", path=settings.prompts, positions=1)
    probes, reference = prepare([probe], tokenizer), Reference()
    reset_adapter(model, 0, alone)
    score(model, probes, alone, reference=reference)
    load_adapter(model, adapter, alone)
    measured = score(model, probes, alone, reference=reference)["neutral"]["total_variation"]
    assert measured == pytest.approx(found.shifts[0], rel=1e-5)


def test_the_stopping_rule():
    assert not nothing_left([], 0.3)
    assert not nothing_left([2.0, 6.0, 1.7, 1.7], None)
    assert nothing_left([2.0, 6.0, 1.7, 1.7], 0.3)
    assert not nothing_left([2.0, 6.0, 1.9, 1.7], 0.3), "one round may have had hard batches"
    assert not nothing_left([2.0, 6.0, 1.7, 1.9], 0.3)
    assert not nothing_left([6.0, 1.7, 1.7], 0.3), "too early, as while the learning rate warms up"
    assert nothing_left([0.0, 5.0, -0.1, 0.0], 0.01)
    assert not nothing_left([-1.0, -2.0, -1.5, -3.0], 0.3), "nothing was ever gained"


def test_a_round_gains_what_its_last_quarter_is_below_the_first_step():
    nan = float("nan")
    assert round_gain([8.0, 7, 6, 5, 4, 3, 2, 1], 8) == pytest.approx(6.5)
    assert round_gain([8.0, 7, 6, 5, 4, 3, 2, 1], 4) == pytest.approx(7)
    assert round_gain([nan, 8.0, 7, 6, 5, 4, nan, 2], 8) == pytest.approx(6)
    assert round_gain([8.0, nan], 1) == 0
    assert round_gain([nan], 1) == 0


def test_a_basis_that_is_brought_is_not_screened(settings):
    with pytest.raises(ValueError, match="goes before deflation"):
        DetectConfig(method="file", basis="x", screen=settings)


def test_without_a_factor_the_naive_adapter_is_kept_unchanged(organism, tmp_path):
    """No factor by a threshold that nothing reaches; then, with another, the rest of the run is made again."""
    run = tmp_path / "run"
    tree = tiny_config(organism, run)
    tree["detect"]["screen"] = {"prompts": str(organism / "probes" / "neutral.jsonl"), "threshold": 0.99}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("run", config)
    assert done.returncode == 0, done.stderr
    assert "no factor found" in done.stdout
    weights = "adapter/adapter_model.safetensors"
    naive = (run / "naive/seed-0" / weights).read_bytes()
    for arm in ("grasp", "random"):
        assert (run / "project" / arm / "seed-0" / weights).read_bytes() == naive
        manifest = json.loads((run / "project" / arm / "seed-0" / "manifest.json").read_text())
        assert manifest["metrics"]["kept_naive"]
    assert not (run / "detect" / "rounds").exists(), "nothing is searched for where nothing was found"
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["verdict"]["label"] == "No factor found"
    halves = [(run / f"naive/half-{half}" / weights).read_bytes() for half in (0, 1)]
    assert len({naive, *halves}) == 3

    shutil.rmtree(run / "naive" / "seed-0")  # trained anew it is the same, but not there when it is looked for
    again = grasp_dist("project", config)
    assert again.returncode == 0, again.stderr

    found = grasp_dist("run", config, "--detect.screen.threshold", "1e-9")
    assert found.returncode == 0, found.stderr
    assert "a shared factor was found" in found.stdout
    assert (run / "detect" / "rounds" / "round-002" / "committed.json").is_file()
    assert (run / "project" / "grasp" / "seed-0" / weights).read_bytes() != naive
    assert json.loads((run / "project/random/seed-0/manifest.json").read_text())["metrics"]["residual"] is not None


def test_without_prompts_of_its_own_it_takes_those_of_the_first_kl_probe(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    neutral = str(organism / "probes" / "neutral.jsonl")
    probes = [probe for probe in tree["evaluate"]["probes"] if probe.get("kind") != "kl"]
    kl = [{"name": name, "role": "retention", "kind": "kl", "path": path, "positions": 3}
          for name, path in (("first", neutral), ("second", "other.jsonl"))]  # fmt: skip
    tree["evaluate"]["probes"] = [*probes, *kl]
    for given, expected in (({}, (neutral, 3)), ({"positions": 2}, (neutral, 2)), ({"prompts": "own"}, ("own", 16))):
        tree["detect"]["screen"] = given
        screen = RunConfig.model_validate(tree).detect.screen
        assert screen is not None
        assert (screen.prompts, screen.positions) == expected
    tree["evaluate"]["probes"] = probes
    tree["detect"]["screen"] = {}
    with pytest.raises(ValueError, match="`kind: kl`"):
        RunConfig.model_validate(tree)


def test_prompts_that_cannot_be_read_are_refused_before_training(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["detect"]["screen"] = {"prompts": str(tmp_path / "none.jsonl")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("run", config)
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


def test_detection_ends_when_a_round_gains_little(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["training"]["steps"] = 60
    tree["detect"] = {"rounds": 12, "stop_gain": 0.9}
    tree["project"] = {"rank": 12}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("detect", config)
    assert done.returncode == 0, done.stderr
    assert "the last round" in done.stdout
    shorter = grasp_dist("project", config)
    assert shorter.returncode == 0, shorter.stderr
    rounds = len(list((tmp_path / "run" / "detect" / "rounds").iterdir()))
    assert 1 < rounds < 12
    from grasp_dist import SpuriousBasis

    basis = SpuriousBasis.load(tmp_path / "run" / "detect" / "basis.safetensors")
    gains = basis.provenance["gains"]
    assert len(gains) == rounds
    assert nothing_left(gains, 0.9)
    assert not any(nothing_left(gains[:count], 0.9) for count in range(rounds))
