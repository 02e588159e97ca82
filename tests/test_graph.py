"""The run graph: which tasks there are, what makes one stale, and what a run directory refuses."""

import json

import pytest

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph


@pytest.fixture
def make_config(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "probe.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def make(**sections) -> RunConfig:
        tree = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model)},
            "data": {"path": str(tmp_path / "train.jsonl")},
            "training": {"seeds": [0, 1], "steps": 3},
            "evaluate": {"probes": [{"name": "task", "role": "task", "path": str(tmp_path / "probe.jsonl")}]},
        }
        return RunConfig.model_validate({**tree, **sections})

    return make


def finish(task, content="x"):
    task.unit.start()
    if task.path.suffix:
        task.path.write_text(content)
    else:
        task.path.mkdir(exist_ok=True)
        (task.path / "weights.bin").write_text(content)
    task.unit.finish(outputs=[task.output], metrics={}, world_size=1)


def finish_all(config):
    for task in RunGraph(config).tasks():
        finish(task, task.name)


def stale(config):
    return {task.name: reason for task, reason in RunGraph(config).plan() if reason}


def test_tasks_in_order(make_config):
    names = [task.name for task in RunGraph(make_config()).tasks()]
    assert names == [
        "naive/seed-0",
        "naive/seed-1",
        "detect",
        "project/grasp/seed-0",
        "project/grasp/seed-1",
        "project/random/seed-0",
        "project/random/seed-1",
        "evaluate/base",
        "evaluate/naive/seed-0",
        "evaluate/naive/seed-1",
        "evaluate/grasp/seed-0",
        "evaluate/grasp/seed-1",
        "evaluate/random/seed-0",
        "evaluate/random/seed-1",
        "evaluate/ablation/seed-0",
        "evaluate/ablation/seed-1",
        "report",
    ]


def test_nothing_runs_twice(make_config):
    config = make_config()
    assert len(stale(config)) == 17
    finish_all(config)
    assert stale(config) == {}


def test_speed_settings_do_not_invalidate(make_config):
    finish_all(make_config())
    faster = make_config(training={"seeds": [0, 1], "steps": 3, "micro_batch_size": 1, "log_every": 1})
    assert stale(faster) == {}


def test_a_projection_setting_reruns_projection_and_what_follows_only(make_config):
    finish_all(make_config())
    reasons = stale(make_config(project={"rank": 2}))
    assert "naive/seed-0" not in reasons
    assert "detect" not in reasons
    assert reasons["project/grasp/seed-0"] == "its inputs changed: arm.rank was null, now 2"
    assert reasons["evaluate/grasp/seed-0"] == "follows project/grasp/seed-0"
    assert "evaluate/naive/seed-0" not in reasons
    assert "report" in reasons


def test_another_seed_adds_only_its_own_tasks(make_config):
    finish_all(make_config())
    reasons = stale(make_config(training={"seeds": [0, 1, 2], "steps": 3}))
    assert {name for name in reasons if not name.endswith("seed-2")} == {"report"}


def test_changed_data_reruns_everything_trained_on_it(make_config, tmp_path):
    finish_all(make_config())
    (tmp_path / "train.jsonl").write_text('{"text": "other"}\n')
    reasons = stale(make_config())
    assert reasons["naive/seed-0"].startswith("its inputs changed: data.content")
    assert "detect" in reasons
    assert "evaluate/base" in reasons  # its shift is measured along the new basis


def test_an_upstream_result_that_came_out_the_same_stops_the_chain(make_config):
    config = make_config()
    finish_all(config)
    graph = RunGraph(config)
    naive = graph.naive_task(0)
    naive.unit.start()  # interrupted on a rerun
    assert set(stale(config)) == {"naive/seed-0", "evaluate/naive/seed-0", "evaluate/ablation/seed-0", "report"}
    finish(naive, naive.name)
    assert stale(config) == {}


def test_one_shot_arms_add_a_detection_task_that_follows_naive(make_config):
    config = make_config(project={"arms": {"grasp": {}, "one": {"basis": "one_shot"}}})
    tasks = {task.name: task for task in RunGraph(config).tasks()}
    assert [up.name for up in tasks["detect_one_shot"].upstream] == ["naive/seed-0"]
    assert [up.name for up in tasks["project/one/seed-1"].upstream] == ["detect_one_shot"]


def test_a_stage_without_its_upstream_says_what_to_run(make_config):
    graph = RunGraph(make_config())
    task = next(iter(graph.tasks(("project",))))
    with pytest.raises(InputError, match="grasp-dist detect CONFIG"):
        graph.require(task)


def test_an_upstream_result_of_other_settings_is_not_used(make_config):
    """Found in review: `project` alone took a basis that other detect settings had made."""
    finish_all(make_config())
    graph = RunGraph(make_config(detect={"rounds": 4}))
    task = next(iter(graph.tasks(("project",))))
    with pytest.raises(InputError, match=r"detect\.rounds was 32, now 4"):
        graph.require(task)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_the_tokenizer_counts_as_an_input(make_config, tmp_path, name):
    finish_all(make_config())
    (tmp_path / "model" / name).write_text("changed")
    assert stale(make_config())["naive/seed-0"].startswith("its inputs changed: model")


def test_a_run_directory_belongs_to_one_model_and_data_set(make_config, tmp_path):
    config = make_config()
    RunGraph(config).claim()
    RunGraph(config).claim()
    (tmp_path / "other.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(InputError, match=r"was made with data\.path .*train\.jsonl.*choose another run_dir"):
        RunGraph(make_config(data={"path": str(tmp_path / "other.jsonl")})).claim()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not a run directory"):
        RunGraph(make_config(run_dir=str(stranger))).claim()


def test_a_missing_file_is_named(make_config, tmp_path):
    (tmp_path / "probe.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*probe\.jsonl"):
        RunGraph(make_config()).plan()


def test_a_basis_that_is_no_file_is_named_with_its_arm(make_config):
    config = make_config(project={"arms": {"grasp": {"basis": "detectd"}}})
    with pytest.raises(InputError, match=r"project.arms.grasp.basis: .*; did you mean 'detected'"):
        RunGraph(config).plan()


def test_files_of_one_name_in_two_folders_of_tasks_both_count(make_config, tmp_path):
    """Found in review: the second hid changes of the first."""
    for name in ("a", "b", "__pycache__"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "utils.py").write_text(name)
    harness = {"tasks": ["mine"], "include_path": str(tmp_path / "tasks")}
    probes = make_config().evaluate.model_dump()["probes"]

    def inputs():
        config = make_config(evaluate={"probes": probes, "harness": harness})
        return next(task.unit.inputs for task in RunGraph(config).tasks() if task.stage == "evaluate")

    before = inputs()
    (tmp_path / "tasks" / "__pycache__" / "utils.py").write_text("compiled")
    assert inputs() == before
    (tmp_path / "tasks" / "a" / "utils.py").write_text("changed")
    assert inputs() != before


def test_plan_survives_json(make_config):
    """Inputs go through JSON on their way to the manifest; what JSON changes must not look like a change."""
    for task in RunGraph(make_config()).tasks():
        assert json.loads(json.dumps(task.unit.inputs)) == task.unit.inputs
