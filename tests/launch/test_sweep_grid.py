"""A sweep's configuration: what it expands to, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from grasp_dist.config import RunConfig
from grasp_dist.config_files import load_config, save_config, split_overrides
from grasp_dist.errors import InputError
from grasp_dist.launch.sweep.grid import arms_of, expand, restrict, shared_tasks, trials_of
from tests.tiny_runs import tiny_config


def config(tune: dict | None, **sections: dict) -> RunConfig:
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}, "detect": {"rounds": 16}}
    return RunConfig.model_validate(tree | sections | {"tune": tune})


def test_lists_are_read_from_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    words = "--tune.rank 1,2,4,8 --tune.side write,both --tune.seed 0,1,2"
    rest, tree = split_overrides(["sweep", str(path), *words.split()])
    assert rest == ["sweep", str(path)]
    tune = load_config(path, tree).tune
    assert tune is not None
    assert (tune.rank, tune.side, tune.seed) == ([1, 2, 4, 8], ["write", "both"], [0, 1, 2])
    single = load_config(path, {"tune": {"rank": 4}}).tune
    assert single is not None
    assert (single.rank, single.side, single.seed) == ([4], None, None)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"rank": "1,x"}, "tune.rank.1: Input should be a valid integer"),
        ({"rank": "0,1"}, "tune.rank.0"),
        ({"rank": []}, "tune.rank"),
        ({"rank": "1,1"}, "values must differ"),
        ({"rank": 1, "side": "wirte"}, "tune.side.0"),
        ({"rank": 1, "seeds": [1]}, "unknown key 'tune.seeds'; did you mean 'seed'"),
        ({"rank": 1, "search": "optuna"}, "tune.trials None"),
        ({"rank": 1, "trials": 3}, "belongs to it alone"),
        ({"side": "write"}, "'tune.rank' is missing"),
    ],
)
def test_bad_values_are_refused(tmp_path, tune, message):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(InputError) as error:
        load_config(path, {"tune": tune})
    assert message in str(error.value)


def test_without_tune_nothing_changes():
    plain = config(None)
    assert expand(plain) is plain


def test_one_arm_per_side_and_rank_with_its_seeds_and_controls():
    expanded = expand(config({"rank": [8, 1], "side": ["write", "both"], "seed": [3, 4]}))
    names = ["write-k1", "write-k8", "both-k1", "both-k8", "random-write-k8", "random-both-k8"]
    assert list(expanded.project.arms) == names
    assert [(arm.name, arm.side, arm.rank, arm.control) for arm in arms_of(expanded)] == [
        ("write-k1", "write", 1, False),
        ("write-k8", "write", 8, False),
        ("both-k1", "both", 1, False),
        ("both-k8", "both", 8, False),
        ("random-write-k8", "write", 8, True),
        ("random-both-k8", "both", 8, True),
    ]
    assert expanded.training.seeds == [3, 4]
    assert expanded.tune is None
    trials = trials_of(expanded)
    assert [trial.name for trial in trials[:2]] == ["write-k1-seed-3", "write-k8-seed-3"]
    assert len(trials) == 12
    assert trials[0].tasks == ("project/write-k1/seed-3", "evaluate/write-k1/seed-3")


def test_a_control_for_every_rank_where_asked():
    expanded = expand(config({"rank": [1, 2], "side": "write", "controls": "every"}))
    assert [arm.name for arm in arms_of(expanded) if arm.control] == ["random-write-k1", "random-write-k2"]


def test_what_is_expanded_reads_back_and_expands_to_itself(tmp_path):
    tune = {"rank": [1, 2], "side": ["write"], "seed": [0]}
    expanded = expand(config(tune))
    save_config(expanded, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", {"tune": tune})
    assert expand(again) == expanded


def test_detection_is_raised_to_every_side_and_to_the_largest_rank():
    one_shot = config({"rank": [4, 8], "side": "write,read"}, detect={"method": "one_shot", "side": "read", "rank": 2})
    assert (expand(one_shot).detect.rank, expand(one_shot).detect.side) == (8, "both")
    enough = config({"rank": [2], "side": "write"}, detect={"method": "one_shot", "side": "write", "rank": 4})
    assert (expand(enough).detect.rank, expand(enough).detect.side) == (4, "write")
    warm = config({"rank": [4], "side": "both"}, detect={"side": "write", "rounds": 4})
    assert expand(warm).detect.side == "both"
    both = config({"rank": [4], "side": "write"}, detect={"side": "both", "rounds": 4})
    assert expand(both).detect.side == "both", "less than was asked for is not detected"


@pytest.mark.parametrize(
    ("tune", "sections", "message"),
    [
        ({"rank": [1, 17]}, {}, "set detect.rounds to 17, or sweep ranks up to 16"),
        ({"rank": 9}, {"detect": {"rounds": 2, "directions_per_round": 4}}, "set detect.rounds to 3"),
        ({"rank": 9}, {"detect": {"method": "one_shot"}}, "raise training.lora.rank"),
        ({"rank": 1, "arm": "gasp"}, {}, "none of project.arms: grasp, random"),
        ({"rank": 1, "arm": "random"}, {}, "sets random controls beside it by itself"),
        ({"rank": 1}, {"project": {"arms": {"plain": {"basis": "none"}}}}, "add one, e.g. `grasp: {}`"),
        ({"rank": 1, "search": "optuna", "trials": 1}, {}, "cannot be planned ahead"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_remedy(tune, sections, message):
    with pytest.raises(InputError) as error:
        expand(config(tune, **sections))
    assert message in str(error.value)


def test_the_varied_arms_own_settings_stay():
    full = {"method": "full", "learning_rate": 1e-4}
    arms = {"control": {"basis": "random"}, "full": {"pin": False, "training": full}, "other": {}}
    naive = {"full_naive": {"basis": "none", "training": full}, "lora_naive": {"basis": "none"}}
    expanded = expand(config({"rank": [2], "side": "write"}, project={"arms": arms | naive}))
    assert list(expanded.project.arms) == ["write-k2", "random-write-k2", "full_naive"]
    for name in ("write-k2", "random-write-k2"):
        assert expanded.project.arms[name].training == full
        assert expanded.project.arms[name].pin is False
    chosen = expand(config({"rank": [2], "side": "write", "arm": "other"}, project={"arms": arms | naive}))
    assert list(chosen.project.arms) == ["write-k2", "random-write-k2"]
    assert chosen.project.arms["write-k2"].training == {}


def test_shared_tasks_are_all_that_no_trial_does(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["tune"] = {"rank": [1, 2], "side": "write", "seed": [0, 1]}
    expanded = expand(RunConfig.model_validate(tree))
    assert shared_tasks(expanded) == [
        "naive/seed-0",
        "naive/seed-1",
        "detect",
        "evaluate/base",
        "evaluate/naive/seed-0",
        "evaluate/naive/seed-1",
        "evaluate/ablation/seed-0",
        "evaluate/ablation/seed-1",
    ]
    some = restrict(expanded, {"write-k2", "random-write-k2"})
    assert list(some.project.arms) == ["write-k2", "random-write-k2"]


def test_every_recipe_that_detects_can_be_swept():
    for recipe in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        expanded = expand(load_config(recipe, {"tune": {"rank": "1,2,4"}}))
        assert len([arm for arm in arms_of(expanded) if not arm.control]) == 3
