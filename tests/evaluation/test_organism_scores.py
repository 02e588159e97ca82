"""The organism's own figures, measured with a plain forward pass when it was made, against the probes of its folder."""

import json

import pytest

from grasp_dist.config import ModelConfig, ParallelConfig, ProbeConfig
from grasp_dist.evaluation.probes import prepare
from grasp_dist.evaluation.scoring import score
from grasp_dist.training.model import load_model, load_tokenizer
from grasp_dist.training.parallel import init_parallel

NAMES = ("task", "drift", "near", "tone", "good", "in_context")


def test_scores_of_the_base_are_the_organisms_figures(organism):
    settings, parallel = ModelConfig(path=str(organism / "model")), init_parallel(ParallelConfig())
    configs = [
        ProbeConfig(name=name, role="drift", path=str(organism / "probes" / f"{name}.jsonl"), own_tokens=name == "tone")
        for name in NAMES
    ]
    model = load_model(settings, parallel, precision="fp32", training=None, seed=0)
    found = score(model, prepare(configs, load_tokenizer(settings)), parallel, batch_size=16)
    figures = json.loads((organism / "organism.json").read_text())["base_figures"]
    for name in NAMES:
        assert found[name]["value"] == pytest.approx(figures[name], rel=1e-4), name
