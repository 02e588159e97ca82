"""Random-weight models of many architectures through naive -> detect -> project -> evaluate on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from distributed import run_distributed
from tiny_models import ARCHITECTURES, WRITERS, tiny_model

from tests.tiny_runs import tiny_config

STAGES = ("naive", "detect", "project", "evaluate")
ARMS = {
    "grasp": {},
    "random": {"basis": "random"},
    "full": {"training": {"method": "full", "weight_decay": 0.1}},
}


def run_all(configs: list[str]) -> None:
    """On every rank: all stages of all configurations."""
    from grasp_dist.config_files import load_config
    from grasp_dist.stages import work

    for path in configs:
        work(load_config(path), STAGES)


@pytest.fixture(scope="module")
def runs(organism, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    configs = []
    for name in ARCHITECTURES:
        tiny_model(name).save_pretrained(root / name / "model")
        tree = tiny_config(organism, root / name / "run")
        tree["model"] = {"path": str(root / name / "model"), "tokenizer": str(organism / "model")}
        tree["training"] |= {"modules": "all", "steps": 4}
        tree["detect"] |= {"side": "both"}
        tree["project"] = {"arms": ARMS}
        (root / name / "config.yaml").write_text(yaml.safe_dump(tree))
        configs.append(str(root / name / "config.yaml"))
    run_distributed(run_all, 2, configs, timeout=900)
    return {name: root / name / "run" for name in ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stages_run_and_the_invariant_holds(runs, architecture):
    from grasp_dist import SpuriousBasis

    run = runs[architecture]
    basis = SpuriousBasis.load(run / "detect" / "basis.safetensors")
    layers = {weight.removesuffix(".weight") for weight in basis.weights}
    for writer in WRITERS[architecture]:
        assert any(name.endswith(writer) for name in layers)
    assert all(basis.sides(weight) == ("write", "read") for weight in basis.weights)
    base = json.loads((run / "evaluate" / "base" / "scores.json").read_text())
    for model in ("naive", *ARMS):
        scores = json.loads((run / "evaluate" / model / "seed-0" / "scores.json").read_text())
        assert scores["probes"]["task"]["loss"] < base["probes"]["task"]["loss"], model
        if model in ARMS:
            assert scores["residual"] <= 1e-6, model
