"""A search of Optuna's in a real local Ray: combinations whose results are gone are tried again."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from tests.launch.ray_cases import finished
from tests.tiny_runs import tiny_config

pytest.importorskip("ray.tune", reason="needs ray[train,tune]")
pytest.importorskip("optuna", reason="needs optuna")


@pytest.mark.slow
def test_a_search_in_ray_goes_on_where_results_are_gone(organism, tmp_path, ray):
    tree = tiny_config(organism, tmp_path / "run")
    tree["detect"] = {"rounds": 4}
    tree["evaluate"] |= {"shift": False, "ablation": False}
    tree["tune"] = {"rank": [1, 2, 3, 4], "side": "write", "seed": [0], "search": "optuna", "trials": 2}
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree))

    def tried() -> set[str]:
        driver = ray.sweep(config)
        assert driver.wait(timeout=900) == 0, config.with_suffix(".log").read_text()[-3000:]
        return {task.split("/")[1] for task in finished(run, "evaluate/*-k*/seed-*")}

    before = tried()
    searched = before - {"random-write-k4"}
    assert (len(before) - len(searched), len(searched) in (1, 2)) == (1, True)
    shutil.rmtree(run / "project" / sorted(searched)[0])
    assert before <= tried()
    shown = json.loads((run / "sweep" / "sweep.json").read_text())
    assert shown["missing"] == []
