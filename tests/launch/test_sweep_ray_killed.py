"""The sweep in a real local Ray: drivers and workers are killed, and nothing that was finished is done again."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch.ray_cases import finished, in_training, wait
from tests.tiny_runs import tiny_config

pytest.importorskip("ray.tune", reason="needs ray[train,tune]")


@pytest.mark.slow
@pytest.mark.timeout(2400)  # each trial starts seven processes of Ray's
def test_killed_drivers_and_workers_lose_nothing(organism, tmp_path, ray):
    """5 ranks x 2 seeds, with a random control: the driver is killed twice, a worker once."""
    tree = tiny_config(organism, tmp_path / "run")
    tree["training"] |= {"steps": 120}
    tree["detect"] = {"rounds": 5}
    tree["checkpoint"] = {"every": 20}
    tree["evaluate"] |= {"shift": False, "ablation": False}
    tree["tune"] = {"rank": [1, 2, 3, 4, 5], "side": "write", "seed": [0, 1]}
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree))
    tasks, scores = "project/*/seed-*", "evaluate/*-k*/seed-*"
    kept: list[dict[str, int]] = []

    def starts() -> dict[Path, int]:
        return {path.parent: json.loads(path.read_text())["starts"] for path in run.glob("**/manifest.json")}

    def kill_driver(driver: subprocess.Popen[str]) -> None:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        kept.append(finished(run, "**/*"))
        ray.await_end()

    driver = ray.sweep(config)
    wait(lambda: len(finished(run, scores)) >= 2 and in_training(run), driver)
    kill_driver(driver)

    driver = ray.sweep(config)
    hit, pid = wait(lambda: in_training(run), driver)
    begun = starts()[run / hit]
    worker = psutil.Process(pid)
    worker.kill()
    worker.wait(60)
    wait(lambda: hit in finished(run, tasks), driver)
    wait(lambda: len(finished(run, scores)) >= 6 and in_training(run), driver)
    kill_driver(driver)

    driver = ray.sweep(config)
    assert driver.wait(timeout=900) == 0, config.with_suffix(".log").read_text()[-3000:]

    assert len(finished(run, "evaluate/write-k*/seed-*")) == 10
    assert len(finished(run, "evaluate/random-write-k5/seed-*")) == 2
    for before in kept:
        now = {task: (run / task / "manifest.json").stat().st_mtime_ns for task in before}
        assert now == before, "a finished task was done again"
    made = starts()
    assert made[run / "detect"] == 1
    assert made[run / hit] == begun + 1
    # What was at work when a driver was killed, and the worker.
    assert sum(made.values()) - len(made) <= 1 + 2 * 2 * 2
    steps = [json.loads(line)["step"] for line in (run / hit / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    shown = json.loads((run / "sweep" / "sweep.json").read_text())
    assert [len(row["seeds"]) for row in shown["combinations"]] == [2] * 6
    ray.await_end()
