"""GRASP beside its alternatives by one command: which arms that is, and what it leaves behind."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml
from pydantic import ValidationError

from grasp_dist.comparison import compared, methods_for
from grasp_dist.config import RunConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from tests.tiny_runs import grasp_dist, tiny_config


@pytest.fixture
def config(organism, tmp_path):
    return RunConfig.model_validate(tiny_config(organism, tmp_path / "run"))


def test_everything_that_comes_along_is_valid():
    names = "grasp random grasp_gradient grasp_both caft backward preventative steered kl ldifs head tail slower"
    assert list(methods_for(TrainingConfig(steps=8))) == [*names.split(), "shorter"]
    assert methods_for(TrainingConfig(steps=9))["shorter"].training == {"steps": 4}
    assert methods_for(TrainingConfig(epochs=1))["shorter"].training == {"epochs": 0.5}


@pytest.mark.parametrize("arms", [{}, {"arms": {"mine": {"rank": 2}}}])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_control_blocks_as_grasp_does(organism, tmp_path, arms, gradient):
    tree = tiny_config(organism, tmp_path / "run")
    tree["project"] = {"gradient": gradient, **arms}
    found = compared(RunConfig.model_validate(tree))
    graph = RunGraph(found)
    blocks = [{graph.arm_settings(name)[half] for name in ("grasp", "random")} for half in ("gradient", "pin")]
    assert blocks == [{gradient}, {True}]


def test_arms_of_the_configuration_come_first_and_replace_those_of_their_name(config):
    config.project.arms["kl"] = config.project.arms["grasp"].model_copy(update={"rank": 2})
    found = compared(config)
    assert set(found.project.arms) == set(methods_for(config.training))
    assert found.project.arms["kl"].rank == 2
    assert found.project.arms["kl"].alternative is None
    assert found.report.name == "comparison"
    assert config.report.name == "report", "the configuration itself is as it was"


def test_the_control_is_never_left_out(config):
    assert list(compared(config, ["grasp", " kl"]).project.arms) == ["grasp", "kl", "random"]


def test_a_control_on_other_data_is_kept(config, tmp_path):
    """Found in review: it was left out, and then asked for."""
    arms = {"neutral": {"basis": "none", "data": config.data.path}}
    tree = config.model_dump(exclude={"project"}) | {"project": {"arms": arms}}
    assert list(compared(RunConfig.model_validate(tree), ["grasp"]).project.arms) == ["grasp", "random", "neutral"]


def test_a_method_that_is_none_is_refused(config):
    with pytest.raises(InputError, match="no method 'graps'; did you mean 'grasp'"):
        compared(config, ["graps"])
    with pytest.raises(InputError, match="a sweep varies one method"):
        compared(RunConfig.model_validate(config.model_dump() | {"tune": {"rank": [1, 2]}}))


def test_one_command_trains_measures_and_compares(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["training"]["seeds"] = [0, 1, 2]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = grasp_dist("compare", path, "--methods", "grasp,grasp_gradient,shorter,tail")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "run" / "report"
    assert f"comparison: {folder / 'comparison.html'}" in done.stdout
    found = json.loads((folder / "comparison.json").read_text())
    models = {model["model"]: model for model in found["models"]}
    assert set(models) == {"base", "naive", "ablation", "grasp", "grasp_gradient", "shorter", "tail", "random"}
    assert {row["model"] for row in csv.DictReader((folder / "comparison.csv").open())} == set(models)
    page = (folder / "comparison.html").read_text()
    assert "comparison.json" in page
    for settings in ("truncation, keep tail, rank 1", "steps 4"):
        assert f"<small>{settings}</small>" in page, "what tells an alternative from naive"
    # What is blocked is not written; the control is not kept off it.
    assert max(found["mean"] for found in models["grasp"]["written"]["inside"].values()) < 1e-9
    share = models["random"]["written"]["inside"]["write"]
    assert share["n"] == 3
    assert share["interval"][0] <= share["mean"] <= share["interval"][1]
    assert share["mean"] > 1e-3
    assert models["naive"]["hours"]["device"] in ("cpu", "cuda")
    for name in ("naive", "grasp"):
        hours = models[name]["seconds"] / 3600
        assert models[name]["hours"]["mean"] == pytest.approx(hours, rel=1e-6), "one process"
    again = grasp_dist("compare", path, "--methods", "grasp,grasp_gradient,shorter,tail")
    assert again.returncode == 0
    assert "step" not in again.stdout, "what was finished is kept"
    table = (folder / "comparison.md").read_text()
    assert re.search(r"^\| tail \|", table, re.MULTILINE)


def test_help_and_mistakes(organism, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(organism, tmp_path / "run")))
    done = grasp_dist("compare", path, "--methods", "grasp,cat")
    assert done.returncode == 2
    assert "did you mean 'caft'" in done.stderr
    assert not (tmp_path / "run").exists()
    done = grasp_dist("compare", "--help")
    assert "--methods" in done.stdout
    with pytest.raises(ValidationError):
        RunConfig.model_validate({})
