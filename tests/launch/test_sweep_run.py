"""The sweep without Ray, as a user runs it: killed, gone on with, and searched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.commands_sweep import placed
from grasp_dist.launch.sweep.grid import shared_tasks, trials_of
from grasp_dist.launch.sweep.run import SHARED, TRIAL, begin, finish, run_sweep, unfinished
from grasp_dist.run_lock import holder_of
from tests.launch.sweep_cases import made_up, write_scores
from tests.tiny_runs import grasp_dist, tiny_config


@pytest.fixture
def write(organism, tmp_path):
    def write(*, steps: int = 8, **tune: object) -> tuple[Path, Path]:
        tree = tiny_config(organism, tmp_path / "run")
        tree["training"] |= {"steps": steps}
        tree["detect"] = {"rounds": 4}
        tree["checkpoint"] = {"every": 10}
        tree["evaluate"] |= {"shift": False, "ablation": False}
        tree["tune"] = {"rank": [1, 2], "side": "write", "seed": [0, 1], **tune}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path, tmp_path / "run"

    return write


def manifests(run: Path, pattern: str = "**") -> dict[str, tuple[int, int]]:
    """{task: (starts, when it was last written)} of what is finished."""
    found = {}
    for path in run.glob(f"{pattern}/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["status"] == "finished":
            found[str(path.parent.relative_to(run))] = (manifest["starts"], path.stat().st_mtime_ns)
    return found


def test_what_follows_a_changed_setting_has_to_run_as_well(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    write_scores(config, lambda model, seed: (0.9, 0.1))
    assert unfinished(config, SHARED, shared_tasks(config)) == []
    config.training.steps += 1
    assert unfinished(config, SHARED, shared_tasks(config)) == shared_tasks(config)
    for trial in trials_of(config):
        assert unfinished(config, TRIAL, trial.tasks) == list(trial.tasks)


def test_a_combination_that_a_search_tried_and_that_failed_is_named(organism, tmp_path):
    config = made_up(organism, tmp_path / "run")
    RunGraph(config).claim()
    write_scores(config, lambda model, seed: (0.9, 0.1))
    failed, never = (f"project/write-k{rank}/seed-1" for rank in (4, 8))
    for task in RunGraph(config).tasks(("project",)):
        if task.name == failed:
            task.unit.fail("killed")
        if task.name == never:
            shutil.rmtree(task.unit.folder)
    with pytest.raises(InputError, match=f"not finished: {failed}, evaluate/write-k4/seed-1;"):
        finish(config, {"write-k1", "write-k4"}, command="sweep")
    shown = json.loads((tmp_path / "run" / "sweep" / "sweep.json").read_text())
    assert {row["name"]: len(row["seeds"]) for row in shown["combinations"]} == {
        "write-k1": 3, "write-k4": 2, "random-write-k8": 3
    }  # fmt: skip


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_repeats_nothing(write):
    config, run = write(steps=60)
    process = subprocess.Popen([sys.executable, "-m", "grasp_dist.cli", "sweep", str(config), "--no-ray"])
    deadline = time.monotonic() + 600
    while not (manifests(run, "evaluate/write-k2/*") and list(run.glob("project/random-*/*/metrics.jsonl"))):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = manifests(run)
    assert len([task for task in before if task.startswith("evaluate/write")]) == 2
    done = grasp_dist("sweep", config, "--no-ray")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial 1 of 4: random-write-k2-seed-0" in done.stdout
    after = manifests(run)
    assert {task: after[task] for task in before} == before
    assert [task for task, (starts, _) in after.items() if starts > 1] == ["project/random-write-k2/seed-0"]
    assert len([task for task in after if task.startswith("evaluate/")]) == 1 + 2 + 6
    shown = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [(row["name"], len(row["seeds"])) for row in shown["combinations"]] == [
        ("write-k1", 2), ("write-k2", 2), ("random-write-k2", 2)
    ]  # fmt: skip
    assert shown["commands"] == [f"grasp-dist sweep {config} --no-ray"]
    again = grasp_dist("sweep", config, "--no-ray")
    assert again.returncode == 0, again.stderr
    assert "trial 1" not in again.stdout
    assert manifests(run) == after
    report = grasp_dist("report", run / "config.yaml")
    assert report.returncode == 0, report.stderr


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_named_and_the_others_are_done(write):
    config, run = write(steps=100, seed=[0])
    command = [sys.executable, "-m", "grasp_dist.cli", "sweep", str(config), "--no-ray", "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while not list(run.glob("project/write-k1/seed-0/checkpoints/step-*/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    holder = holder_of(run, "project/write-k1/seed-0")
    assert holder is not None, "the trial ended before it could be killed"
    os.kill(holder[0].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "not finished: project/write-k1/seed-0, evaluate/write-k1/seed-0" in output
    shown = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [row["name"] for row in shown["combinations"]] == ["write-k2", "random-write-k2"]
    done = grasp_dist("sweep", config, "--no-ray", "--nproc", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "project/write-k1/seed-0 continued behind step" in done.stdout.replace("  ", " ")
    assert manifests(run)["project/write-k1/seed-0"][0] == 2


@pytest.mark.slow
def test_optuna_tries_some_and_the_run_holds_those(write):
    pytest.importorskip("optuna", reason="needs optuna")
    config, run = write(rank=[1, 2, 3, 4], seed=[0], search="optuna", trials=2)
    run_sweep(load_config(config), command="grasp-dist sweep")
    tried = {task.split("/")[1] for task in manifests(run, "evaluate/*/*")} - {"naive"}
    assert "random-write-k4" in tried
    assert 1 <= len(tried) - 1 <= 2
    assert set(load_config(run / "config.yaml").project.arms) == tried
    before = manifests(run)
    run_sweep(load_config(config), command="grasp-dist sweep")
    assert manifests(run) == before, "the same choices, which are finished"


def test_dry_run_checks_and_says_what_would_run(write, capsys):
    config, run = write()
    run_sweep(load_config(config), dry_run=True)
    said = capsys.readouterr().out
    assert "project/random-write-k2/seed-1: will run: not run yet" in said
    assert "2 combinations of side and rank x 2 seeds, with 1 arms beside them; one detection (warm, side both" in said
    assert not run.exists()


def test_no_tune_and_torchrun_are_refused(write, monkeypatch):
    config, _ = write()
    settings = load_config(config)
    with pytest.raises(InputError, match=r"give --tune\.rank 1,2,4,8"):
        begin(settings.model_copy(update={"tune": None}), dry_run=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        begin(settings, dry_run=True)


def test_where_the_trials_run(monkeypatch, capsys):
    assert placed(ray=False, cluster=None, overrides=None, nproc=2) == ("", None)
    name, named = placed(ray=None, cluster="ray", overrides={"address": "local"}, nproc=None)
    assert named is not None
    assert (name, named.kind, named.address) == ("ray", "ray", "local")
    _, slurm = placed(ray=True, cluster="slurm-cpu", overrides=None, nproc=None)
    assert slurm is not None
    assert slurm.kind == "slurm"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, here = placed(ray=True, cluster=None, overrides=None, nproc=3)
    assert isinstance(here, Cluster)
    assert (here.address, here.tasks_of("train")) == ("local", 3)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert placed(ray=None, cluster=None, overrides=None, nproc=None) == ("", None)
    assert "Ray is not installed: one trial after the other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ray": False, "cluster": "ray"}, "give one of them"),
        ({"cluster": "ray", "nproc": 2}, r"cluster\.train\.tasks_per_node"),
        ({"cluster": "slurm-cpu"}, "grasp-dist launch CONFIG --cluster slurm-cpu.*--ray starts Ray on nodes of it"),
        ({"cluster": "local"}, "grasp-dist launch CONFIG --cluster local"),
        ({"overrides": {"address": "local"}}, "name it with --cluster"),
        ({"cluster": "nowhere"}, "there is no cluster"),
    ],
)
def test_contradictions_are_refused(how, message):
    everything = {"ray": None, "cluster": None, "overrides": None, "nproc": None}
    with pytest.raises(InputError, match=message):
        placed(**(everything | how))


def test_ray_is_asked_for_and_missing(write, monkeypatch):
    from grasp_dist.launch.sweep.ray_trials import run_ray_sweep

    config, run = write()
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'grasp-dist\[ray\]'"):
        run_ray_sweep(load_config(config), Cluster(kind="ray", address="local"))
    assert not run.exists()
