"""submitit as the launcher: in this process, on this machine, and on a real Slurm, with the same results and saves."""

from __future__ import annotations

import pickle
import re
import subprocess
from pathlib import Path

import pytest

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError, Preempted
from grasp_dist.launch.submit import launch
from grasp_dist.launch.submitit_jobs import StageTask
from tests.launch.launching import (
    CLUSTER,
    EVERY,
    Interrupter,
    assert_same_results,
    elements,
    logs_of,
    manifest,
    steps_of,
    write_launch_config,
)

submitit = pytest.importorskip("submitit")


def test_there_is_nothing_that_submitits_handler_could_call():
    task = StageTask("config.yaml", "naive", "naive/seed-0")
    assert not hasattr(task, "checkpoint")
    assert not hasattr(task, "__submitit_checkpoint__")
    again = pickle.loads(pickle.dumps(task))
    assert (again.config, again.stage, again.task) == ("config.yaml", "naive", "naive/seed-0")


def test_a_dry_run_shows_what_submitit_would_submit(write_config, capfd):
    assert launch(load_config(write_config()), "slurm-cpu", CLUSTER, dry_run=True, launcher="submitit") is None
    shown = capfd.readouterr()
    scripts = dict(part.split("\n", 1) for part in shown.out.split("#################### ")[1:])
    assert [Path(name).name for name in scripts] == [
        "naive",
        "detect",
        "project",
        "evaluate",
        "evaluate_others",
        "report",
    ]
    text = next(text for name, text in scripts.items() if name.endswith("/project"))
    for line in ("nodes=2", "ntasks-per-node=1", "requeue", "kill-on-invalid-dep=yes", "signal=USR2@60", "time=240"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --dependency='afterok:${detect}'" in text
    assert "#SBATCH --array=0-1%2" in text
    assert "--output=all --kill-on-bad-exit=0 --wait=60 " in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "warning" not in shown.err


def test_short_jobs_are_warned_about(write_config, capfd):
    short = {**CLUSTER, "light": {"time": "00:10:00"}}
    launch(load_config(write_config()), "slurm-cpu", short, dry_run=True, launcher="submitit")
    assert "warning: report: jobs of ten minutes or less count as timed out" in capfd.readouterr().err


def test_debug_runs_in_this_process_in_order(organism, tmp_path, capfd, monkeypatch):
    """And an error is raised, without a debugger that would wait for somebody."""
    monkeypatch.setattr("sys.stdin", None)
    config = load_config(write_launch_config(organism, tmp_path, training={"steps": 2}, detect={"rounds": 2}))
    record = launch(config, "local", launcher="debug")
    assert record is not None
    assert record.launcher == "debug"
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    order = re.findall(r"^(\S+): in this process$", capfd.readouterr().out, re.MULTILINE)
    assert order[:2] == ["naive/seed-0", "detect"]
    assert order[-1] == "report"
    tree = {"training": {"steps": 3, "learning_rate": 1e38}, "detect": {"rounds": 2}}
    with pytest.raises(InputError, match="the loss is nan"):
        launch(load_config(write_launch_config(organism, tmp_path, **tree)), "local", launcher="debug")


def test_a_debugged_task_that_is_asked_to_stop_says_so(organism, tmp_path, monkeypatch):
    import signal

    config = load_config(write_launch_config(organism, tmp_path))
    monkeypatch.setattr("grasp_dist.tasks.worker.stop_requested", lambda: True)
    with pytest.raises(Preempted):
        launch(config, "local", launcher="debug")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@pytest.mark.slow
def test_local_processes_one_task_after_the_other(organism, tmp_path):
    config = load_config(write_launch_config(organism, tmp_path, training={"steps": 4}, evaluate={"ablation": False}))
    record = launch(config, "local", {"train": {"tasks_per_node": 2}}, launcher="submitit")
    assert record is not None
    assert record.launcher == "submitit"
    run = tmp_path / "run"
    assert (run / "report" / "report.html").is_file()
    assert manifest(run, "naive/seed-0")["world_size"] == 2
    assert manifest(run, "evaluate/base")["world_size"] == 1
    assert launch(config, "local", launcher="submitit") is None


@pytest.mark.slow
def test_a_task_that_fails_here_shows_the_end_of_its_log(organism, tmp_path):
    config = load_config(write_launch_config(organism, tmp_path, training={"steps": 4, "learning_rate": 1e38}))
    with pytest.raises(InputError, match=r"naive/seed-0 failed; the end of its log(.|\n)*the loss is nan"):
        launch(config, "local", launcher="submitit")
    assert manifest(tmp_path / "run", "naive/seed-0")["status"] == "failed"


@pytest.mark.slow
def test_the_pipeline_on_slurm_preempted_in_each_stage(slurm, organism, tmp_path, uninterrupted):
    """By a signal to the processes, by the signal that submitit itself would answer, and by a requeue."""
    config = load_config(write_launch_config(organism, tmp_path))
    record = launch(config, "slurm-cpu", CLUSTER, launcher="submitit")
    assert record is not None
    assert record.launcher == "submitit"
    for job in record.jobs:
        assert (record.folder / str(job.script)).is_file()
    run, jobs = tmp_path / "run", elements(record)
    with pytest.raises(InputError, match="jobs of an earlier launch"):
        launch(config, "slurm-cpu", CLUSTER, launcher="submitit")
    interrupter = Interrupter(slurm, run, jobs)
    for task in ("naive/seed-0", "project/grasp/seed-0"):
        interrupter.at_step(task, 30, "scancel", "--signal=USR2")
        interrupter.at_step(task, 90, "scancel", "--signal=TERM")
        interrupter.at_step(task, 150, "scontrol", "requeue")
    interrupter.at_step("detect", 90, "scancel", "--signal=USR2")
    interrupter.at_start("evaluate/base", 0, "scontrol", "requeue")
    interrupter.watch()
    said = logs_of(record.folder)
    assert (run / "report" / "report.html").is_file(), said
    for task, starts in {"naive/seed-0": 4, "project/grasp/seed-0": 4, "detect": 2, "project/random/seed-0": 1}.items():
        assert manifest(run, task)["starts"] == starts, said
    for task in ("naive/seed-0", "project/grasp/seed-0"):
        own = "".join(path.read_text() for path in sorted((record.folder / "logs").glob(f"*-{jobs[task]}-r*.log")))
        saved = [int(step) for step in re.findall(r"saved behind step (\d+)", own)]
        continued = [int(step) for step in re.findall(r"continued behind step (\d+)", own)]
        assert continued[:2] == saved[:2]
        # A save in the background has until the next one to be done.
        assert continued[2] >= 150 // EVERY * EVERY - EVERY
        assert "Caught signal" not in own
    assert_same_results(run, uninterrupted)
    for task, job in jobs.items():
        result = pickle.loads((record.folder / "submitit" / f"{job}_0_result.pkl").read_bytes())
        assert result == ("success", task)
    assert launch(config, "slurm-cpu", CLUSTER, launcher="submitit") is None


@pytest.mark.slow
def test_what_a_user_cancels_on_slurm_stays_cancelled(slurm, organism, tmp_path):
    config = load_config(write_launch_config(organism, tmp_path))
    record = launch(config, "slurm-cpu", CLUSTER, launcher="submitit")
    assert record is not None
    slurm.until(lambda: steps_of(tmp_path / "run", "naive/seed-0") >= 30, 120, lambda: logs_of(record.folder))
    slurm.run("scancel", *record.job_ids)
    slurm.wait_empty(60)
    assert {slurm.state(str(job.job_id)) for job in record.jobs if len(job.tasks) == 1} == {"CANCELLED"}


@pytest.mark.slow
def test_a_failure_on_slurm_stops_what_depends_on_it(slurm, organism, tmp_path):
    """Of a folder with an odd name; the result that submitit keeps says what it was."""
    folder = tmp_path / "it's a `touch CANARY` $(touch CANARY)"
    folder.mkdir()
    config = load_config(write_launch_config(organism, folder, training={"steps": 4, "learning_rate": 1e38}))
    record = launch(config, "slurm-cpu", CLUSTER, launcher="submitit")
    assert record is not None
    slurm.wait_empty(200)
    jobs = elements(record)
    said = logs_of(record.folder)
    states = {task: slurm.state(job) for task, job in jobs.items()}
    assert states == {task: "FAILED" if task in ("naive/seed-0", "detect") else "CANCELLED" for task in jobs}, said
    assert "naive/seed-0 failed with exit code 2" in said
    outcome, trace = pickle.loads((record.folder / "submitit" / f"{jobs['naive/seed-0']}_0_result.pkl").read_bytes())
    assert outcome == "error"
    assert "the loss is nan" in trace
    assert not list(tmp_path.rglob("CANARY"))
