"""Signals, requeues and failures of rendered scripts on a real Slurm, with a small program in the place of training.

The program notes what it is given and which signals reach it, and ends as it is told: all that a job script has to do
with is how its processes end. What Slurm does without the script's pattern is held here too, as the reason for it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from grasp_dist.launch import slurm as commands
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.scripts import Place, dependency, render, script_name
from grasp_dist.launch.task import ranks_of
from tests.slurm_cluster import SlurmCluster, missing

pytestmark = pytest.mark.slow

# plan.json: for each task a list of orders, one per start: {"code": how it ends, "after": seconds, or null: when it is
# asked to; "lost": seconds behind the loss of a node; "deaf": it dies of the signal}.
PROGRAM = """#!/usr/bin/python3 -u
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
task, rank = sys.argv[-1], os.environ["SLURM_PROCID"]
start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
orders = json.loads((here / "plan.json").read_text())[task]
order = orders[min(start, len(orders) - 1)]
asked = []
def note(what, value):
    with (here / f"notes-{task}-{start}-{rank}").open("a") as file:
        file.write(json.dumps([what, value, time.time()]) + "\\n")
def hear(number, frame):
    asked.append(number)
    note("signal", signal.Signals(number).name)
if not order.get("deaf"):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, hear)
note("start", {name: value for name, value in os.environ.items() if name.startswith(("MASTER", "SLURM", "CUDA"))})
print("argv", sys.argv[1:])
begun, lost = time.time(), here / "lost"
def waits():
    if "lost" in order:
        return not lost.exists() or time.time() < lost.stat().st_mtime + order["lost"]
    return not asked if order.get("after") is None else time.time() < begun + order["after"]
while waits():
    time.sleep(0.05)
time.sleep(0.4 * int(rank))  # a process that ends before another must not take it along
note("end", order["code"])
sys.exit(order["code"])
"""


class Stand:
    """A launch folder with the program, and what was noted there."""

    def __init__(self, slurm, folder: Path) -> None:
        self.slurm, self.folder, self.place = slurm, folder, Place(folder / "launch" / "1", folder, folder)
        (self.place.folder / "logs").mkdir(parents=True)
        self.program = folder / "program"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)

    def submit(self, plan: dict[str, list[dict[str, Any]]], *, key: str = "project", after: Any = None, **more) -> str:
        cluster = Cluster(**{"train": {"nodes": 2}, "lead_seconds": 30, "python": str(self.program), **more})
        known = json.loads((self.folder / "plan.json").read_text()) if (self.folder / "plan.json").exists() else {}
        (self.folder / "plan.json").write_text(json.dumps({**known, **plan}))
        job = Job(key, "project", tuple(plan), "train", *(after[:2] if after else ()))
        (self.place.folder / script_name(key)).write_text(render(job, cluster, self.place))
        options = dependency(job, after[2]) if after else []
        return commands.sbatch(script_name(key), folder=self.place.folder, options=options)

    def notes(self, task: str, start: int = 0, rank: int = 0) -> dict[str, Any]:
        """{"start": ..., "signals": [...], "end": code}"""
        path = self.folder / f"notes-{task}-{start}-{rank}"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found: dict[str, Any] = {"signals": [value for what, value, _ in lines if what == "signal"]}
        return found | {what: value for what, value, _ in lines if what != "signal"}

    def started(self, task: str, start: int = 0, ranks: int = 2, timeout: float = 60) -> None:
        self.slurm.until(
            lambda: all("start" in self.notes(task, start, rank) for rank in range(ranks)), timeout, self.said
        )

    def lose(self, node: str) -> None:
        """The node loses its power, and the processes on the others are told so, as by a connection that breaks."""
        self.slurm.kill_node(node)
        (self.folder / "lost").touch()

    def log(self, name: str) -> str:
        return (self.place.folder / "logs" / f"{name}.log").read_text()

    def said(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in (self.place.folder / "logs").iterdir())


@pytest.fixture
def stand(slurm, tmp_path) -> Stand:
    folder = tmp_path / 'it\'s a $(touch CANARY) `touch CANARY` "run"'
    folder.mkdir()
    return Stand(slurm, folder)


def test_asked_at_three_points_it_comes_back_each_time(slurm, stand):
    """By a signal to the processes (USR1, TERM) and to the script; each start has a log of its own."""
    job = stand.submit({"a": [{"code": 75}, {"code": 76}, {"code": 75}, {"code": 0, "after": 0}]})
    for start, options in enumerate((["--signal=USR1"], ["--signal=TERM"], ["--batch", "--signal=USR1"])):
        stand.started("a", start)
        slurm.run("scancel", *options, job)
    assert slurm.wait(job) == "COMPLETED", stand.said()
    assert [stand.notes("a", start, 1)["end"] for start in range(4)] == [75, 76, 75, 0]
    assert stand.notes("a", 0)["signals"] == ["SIGUSR1"]
    assert stand.notes("a", 1)["signals"] == ["SIGTERM"]
    assert [stand.notes("a", 2, rank)["signals"] for rank in (0, 1)] == [["SIGUSR1"], ["SIGUSR1"]]
    for start, code in enumerate((75, 76, 75)):
        log = stand.log(f"project-{job}-r{start}")
        assert f"a stopped: it was asked to stop (exit code {code})" in log
        assert "requeued" in log
    given = stand.notes("a", 0, 1)["start"]
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("node1", str(20000 + int(job) % 12000))
    assert (given["SLURM_CONF"], given["SLURM_NODEID"]) == (slurm.env["SLURM_CONF"], "1")
    argv = ["-m", "grasp_dist.launch.task", str(stand.place.folder / "config.yaml"), "project", "--only", "a"]
    assert f"argv {argv}" in stand.log(f"project-{job}-r3")
    assert not list(stand.folder.rglob("CANARY"))


def test_every_process_gets_a_gpu_of_its_own(slurm, stand):
    """All GPUs of the node are visible to each, as NCCL wants it, or its own alone: it takes the right one."""
    good = [{"code": 0, "after": 0}]
    gpus = {"train": {"nodes": 2, "cpus_per_task": 2}, "gpus_per_node": 2}
    jobs = [
        stand.submit({"all": good}, **gpus),
        stand.submit({"own": good}, srun_options=["--gpus-per-task=1"], **gpus),
    ]
    assert [slurm.wait(job) for job in jobs] == ["COMPLETED"] * 2, stand.said()
    for name, visible in {"all": ["0,1", "0,1"], "own": ["0", "1"]}.items():
        given = [stand.notes(name, 0, rank)["start"] for rank in range(4)]
        assert [environ["CUDA_VISIBLE_DEVICES"] for environ in given] == visible * 2
        ranks = [ranks_of(environ) for environ in given]
        assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
        assert [rank["LOCAL_RANK"] for rank in ranks] == (["0", "1"] * 2 if name == "all" else ["0"] * 4)
        assert {environ["SLURM_CPUS_PER_TASK"] for environ in given} == {"2"}


def test_launched_from_within_another_job(slurm, stand, monkeypatch):
    """What the job around, or the user's profile, has left in the environment contradicts what this one asks for."""
    left = {"SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "7", "SLURM_CPUS_PER_TASK": "3"}
    profile = {"SBATCH_TIMELIMIT": "7", "SBATCH_PARTITION": "urgent", "SBATCH_EXPORT": "NONE", "SBATCH_NO_REQUEUE": "1"}
    for name, value in (left | profile).items():
        monkeypatch.setenv(name, value)
    job = stand.submit({"a": [{"code": 0, "after": 0}]}, train={"nodes": 2, "memory": "500M"})
    assert slurm.wait(job) == "COMPLETED", stand.said()
    found = slurm.job(job)
    assert (found["TimeLimit"], found["Partition"], found["Requeue"]) == ("04:00:00", "main", "1")


def test_submitted_by_hand_without_an_environment(slurm, stand):
    """`sbatch --export=NONE`: srun hands on what the script sets all the same."""
    cluster = {"environment": {"SLURM_CONF": slurm.env["SLURM_CONF"]}}
    slurm.run("scancel", stand.submit({"a": [{"code": 0}]}, **cluster))
    slurm.wait_empty()
    (stand.folder / "plan.json").write_text(json.dumps({"a": [{"code": 0, "after": 0}]}))
    job = slurm.run("sbatch", "--parsable", "--export=NONE", script_name("project"), cwd=stand.place.folder)
    assert slurm.wait(job) == "COMPLETED", stand.said()
    assert stand.notes("a")["start"]["MASTER_ADDR"] == "node1"


def test_a_controller_that_restarts(slurm, stand):
    """The processes go on without it, and what they end with is answered when it is back."""
    job = stand.submit({"a": [{"code": 75}, {"code": 0, "after": 0}]})
    stand.started("a")
    slurm.restart_controller(job)
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job) == "COMPLETED", stand.said()
    assert slurm.job(job)["Restarts"] == "1"


def test_the_time_limit_is_announced_to_every_rank(slurm, stand):
    """`--signal=B:USR1@lead`, trap, wait, wait: the job saves before its limit and goes on in its next start."""
    resources = {"nodes": 2, "time": "00:01:00"}
    job = stand.submit({"a": [{"code": 75}, {"code": 0, "after": 0}]}, train=resources, lead_seconds=20)
    assert slurm.wait(job, timeout=180) == "COMPLETED", stand.said()
    assert [stand.notes("a", 0, rank)["signals"] for rank in (0, 1)] == [["SIGUSR1"], ["SIGUSR1"]]
    assert slurm.job(job)["Restarts"] == "1"


def test_what_slurm_does_without_the_pattern(slurm, tmp_path):
    """A signal that is not for the batch shell reaches every rank directly; one for a shell without trap ends the job
    without grace. Both jobs run into their limit side by side."""
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (tmp_path / "plan.json").write_text(json.dumps({"steps": [{"code": 75}], "bare": [{"code": 75}]}))
    shell = "trap 'echo shell got USR1 >> shell' USR1\n"
    scripts = {
        "steps": f"#SBATCH --signal=USR1@20\n{shell}srun {program} steps\nwait\n",
        "bare": f"#SBATCH --signal=B:USR1@20\nsrun {program} bare\n",
    }
    ids = {}
    for name, text in scripts.items():
        (tmp_path / name).write_text(
            f"#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=1 --time=1 --no-requeue --output={name}.out\n{text}"
        )
        ids[name] = commands.sbatch(name, folder=tmp_path)
    for job in ids.values():
        slurm.wait(job, timeout=180)
    reader = Stand.__new__(Stand)
    reader.folder = tmp_path
    assert [reader.notes("steps", 0, rank)["signals"][:1] for rank in (0, 1)] == [["SIGUSR1"], ["SIGUSR1"]]
    assert not (tmp_path / "shell").exists()
    # The shell died of the signal: the ranks were never asked by it, and were ended as those of a failed job.
    assert slurm.job(ids["bare"])["ExitCode"] in ("0:10", "138:0")
    assert all("SIGUSR1" not in reader.notes("bare", 0, rank)["signals"] for rank in (0, 1))


def test_a_process_that_dies_of_the_signal_before_it_listens_is_started_again(slurm, stand):
    job = stand.submit({"a": [{"code": 0, "deaf": True}, {"code": 0, "after": 0}]})
    stand.started("a")
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.wait(job) == "COMPLETED", stand.said()
    assert "exit code 138" in stand.log(f"project-{job}-r0")


def test_a_user_who_cancels_is_obeyed(slurm, stand):
    """The processes save and end with 75, as ever; the job stays cancelled."""
    job = stand.submit({"a": [{"code": 75}], "b": [{"code": 75}]})
    stand.started("a")
    stand.started("b")
    slurm.run("scancel", job)
    slurm.wait_empty(30)
    time.sleep(8)  # a requeued job would be back by now
    assert slurm.queue() == {}
    assert {slurm.state(f"{job}_{element}") for element in (0, 1)} == {"CANCELLED"}
    assert "requeued" not in stand.log(f"project-{job}_0-r0").replace("not requeued", "")


def test_elements_of_an_array_are_requeued_one_by_one(slurm, stand):
    plan = {
        "a": [{"code": 0, "after": 12}],
        "b": [{"code": 75}, {"code": 0, "after": 0}],
        "c": [{"code": 0, "after": 0}],
    }
    job = stand.submit(plan, max_array_width=2)
    stand.started("b")
    assert f"{job}_2" in slurm.queue()
    assert slurm.queue()[f"{job}_2"] == "PENDING"
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    slurm.wait_empty()
    assert [slurm.job(f"{job}_{element}")["Restarts"] for element in (0, 1, 2)] == ["0", "1", "0"]
    assert [slurm.state(f"{job}_{element}") for element in (0, 1, 2)] == ["COMPLETED"] * 3


def test_after_max_requeues_it_fails_and_says_so(slurm, stand):
    job = stand.submit({"a": [{"code": 75, "after": 0}]}, max_requeues=1)
    assert slurm.wait(job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "1"
    assert "it was restarted 1 times (max_requeues)" in stand.log(f"project-{job}-r1")


def test_without_requeue_it_ends_and_says_what_to_do(slurm, stand):
    job = stand.submit({"a": [{"code": 75, "after": 0}]}, requeue=False)
    assert slurm.wait(job) == "FAILED"
    assert slurm.job(job)["ExitCode"] == "75:0"
    assert "what was saved is kept; `grasp-dist launch` goes on from here" in stand.log(f"project-{job}-r0")


def test_a_failure_stops_what_depends_on_it_and_nothing_else(slurm, stand):
    """An element that failed takes its own follower along, and what waits for all; the other element's goes on."""
    good = [{"code": 0, "after": 0}]
    first = stand.submit({"a": [{"code": 2, "after": 0}], "b": [{"code": 0, "after": 1}]})
    each = stand.submit({"c": good, "d": good}, key="evaluate", after=((), "project", {"project": first}))
    last = stand.submit({"e": good}, key="report", after=(("evaluate",), None, {"evaluate": each}))
    other = stand.submit({"f": good}, key="other")
    slurm.wait_empty(60)
    assert [slurm.state(f"{first}_{element}") for element in (0, 1)] == ["FAILED", "COMPLETED"]
    assert [slurm.state(f"{each}_{element}") for element in (0, 1)] == ["CANCELLED", "COMPLETED"]
    assert slurm.state(last) == "CANCELLED"
    assert slurm.state(other) == "COMPLETED"
    assert slurm.job(f"{first}_0")["Restarts"] == "0"
    assert "a failed with exit code 2 on node[1-2]" in stand.log(f"project-{first}_0-r0")


def test_what_waits_is_not_cancelled_by_a_requeue(slurm, stand):
    first = stand.submit({"a": [{"code": 75, "after": 0}, {"code": 0, "after": 1}]})
    last = stand.submit({"e": [{"code": 0, "after": 0}]}, key="report", after=(("project",), None, {"project": first}))
    slurm.wait_empty(60)
    assert (slurm.state(first), slurm.state(last)) == ("COMPLETED", "COMPLETED")


def test_preempted_by_a_more_urgent_job(slurm, stand, tmp_path):
    """Slurm's own preemption: TERM to the job, GraceTime (20 s) to save in, then it waits for the other to end."""
    job = stand.submit({"a": [{"code": 75}, {"code": 0, "after": 0}]}, train={"nodes": 2, "exclusive": True})
    stand.started("a")
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "-N2", "--exclusive", "--time=5", "--output=/dev/null",
        "--wrap", "sleep 5",
    )  # fmt: skip
    assert slurm.wait(urgent) == "COMPLETED"
    assert slurm.wait(job) == "COMPLETED", stand.said()
    assert stand.notes("a", 0)["end"] == 75
    assert "start" in stand.notes("a", 1)


def test_a_node_that_dies_is_named_and_the_job_comes_back(slurm, stand):
    """The processes on the other node see a broken connection, and fail with it: here after 3 s, with code 1."""
    job = stand.submit({"a": [{"code": 1, "lost": 3}, {"code": 0, "after": 0}]})
    stand.started("a")
    stand.lose("node2")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", 120, stand.said)
    slurm.start_node("node2")
    assert slurm.wait(job) == "COMPLETED", stand.said()
    log = stand.log(f"project-{job}-r0")
    assert "Node failure on node2" in log
    assert "node1 does not answer" not in log


def test_a_node_that_dies_is_named_where_nothing_is_requeued(slurm, stand):
    job = stand.submit({"a": [{"code": 1, "lost": 3}]}, requeue=False)
    stand.started("a")
    stand.lose("node2")
    assert slurm.wait(job) == "NODE_FAIL", stand.said()
    slurm.start_node("node2")
    assert "Node failure on node2" in stand.log(f"project-{job}-r0")


def test_a_node_that_dies_with_the_script_on_it(slurm, stand):
    """Nobody is left to say or requeue anything but Slurm, which does."""
    job = stand.submit({"a": [{"code": 1, "after": 60}, {"code": 0, "after": 0}]})
    stand.started("a")
    slurm.kill_node("node1")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", 120, stand.said)
    slurm.start_node("node1")
    assert slurm.wait(job) == "COMPLETED", stand.said()


def test_a_node_that_slurm_has_not_missed_yet(tmp_path, monkeypatch):
    """Slurm takes minutes to notice on most clusters, and srun ends before: the script asks the nodes itself."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster(accounting=False, slurmd_timeout=600) as slurm:
        monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
        stand = Stand(slurm, tmp_path)
        job = stand.submit({"a": [{"code": 1, "lost": 3}]}, srun_options=["--wait=2"])
        stand.started("a")
        stand.lose("node2")
        slurm.until(lambda: "requeued" in stand.said(), 120, stand.said)
        log = stand.log(f"project-{job}-r0")
        assert "a stopped:  node node2 does not answer; (exit code" in log
        assert "node1 does not answer" not in log
        assert slurm.job(job)["Restarts"] == "1"
