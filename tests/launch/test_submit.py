"""What a launch does before anything is submitted: it refuses with a remedy, or shows what it would do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch import preconditions, slurm
from grasp_dist.launch.cluster import cluster_names, load_cluster
from grasp_dist.launch.commands_launch import launch as launch_command
from grasp_dist.launch.records import Record, Submitted, make_folder, next_folder, read_records
from grasp_dist.launch.submit import launch
from grasp_dist.run_lock import RunLock, await_free
from grasp_dist.training.checkpoints.store import Checkpoints
from tests.test_run_lock import end, hold, leave_elsewhere
from tests.tiny_runs import grasp_dist

HERE = {"train": {"nodes": 1}}


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH on which there is no Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "python3"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")} if run.exists() else set()


@pytest.mark.parametrize("cluster", [name for name in cluster_names() if name not in ("ray", "local")])
def test_a_dry_run_needs_no_slurm_and_writes_nothing(write_config, tmp_path, capfd, no_slurm, cluster):
    assert launch(load_config(write_config()), cluster, dry_run=True) is None
    shown = capfd.readouterr().out
    assert _files(tmp_path / "run") == set()
    scripts = shown.split("#################### ")[1:]
    names = [Path(script.partition("\n")[0]).name for script in scripts]
    assert names == [f"{key}.sbatch" for key in ("naive", "detect", "project", "evaluate", "evaluate_others", "report")]
    for script in scripts:
        text = script.partition("\n")[2].removesuffix("####################\n")
        assert text.startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    _, settings = load_cluster(cluster)
    nodes = settings.train.nodes
    assert f"naive  naive/seed-0  {nodes} node" in shown
    assert "node-hours in all" in shown
    by_hand = shown[shown.index("# The same by hand:") : shown.index("#######")]
    assert (
        "evaluate=$(sbatch --parsable --dependency=afterok:${detect},aftercorr:${project} evaluate.sbatch)" in by_hand
    )


def test_without_slurm_nothing_is_submitted(write_config, tmp_path, no_slurm):
    with pytest.raises(InputError, match=r"there is no `sinfo` on this machine.*--cluster local"):
        launch(load_config(write_config()), "slurm-cpu", HERE)
    assert _files(tmp_path / "run") == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gpus_per_node": 4, "train": {"gpus_per_node": 8}}, "a node has 4"),
        ({"train": {"time": "00:02:00"}, "lead_seconds": 120}, "lead_seconds"),
        ({"partition": "gpu; touch x"}, "partition"),
        ({"environment": {"A": "x\ny"}}, "line break"),
        ({"partitoin": "gpu"}, "did you mean 'partition'"),
        ({"shared": ["/proc"]}, r"run_dir is .*none of the folders that every node of the cluster sees \(/proc\)"),
    ],
)
def test_a_cluster_that_cannot_be(write_config, overrides, message):
    with pytest.raises(InputError, match=message):
        launch(load_config(write_config()), "slurm-cpu", overrides, dry_run=True)


def test_an_unknown_cluster_and_launcher(write_config):
    config = load_config(write_config())
    with pytest.raises(InputError, match=r"no cluster 'slrum-cpu'.*slurm-cpu"):
        launch(config, "slrum-cpu", dry_run=True)
    with pytest.raises(InputError, match=r"no launcher 'sbtach': choose one of sbatch"):
        launch(config, "slurm-cpu", dry_run=True, launcher="sbtach")
    with pytest.raises(InputError, match=r"grasp-dist sweep CONFIG --cluster ray"):
        launch(config, "ray", dry_run=True)


@pytest.mark.parametrize("run_dir", ["/proc/run", "/dev/null/run"])
def test_a_run_directory_that_cannot_be_written(write_config, run_dir):
    if not os.path.lexists(Path(run_dir).parent):
        pytest.skip(f"needs {Path(run_dir).parent}")
    with pytest.raises(InputError, match="choose another run_dir"):
        launch(load_config(write_config(run_dir=run_dir)), "slurm-cpu", dry_run=Path(run_dir).parent.is_file())


def test_a_line_break_in_the_run_directory(write_config, tmp_path):
    with pytest.raises(InputError, match="line break or another control character"):
        launch(load_config(write_config(run_dir=str(tmp_path / "a\ntouch b"))), "slurm-cpu", dry_run=True)


def _save(root: Path, step: int, seconds: float) -> None:
    checkpoints = Checkpoints(root)
    checkpoints.commit(checkpoints.prepare(step), {"step": step, "seconds": seconds}, {})


def test_a_save_that_takes_longer_than_the_lead_time(write_config, tmp_path):
    config = load_config(write_config())
    RunGraph(config).claim()
    _save(tmp_path / "run" / "naive" / "seed-0" / "checkpoints", 10, seconds=400.0)
    _save(tmp_path / "run" / "naive" / "seed-0" / "checkpoints", 20, seconds=55.0)
    with pytest.raises(InputError, match=r"save of naive/seed-0 took 55 s, and 60 s are left.*lead_seconds 170"):
        launch(config, "slurm-cpu", {"lead_seconds": 60}, dry_run=True)
    launch(config, "slurm-cpu", {"lead_seconds": 62}, dry_run=True)


def test_a_lead_time_of_the_run_longer_than_the_clusters(write_config):
    config = load_config(write_config(checkpoint={"lead_seconds": 300}))
    with pytest.raises(InputError, match=r"checkpoint.lead_seconds is 300, but .* 120 s"):
        launch(config, "slurm-cpu", dry_run=True)


@pytest.fixture
def fake_slurm(monkeypatch) -> list[slurm.Queued]:
    """What a Slurm that takes everything has in its queue, cancelled jobs with it."""
    queue: list[slurm.Queued] = []

    def sbatch(script: str, *, folder: Path, options: Sequence[str] = ()) -> str:
        name = f"{folder.parent.parent.name}-{script.removesuffix('.sbatch')}"
        queue.append(slurm.Queued(str(len(queue) + 1), "PENDING", name, "", str(folder)))
        return queue[-1].job_id

    def scancel(job_ids: Iterable[str]) -> None:
        wanted = set(job_ids)
        queue[:] = [replace(job, state="CANCELLED") if job.job_id in wanted else job for job in queue]

    monkeypatch.setattr(slurm, "available", lambda command="sbatch": True)
    monkeypatch.setattr(slurm, "partitions", lambda: ["main"])
    monkeypatch.setattr(slurm, "queue", lambda: [job for job in queue if job.state == "PENDING"])
    monkeypatch.setattr(slurm, "sbatch", sbatch)
    monkeypatch.setattr(slurm, "scancel", scancel)
    monkeypatch.setattr(slurm, "show_job", lambda job_id: None)
    return queue


@pytest.mark.parametrize("cluster", ["slurm-cpu", "local"])
@pytest.mark.parametrize("part", [None, "naive/seed-0"])
def test_a_run_that_somebody_works_on(write_config, tmp_path, fake_slurm, cluster, part):
    """On all of it, or on one task, as a sweep and jobs do."""
    config = load_config(write_config())
    RunGraph(config).claim()
    other = hold(tmp_path / "run") if part is None else _hold_part(tmp_path / "run", part)
    with pytest.raises(
        InputError, match=rf"{part or 'the run directory'} .*in use by training of .*`kill {other.pid}`"
    ):
        launch(config, cluster)
    end(other)
    assert fake_slurm == []


def _hold_part(run: Path, part: str) -> subprocess.Popen[str]:
    program = (
        "import sys, time; from grasp_dist.run_lock import RunLock\n"
        "with RunLock(sys.argv[1], what='training', part=sys.argv[2]): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, run, part], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_process_whose_machine_died_does_not_block_for_ever(write_config, tmp_path, fake_slurm, monkeypatch, capfd):
    """It is watched for as long as `RunLock` would watch it, once, whatever it holds."""
    config = load_config(write_config())
    RunGraph(config).claim()
    monkeypatch.setattr(preconditions, "RunLock", partial(RunLock, patience=0.5))
    monkeypatch.setattr(preconditions, "await_free", partial(await_free, patience=0.5))
    for part in ("", "naive/seed-0", "detect"):
        leave_elsewhere(tmp_path / "run", part)
    assert launch(config, "slurm-cpu") is not None
    said = capfd.readouterr().out
    assert said.count("is locked by training of") == 3
    assert len(fake_slurm) == 6


def test_what_a_killed_job_has_left_is_not_waited_for(write_config, tmp_path, fake_slurm, monkeypatch):
    """Slurm knows that it has ended; of a job of another run, or one that runs, it does not say so."""
    config = load_config(write_config())
    RunGraph(config).claim()
    leave_elsewhere(tmp_path / "run", "naive/seed-0", slurm_job="7")
    monkeypatch.setattr(preconditions, "await_free", partial(await_free, patience=0.5))
    started = time.monotonic()
    for folder, state in ((tmp_path / "run" / "launch" / "1", "RUNNING"), (tmp_path / "launch" / "1", "FAILED")):
        monkeypatch.setattr(slurm, "show_job", lambda job_id, now=state, at=folder: {"JobState": now, "WorkDir": at})
        preconditions.check_nothing_runs(tmp_path / "run")
    assert time.monotonic() - started >= 1.0
    shown = {"JobState": "FAILED", "WorkDir": str(tmp_path / "run" / "launch" / "1")}
    monkeypatch.setattr(slurm, "show_job", lambda job_id: shown if job_id == "7" else None)
    monkeypatch.setattr(preconditions, "await_free", await_free)
    assert launch(config, "slurm-cpu") is not None


@pytest.mark.parametrize("through", ["run", "link"])
def test_what_was_submitted_by_hand_is_seen(write_config, tmp_path, fake_slurm, through):
    """Its id is in no record; and the run directory may have been given by a link of another name."""
    config = load_config(write_config())
    record = launch(config, "slurm-cpu")
    assert record is not None
    (tmp_path / "link").symlink_to(tmp_path / "run")
    slurm.scancel(record.job_ids)
    slurm.sbatch("naive.sbatch", folder=tmp_path / through / "launch" / "1")
    for run_dir in ("run", "link"):
        again = config.model_copy(update={"run_dir": str(tmp_path / run_dir)})
        with pytest.raises(InputError, match=rf"are still there: 7 \({through}-naive, PENDING\); .*`scancel 7`"):
            launch(again, "slurm-cpu")


def test_a_job_whose_id_did_not_come_back_is_taken_back(write_config, tmp_path, fake_slurm, monkeypatch):
    """sbatch is ended after a minute without an answer, and the controller has taken the job all the same."""
    submit = slurm.sbatch
    fake_slurm.append(slurm.Queued("100", "PENDING", "run-naive", "", str(tmp_path)))  # of other work

    def slow(script: str, **more: Any) -> str:
        job_id = submit(script, **more)
        if script == "project.sbatch":
            raise slurm.NoAnswer("`sbatch` has not answered within 60 s")
        return job_id

    monkeypatch.setattr(slurm, "sbatch", slow)
    message = (
        r"has not answered within 60 s; the jobs 2 \(naive\), 3 \(detect\), 4 \(run-project\) were submitted before, "
        r"and have been cancelled; one may still be on its way: .*`grasp-dist cancel "
    )
    with pytest.raises(InputError, match=message) as error:
        launch(load_config(write_config()), "slurm-cpu")
    assert "mend the cluster's file" not in str(error.value)
    assert [job.state for job in fake_slurm] == ["PENDING", "CANCELLED", "CANCELLED", "CANCELLED"]


def test_two_launches_at_once(write_config, tmp_path, fake_slurm, monkeypatch):
    """The second comes while the first is about to submit, and is refused."""
    path = write_config()
    submit, second = slurm.sbatch, []

    def beside(script: str, **more: Any) -> str:
        if not second:
            second.append(grasp_dist("launch", path, "--cluster", "local"))
        return submit(script, **more)

    monkeypatch.setattr(slurm, "sbatch", beside)
    assert launch(load_config(path), "slurm-cpu") is not None
    assert second[0].returncode == 2
    assert f"launch in {tmp_path / 'run'} is in use by launch of" in second[0].stderr
    assert [path.name for path in (tmp_path / "run" / "launch").iterdir()] == ["1"]


def test_the_launcher_debug_needs_no_slurm(write_config, no_slurm, monkeypatch):
    pytest.importorskip("submitit")
    started: list[bool] = []
    monkeypatch.setattr("grasp_dist.launch.submitit_jobs.run_in_order", lambda *rest, debug: started.append(debug))
    assert launch(load_config(write_config()), "slurm-cpu", launcher="debug") is not None
    assert started == [True]


def test_records_are_read_back(tmp_path):
    assert read_records(tmp_path) == []
    folder = make_folder(tmp_path)
    assert folder == tmp_path / "launch" / "1"
    assert next_folder(tmp_path) == tmp_path / "launch" / "2"
    jobs = (Submitted("project", "project", "train", ("a", "b"), ("detect",)),)
    record = Record(folder, "slurm-cpu", "sbatch", jobs).with_job("project", "12", "project.sbatch")
    record.write()
    assert read_records(tmp_path) == [record]
    assert json.loads((folder / "record.json").read_text())["jobs"][0] == {
        "key": "project",
        "stage": "project",
        "kind": "train",
        "tasks": ["a", "b"],
        "after": ["detect"],
        "after_each": None,
        "job_id": "12",
        "script": "project.sbatch",
        "logs": "logs",
        "name": None,
    }
    (folder / "record.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"record\.json cannot be read"):
        read_records(tmp_path)


@pytest.mark.slow
def test_a_local_cluster_runs_the_stages_here(write_config, tmp_path, capfd):
    config = load_config(write_config())
    record = launch(config, "local", {"train": {"tasks_per_node": 2}})
    assert record is not None
    assert record.launcher == "local"
    assert read_records(tmp_path / "run") == [record]
    assert "node-hours" not in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "naive" / "seed-0" / "manifest.json").read_text())["world_size"] == 2
    assert launch(config, "local") is None
    assert "everything is finished" in capfd.readouterr().out
    assert (record.folder / "config.yaml").is_file()
    assert yaml.safe_load((record.folder / "config.yaml").read_text())["checkpoint"]["lead_seconds"] is None


def test_the_command_hands_over_the_clusters_settings(write_config, monkeypatch):
    import typer

    from grasp_dist.config_files import split_overrides

    given = {}
    monkeypatch.setattr(
        "grasp_dist.launch.submit.launch", lambda config, *rest, **more: given.update(config=config, rest=rest, **more)
    )
    app = typer.Typer()
    app.command()(launch_command)
    words, tree = split_overrides([str(write_config()), "--cluster", "slurm-cpu", "--cluster.train.nodes", "4",
                                   "--training.steps", "9", "--dry-run"])  # fmt: skip
    app(args=words, obj=tree, standalone_mode=False)
    assert given["config"].training.steps == 9
    assert given["rest"] == ("slurm-cpu", {"train": {"nodes": 4}})
    assert given["dry_run"] is True
    assert given["launcher"] is None
