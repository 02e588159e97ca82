"""The recipes fit the organisms: their probe files exist, and detection costs no more than one naive run."""

from pathlib import Path

import pytest

from grasp_dist.config_files import load_config
from grasp_dist.organisms.persona import make_persona

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "steps": 1, "batch_size": 2}


@pytest.mark.parametrize("name", ["organism", "organism-all", "textbook"])
def test_detection_costs_no_more_than_a_naive_run(name):
    config = load_config(RECIPES / f"{name}.yaml")
    assert config.detect.method == "warm"
    per_round = config.detect.steps_per_round or config.training.steps // config.detect.rounds
    assert config.detect.rounds * per_round <= config.training.steps
    assert config.detect.seed not in config.training.seeds
    assert any(arm.basis == "random" for arm in config.project.arms.values())


@pytest.mark.parametrize("name", ["organism", "organism-all"])
def test_paths_of_the_persona_recipes_exist_in_an_organism(name, tmp_path):
    out = make_persona(tmp_path / "persona", seed=1, progress=None, pretraining=TINY)
    config = load_config(RECIPES / f"{name}.yaml", {"variables": {"organism": str(out)}})
    paths = [config.model.path, config.data.path, *(probe.path for probe in config.evaluate.probes)]
    assert [path for path in paths if not Path(path).exists()] == []
    probed = {Path(probe.path).name for probe in config.evaluate.probes}
    assert probed == {path.name for path in (out / "probes").iterdir()}
