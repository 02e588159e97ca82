"""What a run is doing, as told from its directory: made here by the same parts that make it in a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph, Task
from grasp_dist.launch import slurm, watch
from grasp_dist.launch.records import Record, Submitted, make_folder
from grasp_dist.launch.status import JobStatus, RunReader, TaskStatus
from grasp_dist.manifest import file_hash
from grasp_dist.run_lock import RunLock
from tests.test_run_lock import end, hold, leave_elsewhere
from tests.tiny_runs import grasp_dist, tiny_config


@pytest.fixture
def graph(write_config) -> RunGraph:
    graph = RunGraph(load_config(write_config()))
    graph.claim()
    return graph


def _task(graph: RunGraph, name: str) -> Task:
    return next(task for task in graph.tasks() if task.name == name)


def _status(graph: RunGraph, name: str, jobs: dict[str, JobStatus] | None = None) -> TaskStatus:
    return next(status for status in RunReader(graph.root).read(jobs or {}) if status.name == name)


def _train(graph: RunGraph, rows: list[dict]) -> Task:
    task = _task(graph, "naive/seed-0")
    task.unit.start()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (task.unit.folder / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')  # and one that is being written
    return task


ROWS = [{"step": step, "steps": 20, "loss": 4.0 - step / 10, "seconds": 2.0 * step} for step in range(1, 6)]


def test_a_task_that_runs_says_how_far_it_is_and_when_it_will_be_done(graph):
    _train(graph, ROWS)
    with RunLock(graph.root, what="training", part="naive/seed-0"):
        status = _status(graph, "naive/seed-0")
    assert (status.state, status.step, status.steps, status.loss) == ("running", 5, 20, 3.5)
    assert status.seconds_left == pytest.approx(15 * 2.0)
    assert status.restarts == 0


def test_the_time_of_a_step_is_that_of_the_present_process(graph):
    """Its clock starts anew, and what was before it (here a hundred times slower) does not count."""
    before = [{**row, "step": row["step"] - 5, "seconds": 200.0 * row["step"]} for row in ROWS]
    _train(graph, [*before, *ROWS])
    with RunLock(graph.root, what="naive"):
        assert _status(graph, "naive/seed-0").seconds_left == pytest.approx(15 * 2.0)


def test_a_process_that_is_gone_leaves_a_stopped_task(graph):
    _train(graph, ROWS)
    _train(graph, ROWS)
    status = _status(graph, "naive/seed-0")
    assert (status.state, status.step, status.seconds_left, status.restarts) == ("stopped", 5, None, 1)


def test_a_failed_task_says_why_and_a_finished_one_where_it_ended(graph):
    task = _train(graph, ROWS)
    task.unit.fail("NonFiniteError: the loss of sample 7 is NaN")
    assert _status(graph, "naive/seed-0").state == "failed"
    assert _status(graph, "naive/seed-0").why == "NonFiniteError: the loss of sample 7 is NaN"
    task.unit.start()
    task.path.mkdir()
    task.unit.finish(outputs=["adapter"], metrics={"steps": 20}, world_size=1)
    done = _status(graph, "naive/seed-0")
    assert (done.state, done.step, done.steps, done.restarts) == ("finished", 20, 20, 1)
    assert _status(graph, "detect").state == "not started"


def test_what_a_changed_input_makes_stale_is_out_of_date(graph, organism):
    task = _task(graph, "naive/seed-0")
    task.unit.start()
    task.path.mkdir()
    task.unit.finish(outputs=["adapter"], metrics={}, world_size=1)
    saved = graph.root / "config.yaml"
    saved.write_text(saved.read_text().replace("steps: 8", "steps: 9"))
    status = _status(graph, "naive/seed-0")
    assert status.state == "out of date"
    assert "training.steps was 8, now 9" in status.why


@pytest.mark.parametrize(
    ("job", "state", "why"),
    [
        (JobStatus("7", "PENDING", "Dependency"), "waiting", "Dependency"),
        (JobStatus("7", "PENDING", "BeginTime", restarts=2), "waiting", "BeginTime"),
        (JobStatus("7", "NODE_FAIL", "on node2"), "failed", "node_fail (on node2)"),
        (JobStatus("7", "OUT_OF_MEMORY", "on node1"), "failed", "out_of_memory (on node1)"),
        (JobStatus("7", "CANCELLED", "DependencyNeverSatisfied"), "stopped", "cancelled (DependencyNeverSatisfied)"),
        (JobStatus("7", "COMPLETED"), "not started", ""),
    ],
)  # fmt: skip
def test_what_slurm_says_counts_where_the_directory_says_nothing(graph, job, state, why):
    status = _status(graph, "detect", {"detect": job})
    assert (status.state, status.why, status.job) == (state, why, "7")
    assert status.restarts == job.restarts


def test_a_job_that_was_killed_is_not_taken_for_one_that_runs(graph):
    _train(graph, ROWS)
    assert _status(graph, "naive/seed-0", {"naive/seed-0": JobStatus("7", "FAILED", "exit code 9:0")}).state == "failed"
    assert _status(graph, "naive/seed-0", {"naive/seed-0": JobStatus("7", "RUNNING")}).state == "running"


@pytest.mark.parametrize(
    ("job", "state", "why"),
    [
        (JobStatus("7", "OUT_OF_MEMORY", "on node1"), "failed", "out_of_memory (on node1)"),
        (JobStatus("7", "PENDING", "BeginTime"), "waiting", "BeginTime"),
        (JobStatus("7", "RUNNING"), "running", "elsewhere, pid "),
        (None, "running", "elsewhere, pid "),
    ],
)  # fmt: skip
def test_the_lock_that_a_killed_job_has_left_on_another_machine(graph, job, state, why):
    """Whose process cannot be seen from here: Slurm says whether it is gone."""
    _train(graph, ROWS)
    leave_elsewhere(graph.root, "naive/seed-0", silent=300, slurm_job="7")
    status = _status(graph, "naive/seed-0", {"naive/seed-0": job} if job else {})
    assert status.state == state
    assert status.why.startswith(why)
    assert ("silent for 300 s" in status.why) == (state == "running")


@pytest.mark.parametrize(("silent", "slurm_job"), [(20, "7"), (300, None)])
def test_a_process_elsewhere_that_may_be_alive_counts(graph, silent, slurm_job):
    """It beats, or belongs to no job: that an earlier job has ended says nothing of it."""
    _train(graph, ROWS)
    leave_elsewhere(graph.root, "naive/seed-0", silent=silent, slurm_job=slurm_job)
    assert _status(graph, "naive/seed-0", {"naive/seed-0": JobStatus("7", "FAILED")}).state == "running"


def test_a_run_of_relative_paths_is_read_from_any_directory(organism, tmp_path, monkeypatch):
    """They start where the run was started; what is finished stays so, and its inputs hash to the same."""
    tree = tiny_config(organism, Path("runs/mine"))
    tree["data"]["path"] = "train.jsonl"
    tree["project"] = {"arms": {"own": {"basis": "own.safetensors"}}}
    (tmp_path / "train.jsonl").symlink_to(organism / "train.jsonl")
    (tmp_path / "own.safetensors").write_text("a basis")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    graph = RunGraph(load_config("config.yaml"))
    graph.claim()
    for name in ("naive/seed-0", "project/own/seed-0"):
        task = _task(graph, name)
        task.unit.start()
        task.path.mkdir()
        task.unit.finish(outputs=["adapter"], metrics={"steps": 8}, world_size=1)
    (tmp_path / "other").mkdir()
    for directory, run in (("other", "../runs/mine"), (".", "runs/mine"), ("runs/mine", ".")):
        monkeypatch.chdir(tmp_path / directory)
        found = {status.name: status.state for status in RunReader(Path(run)).read({})}
        assert (found["naive/seed-0"], found["project/own/seed-0"]) == ("finished", "finished")
        assert Path.cwd() == tmp_path / directory


def test_a_second_look_hashes_nothing_that_stayed_as_it_was(graph, organism, monkeypatch, tmp_path):
    task = _task(graph, "naive/seed-0")
    task.unit.start()
    task.path.mkdir()
    task.unit.finish(outputs=["adapter"], metrics={}, world_size=1)
    data = tmp_path / "own.jsonl"
    data.write_text((organism / "train.jsonl").read_text())
    saved = graph.root / "config.yaml"
    saved.write_text(saved.read_text().replace(str(organism / "train.jsonl"), str(data)))
    hashed: list[Path] = []
    monkeypatch.setattr("grasp_dist.graph.file_hash", lambda path: hashed.append(path) or file_hash(path))
    reader = RunReader(graph.root)
    assert reader.read({})[0].state == "finished"
    assert data in hashed
    hashed.clear()
    assert reader.read({})[0].state == "finished"
    assert not hashed
    data.write_text("another line\n")
    assert reader.read({})[0].state == "out of date"
    assert data in hashed


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        RunReader(tmp_path).read({})


def test_the_commands(graph, tmp_path):
    _train(graph, ROWS).unit.fail("InputError: a reason")
    shown = grasp_dist("status", graph.root)
    assert shown.returncode == 1
    assert "naive/seed-0 failed: InputError: a reason" in shown.stdout
    record = json.loads(grasp_dist("status", graph.root, "--json").stdout)
    assert record["tasks"][0]["state"] == "failed"
    for command, message in (
        (["logs", graph.root], "naive/seed-0 has no log"),
        (["logs", graph.root, "navie/seed-0"], "did you mean 'naive/seed-0'?"),
        (["status", Path(tmp_path) / "nowhere"], "is not a run directory"),
    ):
        done = grasp_dist(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    assert "nothing of" in grasp_dist("cancel", graph.root).stdout


class Slurm:
    """What Slurm answers, and what it was told to cancel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[slurm.Queued] = []
        self.ended: dict[str, slurm.Finished] = {}
        self.shown: dict[str, dict[str, str]] = {}
        self.cancelled: list[str] = []
        self.asked: list[str] = []
        for name, answer in {
            "available": lambda command="sbatch": True,
            "queue": lambda: self.queued,
            "finished": lambda ids: self.ended if list(ids) else {},
            "show_jobs": lambda job_id: self.asked.append(job_id) or self.shown,
            "scancel": self.cancelled.extend,
        }.items():
            monkeypatch.setattr(slurm, name, answer)


@pytest.fixture
def fake_slurm(monkeypatch) -> Slurm:
    return Slurm(monkeypatch)


def _launched(run: Path, job_id: str = "7", *, tasks: tuple[str, ...] = ("naive/seed-0",), name: str = "run") -> Record:
    folder = make_folder(run)
    (folder / "naive.sbatch").write_text("")
    job = Submitted("naive", "naive", "train", tasks, job_id=job_id, script="naive.sbatch", name=f"{name}-naive")
    record = Record(folder, "test", "sbatch", (job,))
    record.write()
    return record


def test_jobs_of_the_same_id_that_are_somebody_elses_work(graph, fake_slurm):
    """Of another cluster, or of this one before it began to count anew: neither shown nor cancelled."""
    _launched(graph.root)
    fake_slurm.queued = [slurm.Queued("7", "RUNNING", "thesis", "", "/home/me")]
    assert watch.jobs_of(graph.root) == {}
    assert list(watch.cancel(graph.root, RunReader(graph.root).read({}), everything=True)) == []
    fake_slurm.queued = []
    fake_slurm.ended = {"7": slurm.Finished("FAILED", "1:0", "node1", "None", "thesis")}
    fake_slurm.shown = {"7": {"JobName": "thesis", "JobState": "FAILED"}}
    assert watch.jobs_of(graph.root) == {}
    fake_slurm.ended = {"7": slurm.Finished("FAILED", "1:0", "node1", "None", "run-naive")}
    assert watch.jobs_of(graph.root) == {"naive/seed-0": JobStatus("7", "FAILED", "exit code 1:0, on node1")}
    fake_slurm.ended = {"7": slurm.Finished("CANCELLED", "0:0", "", "Dependency", "run-naive")}
    assert watch.jobs_of(graph.root)["naive/seed-0"].reason == "Dependency"
    assert fake_slurm.cancelled == []


def test_a_job_submitted_by_hand_takes_the_recorded_ones_place(graph, fake_slurm):
    """By its folder, through whatever link that was named; when it has ended, by its log."""
    record = _launched(graph.root, "7", tasks=("naive/seed-0", "naive/seed-1"))
    link = graph.root.with_name("link")
    link.symlink_to(graph.root)
    fake_slurm.queued = [slurm.Queued("9_1", "PENDING", "link-naive", "Priority", str(link / "launch" / "1"))]
    assert watch.jobs_of(graph.root) == {"naive/seed-1": JobStatus("9_1", "PENDING", "Priority")}
    waiting = TaskStatus("naive/seed-1", "waiting", "")
    assert list(watch.cancel(graph.root, [waiting])) == ["naive/seed-1: job 9_1 cancelled"]
    assert fake_slurm.cancelled == ["9_1"]
    fake_slurm.queued = [slurm.Queued("10", "RUNNING", "of my own", "", str(record.folder))]
    assert list(watch.cancel(graph.root, [waiting])) == []
    assert list(watch.cancel(graph.root, [waiting], everything=True)) == ["of my own: job 10 cancelled"]
    fake_slurm.queued = []
    for log in ("naive-7_0-r2.log", "naive-7_1-r3.log", "naive-9_1-r0.log"):
        (record.folder / "logs" / log).write_text("")
    assert watch.newest_log(graph.root, "naive/seed-1").name == "naive-9_1-r0.log"
    fake_slurm.ended = {f"{job}_{number}": slurm.Finished("TIMEOUT", "0:0", "node1", "None", "run-naive")
                        for job in (7, 9) for number in (0, 1)}  # fmt: skip
    assert {name: job.job for name, job in watch.jobs_of(graph.root).items()} == {
        "naive/seed-0": "7_0",
        "naive/seed-1": "9_1",
    }


def test_slurm_is_asked_once_for_all_elements_of_an_array(graph, fake_slurm):
    tasks = tuple(f"naive/seed-{seed}" for seed in range(40))
    _launched(graph.root, tasks=tasks)
    facts = {"JobName": "run-naive", "JobState": "CANCELLED", "Reason": "None", "NodeList": "", "ExitCode": "0:15"}
    fake_slurm.shown = {f"7_{seed}": {**facts, "Restarts": str(seed)} for seed in range(40)}
    found = watch.jobs_of(graph.root)
    assert fake_slurm.asked == ["7"]
    assert found["naive/seed-33"] == JobStatus("7_33", "CANCELLED", "exit code 0:15", 33)


def test_cancel_stops_what_runs_in_the_foreground_though_its_earlier_job_is_known(graph, fake_slurm):
    """And what cannot be stopped is said behind what was."""
    _launched(graph.root)
    _train(graph, ROWS)
    fake_slurm.ended = {"7": slurm.Finished("FAILED", "1:0", "node1", "None", "run-naive")}
    holder = hold(graph.root)
    leave_elsewhere(graph.root, "detect", silent=20)
    found = RunReader(graph.root).read(watch.jobs_of(graph.root))
    said: list[str] = []
    with pytest.raises(InputError, match=r"training of .* on elsewhere.* runs on another machine; stop it there"):
        said.extend(watch.cancel(graph.root, found))
    assert said == [f"naive/seed-0: asked process {holder.pid} to save and stop"]
    assert holder.wait(20) == -15
    end(holder)
    assert fake_slurm.cancelled == []
    leave_elsewhere(graph.root, "detect", silent=500)
    (line,) = watch.cancel(graph.root, RunReader(graph.root).read({}))
    assert "silent for 500 s; the next start will take its place" in line


def test_a_slurm_that_does_not_answer_is_a_line_of_the_status(graph, tmp_path, monkeypatch):
    _launched(graph.root)
    _train(graph, ROWS).unit.fail("InputError: a reason")
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "scontrol", "sacct", "scancel"):
        (tmp_path / "bin" / name).write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    shown = grasp_dist("status", graph.root)
    assert shown.returncode == 1
    assert "naive/seed-0 failed: InputError: a reason" in shown.stdout
    assert "without what Slurm knows: `squeue " in shown.stdout
    assert "Unable to contact slurm controller" in shown.stdout
    as_json = grasp_dist("status", graph.root, "--json")
    assert json.loads(as_json.stdout)["tasks"][0]["state"] == "failed"
    assert "Unable to contact" in as_json.stderr
    stopped = grasp_dist("cancel", graph.root)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    assert "Unable to contact" in stopped.stderr


def test_the_log_of_a_task_that_submitit_runs_on_this_machine(graph):
    """It starts them one after the other, in the order of the record."""
    folder = make_folder(graph.root)
    tasks = {"naive": "naive/seed-0", "detect": "detect", "report": "report"}
    jobs = tuple(Submitted(stage, stage, "train", (task,)) for stage, task in tasks.items())
    Record(folder, "local", "submitit", jobs).write()
    (folder / "submitit").mkdir()
    for number, process in enumerate((412, 87)):
        pickle = folder / "submitit" / f"{process}_submitted.pkl"
        pickle.write_text("")
        os.utime(pickle, (1000 + number,) * 2)
        (folder / "submitit" / f"{process}_0_log.out").write_text("")
    assert watch.newest_log(graph.root, "naive/seed-0").name == "412_0_log.out"
    assert watch.newest_log(graph.root, "detect").name == "87_0_log.out"
    assert watch.newest_log(graph.root, "report") is None
