"""Metrics in the services that can be asked for, both without a network, beside what they are a picture of."""

from __future__ import annotations

import json
import sqlite3

import pytest
import torch
import yaml

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.tracking import Tracker
from tests.tiny_runs import grasp_dist, tiny_config

ALONE = Parallel("none", 0, 1, torch.device("cpu"))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


def configured(organism, tmp_path, **track):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(organism, tmp_path / "run") | {"track": track}))
    return path


def tracked(folder):
    """{run: {step: loss}} of all that trackio has in the folder; without the digest behind their names."""
    found = {}
    with sqlite3.connect(folder / "ours.db") as base:
        for run, step, metrics in base.execute("select run_name, step, metrics from metrics"):
            found.setdefault(run.partition(" ")[0], {})[step] = json.loads(metrics)["loss"]
    return found


def test_what_is_made_from_something_else_is_another_one(organism, tmp_path, monkeypatch):
    """Found in review: a fine-tune that is made again begins at step 1, which the services pass over."""
    settings = load_config(configured(organism, tmp_path, to="trackio", project="ours"))
    named = []
    monkeypatch.setattr("trackio.init", lambda **given: named.append(given["name"]))
    for made_from in ("a", "a", "b"):
        Tracker(settings, "naive", made_from=made_from).begin()
    assert named[0] == named[1] != named[2]


def test_a_run_in_trackio(organism, tmp_path, offline):
    done = grasp_dist("naive", configured(organism, tmp_path, to="trackio", project="ours"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/naive/seed-0/metrics.jsonl").read_text().splitlines()]
    assert tracked(offline)["run/naive/seed-0"] == pytest.approx({row["step"]: row["loss"] for row in lines})
    # Where the metrics go is no input of a task.
    again = grasp_dist("naive", configured(organism, tmp_path, to="wandb"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "naive/seed-0  step" not in again.stdout


@pytest.mark.parametrize("service", ["trackio", "wandb"])
def test_a_service_that_fails_in_mid_run_is_left(organism, tmp_path, offline, service, capsys):
    tracker = Tracker(load_config(configured(organism, tmp_path, to=service, project="ours")), "naive", made_from="a")
    (tmp_path / "run").mkdir()
    with Recorder(tmp_path / "run", ALONE, "naive", tracker) as recorder:
        recorder.begin(first_step=0, steps=4, log_every=4)
        recorder.log(1, loss=1.0)
        run = tracker._run
        tracker._run = _Broken()
        recorder.log(2, loss=0.5)
        recorder.log(3, loss=0.4)
        run.finish()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().out
    assert said.count("naive  no longer tracked: the network is gone") == 1
    if service == "wandb":
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


class _Broken:
    def log(self, metrics, step):
        raise ConnectionError("the network is gone")


def test_a_service_that_does_not_start_is_said(organism, tmp_path, offline):
    tracker = Tracker(load_config(configured(organism, tmp_path, to="wandb", project="a/b")), "naive", made_from="a")
    with pytest.raises(InputError, match="wandb does not start"):
        tracker.begin()


def test_a_package_that_is_missing_is_said_before_anything_is_read(organism, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from grasp_dist.training.tracking import check_tracker

    config = load_config(configured(organism, tmp_path, to="trackio"))
    with pytest.raises(InputError, match=r"track\.to: trackio is not installed; pip install trackio"):
        check_tracker(config.track)
