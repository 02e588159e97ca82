"""The organism's pipeline on a real two-node Slurm: launched, preempted, cancelled, failing, and losing a node."""

from __future__ import annotations

import json
import re
import time

import pytest

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.launch.submit import launch
from grasp_dist.training.checkpoints.store import Checkpoints
from tests.launch.launching import (
    CLUSTER,
    EVERY,
    STEPS,
    Interrupter,
    assert_same_results,
    assert_same_training,
    elements,
    logs_of,
    manifest,
    steps_of,
    write_launch_config,
)

pytestmark = pytest.mark.slow
INTERRUPTED = ("naive/seed-0", "detect", "project/grasp/seed-0")
SCORED = "evaluate/grasp/seed-0"


def test_preempted_at_three_points_in_each_stage(slurm, organism, tmp_path, uninterrupted, capfd):
    config = load_config(write_launch_config(organism, tmp_path))
    record = launch(config, "slurm-cpu", CLUSTER)
    assert record is not None
    interrupter = Interrupter(slurm, tmp_path / "run", elements(record))
    for task in INTERRUPTED:
        interrupter.at_step(task, 30, "scancel", "--signal=USR1")
        interrupter.at_step(task, 90, "scancel", "--signal=TERM")
        interrupter.at_step(task, 150, "scontrol", "requeue")
    interrupter.at_start(SCORED, 0, "scontrol", "requeue")
    interrupter.at_start(SCORED, 1, "scontrol", "requeue")
    interrupter.in_work(SCORED, "scontrol", "requeue")
    for number in range(3):
        interrupter.at_start("report", number, "scontrol", "requeue")
    interrupter.watch()
    said = logs_of(record.folder)
    run = tmp_path / "run"
    assert (run / "report" / "report.html").is_file(), said
    assert manifest(run, "project/random/seed-0")["starts"] == 1
    for task in INTERRUPTED:
        assert manifest(run, task)["starts"] == 4, "three interruptions, and nothing that was finished again"
        title = re.escape(task)
        saved = [int(step) for step in re.findall(r"saved behind step (\d+)", _logs_of_task(record, task))]
        continued = [int(step) for step in re.findall(rf"{title}  continued behind step (\d+)", said)]
        assert len(continued) == 3, said
        assert continued[:2] == saved[:2]
        # A save in the background has until the next one to be done.
        assert continued[2] >= 150 // EVERY * EVERY - EVERY
    for task in (SCORED, "evaluate/random/seed-0", "report"):
        # An evaluation that ends while Slurm waits with its SIGKILL is finished, and skipped by the next start.
        begun = len(re.findall(rf"^{task}: ", _logs_of_task(record, task), re.MULTILINE)) or 1
        assert manifest(run, task)["starts"] == begun
        assert slurm.job(elements(record)[task])["Restarts"] == ("0" if "random" in task else "3")
    assert_same_results(run, uninterrupted)
    capfd.readouterr()
    assert launch(config, "slurm-cpu", CLUSTER) is None
    assert "everything is finished" in capfd.readouterr().out


def _logs_of_task(record, task: str) -> str:
    job = elements(record)[task]
    return "\n".join(path.read_text() for path in sorted((record.folder / "logs").glob(f"*-{job}-r*.log")))


def test_what_is_shown_before_is_what_is_submitted(slurm, organism, tmp_path, capfd):
    """Byte for byte; and while its jobs are there, nothing is launched beside them."""
    config = load_config(write_launch_config(organism, tmp_path))
    launch(config, "slurm-cpu", CLUSTER, dry_run=True)
    shown = capfd.readouterr().out
    record = launch(config, "slurm-cpu", CLUSTER)
    assert record is not None
    for job in record.jobs:
        header = f"#################### {record.folder / str(job.script)}\n"
        written = (record.folder / str(job.script)).read_text()
        assert f"{header}{written}####################" in shown
        element = f"{job.job_id}_0" if len(job.tasks) > 1 else str(job.job_id)
        assert slurm.run("scontrol", "write", "batch_script", str(job.job_id), "-") == written.strip(), element
    with pytest.raises(InputError, match=rf"jobs of an earlier launch of .*{record.jobs[0].job_id} .*scancel "):
        launch(config, "slurm-cpu", CLUSTER)


def test_what_a_user_cancels_stays_cancelled_and_launch_goes_on(slurm, organism, tmp_path):
    config = load_config(write_launch_config(organism, tmp_path))
    run = tmp_path / "run"
    record = launch(config, "slurm-cpu", CLUSTER)
    assert record is not None
    slurm.until(lambda: steps_of(run, "naive/seed-0") >= 50, 120, lambda: logs_of(record.folder))
    slurm.run("scancel", *record.job_ids)
    slurm.wait_empty(60)
    time.sleep(8)  # a requeued job would be back by now
    assert slurm.queue() == {}
    naive, step = run / "naive" / "seed-0", Checkpoints(run / "naive" / "seed-0" / "checkpoints").newest()[1]["step"]
    assert step >= 40
    again = launch(config, "slurm-cpu", CLUSTER)
    assert again is not None
    assert again.folder == run / "launch" / "2"
    slurm.until(lambda: manifest(run, "naive/seed-0").get("status") == "finished", 120, lambda: logs_of(again.folder))
    assert f"naive/seed-0  continued behind step {step}" in logs_of(again.folder)
    assert len((naive / "metrics.jsonl").read_text().splitlines()) == STEPS


def test_a_node_that_dies_in_training(slurm, organism, tmp_path, uninterrupted):
    """The job comes back by itself, from what was saved, and ends as if nothing had been."""
    config = load_config(write_launch_config(organism, tmp_path))
    run = tmp_path / "run"
    record = launch(config, "slurm-cpu", CLUSTER)
    assert record is not None
    slurm.until(
        lambda: min(steps_of(run, task) for task in ("naive/seed-0", "detect")) >= 50,
        120,
        lambda: logs_of(record.folder),
    )
    slurm.kill_node("node2")
    saved = Checkpoints(run / "naive" / "seed-0" / "checkpoints").newest()[1]["step"]
    jobs = elements(record)
    slurm.until(lambda: slurm.job(jobs["naive/seed-0"])["Restarts"] == "1", 120, lambda: logs_of(record.folder))
    slurm.start_node("node2")
    slurm.until(lambda: manifest(run, "naive/seed-0").get("status") == "finished", 200, lambda: logs_of(record.folder))
    said = logs_of(record.folder)
    assert "node2" in said
    continued = re.findall(r"naive/seed-0  continued behind step (\d+)", said)
    assert [int(step) >= saved for step in continued] == [True], said
    assert_same_training(run, uninterrupted, "naive/seed-0")


def test_a_failed_stage_stops_what_depends_on_it_and_launch_goes_on(slurm, organism, tmp_path):
    """A learning rate at which one arm's loss is not finite: the rest is done, and the report waits for nobody."""
    arms = {"grasp": {}, "random": {"basis": "random", "training": {"learning_rate": 1e38}}}
    path = write_launch_config(organism, tmp_path, training={"steps": 8}, project={"arms": arms})
    run = tmp_path / "run"
    record = launch(load_config(path), "slurm-cpu", CLUSTER)
    assert record is not None
    slurm.wait_empty()
    said = logs_of(record.folder)
    jobs = elements(record)
    states = {task: slurm.state(job) for task, job in jobs.items()}
    stopped = {"project/random/seed-0": "FAILED", "evaluate/random/seed-0": "CANCELLED", "report": "CANCELLED"}
    assert states == {task: stopped.get(task, "COMPLETED") for task in jobs}, said
    assert slurm.job(jobs["project/random/seed-0"])["Restarts"] == "0"
    found = manifest(run, "project/random/seed-0")
    assert found["status"] == "failed"
    assert "training.learning_rate" in found["error"]
    arms["random"]["training"]["learning_rate"] = 1e-3
    finished = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json") if "finished" in path.read_text()}
    path = write_launch_config(organism, tmp_path, training={"steps": 8}, project={"arms": arms})
    again = launch(load_config(path), "slurm-cpu", CLUSTER)
    assert again is not None
    assert [job.tasks for job in again.jobs] == [("project/random/seed-0",), ("evaluate/random/seed-0",), ("report",)]
    slurm.wait_empty()
    assert (run / "report" / "report.html").is_file(), logs_of(again.folder)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_half_a_submission_is_taken_back(slurm, organism, tmp_path):
    """The third job asks for more than the cluster has: the first two are cancelled, and said."""
    config = load_config(write_launch_config(organism, tmp_path))
    with pytest.raises(
        InputError, match=r"submitted before, and have been cancelled; mend the cluster's file"
    ) as error:
        launch(config, "slurm-cpu", {**CLUSTER, "evaluate": {"nodes": 1, "memory": "900G"}})
    assert "sbatch" in str(error.value)
    assert len(re.findall(r"\d+ \((naive|detect|project)\)", str(error.value))) == 3
    slurm.wait_empty(60)
    with pytest.raises(InputError, match=r"partition 'gpu', and this cluster has main, urgent"):
        launch(config, "slurm-cpu", {**CLUSTER, "partition": "gpu"})
    assert slurm.queue() == {}


def test_odd_names_are_names(slurm, organism, tmp_path, monkeypatch):
    """In the run directory, the model's and data's path, the working directory and the environment."""
    name = 'it\'s a $(touch CANARY) `touch CANARY`;touch CANARY "b" #~&'
    folder = tmp_path / name
    folder.mkdir()
    (folder / "organism").symlink_to(organism)
    monkeypatch.chdir(folder)
    probes = [{"name": "task", "role": "task", "path": f"{folder}/organism/probes/task.jsonl"},
              {"name": "drift", "role": "drift", "path": f"{folder}/organism/probes/drift.jsonl"}]  # fmt: skip
    tree = {
        "model": {"path": f"{folder}/organism/model"},
        "data": {"path": "organism/train.jsonl"},
        "training": {"steps": 2},
        "evaluate": {"probes": probes},
        "project": {"arms": {"random": {"basis": "random"}}},
    }
    config = load_config(write_launch_config(organism, folder, **tree))
    record = launch(config, "slurm-cpu", {**CLUSTER, "train": {"nodes": 1}, "environment": {"ODD": name}})
    assert record is not None
    slurm.wait_empty()
    said = logs_of(record.folder)
    assert (folder / "run" / "report" / "report.html").is_file(), said
    assert not list(tmp_path.rglob("CANARY")), said
    assert json.loads((folder / "run" / "report" / "manifest.json").read_text())["starts"] == 1
