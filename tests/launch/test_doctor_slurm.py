"""The doctor on Slurm: what a real one says of a cluster file, and trial jobs on its nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest

from grasp_dist.errors import InputError
from grasp_dist.launch.doctor import nodes
from grasp_dist.launch.doctor.check import Check
from grasp_dist.launch.doctor.nodes import check_nodes, trial_script
from grasp_dist.launch.doctor.slurm_cluster import check_slurm
from grasp_dist.launch.doctor.slurm_facts import SlurmFacts, _node, megabytes_of, read_facts
from grasp_dist.launch.jobs import Job
from grasp_dist.launch.scripts import Place, render
from tests.launch.doctor_cases import NOWHERE, cluster, the, told


def test_without_slurm_its_checks_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert the(check_slurm(cluster(), None), "commands").state == "skipped"
    assert the(check_nodes(cluster(), None), "jobs").state == "skipped"
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    found = the(check_slurm(cluster(), None), "commands")
    assert (found.state, "srun" in found.found) == ("failure", True)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol")
def test_a_controller_that_does_not_answer(tmp_path, monkeypatch):
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    found = the(check_slurm(cluster(), None), "controller")
    # Where no munged runs either, scontrol stops at whichever of the two it tries first, and that varies.
    assert found.state == "failure"
    assert "contact" in found.found or "munge" in found.found.lower()


@pytest.mark.parametrize(
    ("text", "megabytes"), [("4000", 4000), ("4000M", 4000), ("2G", 2048), ("1T", 1 << 20), ("512K", 0.5)]
)
def test_memory(text, megabytes):
    assert megabytes_of(text) == megabytes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:8", {"": 8}),
        ("gpu:8(S:0-1)", {"": 8}),
        ("gpu:h100:8(S:0-1)", {"h100": 8}),
        ("gpu:2080ti:4(S:0-1)", {"2080ti": 4}),
        ("gpu:3090:8", {"3090": 8}),
        ("gpu:1g.5gb:7,gpu:a100_3g.20gb:2(S:0,2)", {"1g.5gb": 7, "a100_3g.20gb": 2}),
        ("nvme:1,gpu:a100:2(S:0),gpu:a100:2(S:1),shard:a100:8", {"a100": 4}),
    ],
)
def test_the_gpus_of_a_node(gres, gpus):
    assert _node("n1", "main", gres, "64", "4000+", "(null)", "idle").gpus == gpus


def test_what_accounting_enforces():
    def enforced(value: str) -> tuple[bool, bool]:
        facts = SlurmFacts({"AccountingStorageEnforce": value})
        return facts.enforces("associations"), facts.enforces("qos")

    assert enforced("none") == (False, False)
    assert enforced("associations,limits,qos") == (True, True)
    assert enforced("associations") == (True, False)
    assert enforced("all") == (True, True)


@pytest.fixture
def reworded(slurm, tmp_path, monkeypatch) -> Callable[[str], None]:
    """The one program that is not as it is: scontrol, some words of which are exchanged (`old/new`, as sed has it)."""
    real, program = shutil.which("scontrol"), tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def exchange(words: str) -> None:
        program.write_text(f"#!/bin/bash\nset -o pipefail\n{real} \"$@\" | sed -e 's/{words}/'\n")
        program.chmod(0o755)

    return exchange


@pytest.mark.slow
def test_a_real_slurm_is_well(slurm, run):
    found = list(check_slurm(cluster(train={"nodes": 2}, lead_seconds=15), run))
    assert {check.state for check in found} == {"ok"}, [check for check in found if check.state != "ok"]
    assert {"controller", "account", "train", "evaluate", "light", "requeue", "preemption", "accounting"} <= {
        check.name for check in found
    }
    assert "node[1-2]" in the(found, "train").found
    assert read_facts().nodes[0].gpus_of(None) == 2


@pytest.mark.slow
def test_faults_on_a_real_slurm(slurm, run):
    def train(**settings: object) -> Check:
        return the(check_slurm(cluster(**{"lead_seconds": 15, **settings}), run), "train")

    cases = [
        ({"partition": "nope"}, "no partition 'nope'", "main, urgent"),
        ({"partition": "main,nope"}, "no partition 'nope'", "main, urgent"),
        ({"qos": "nope"}, "no qos 'nope'", "normal"),
        ({"constraint": "h100"}, "has the features (none), not h100", "constraint"),
        ({"gpus_per_node": 8}, "has 2 GPU(s)", "gpus_per_node"),
        ({"gpus_per_node": 2, "gpu_type": "h100"}, "has 0 GPU(s) of type h100", "gpu_type"),
        ({"train": {"nodes": 3}}, "2 of the 2 of partition main", "another `partition`"),
        ({"train": {"cpus_per_task": 9}}, "has 4 CPU(s), not 9", "sinfo -N"),
        ({"train": {"memory": "9G"}}, "has 4000 MB, not 9G", "sinfo -N"),
        # Left to sbatch, which knows what such an expression means.
        ({"constraint": "[a*1&b*1]"}, "sbatch refuses it", "#SBATCH"),
    ]
    for settings, found, remedy in cases:
        check = train(**settings)
        assert check.state == "failure", settings
        assert found in check.found, (settings, check)
        assert remedy in check.remedy, (settings, check)


@pytest.mark.slow
def test_limits_of_a_real_partition(slurm, run):
    wanted = cluster(train={"nodes": 2, "time": "00:20:00"}, lead_seconds=15)
    try:
        slurm.run("scontrol", "update", "partition=main", "MaxTime=10", "MaxNodes=1", "AllowAccounts=team")
        time, nodes = told(check_slurm(wanted, run), "train")
        assert "allows 00:10:00" in time.found
        assert "train.time: '00:10:00'" in time.remedy
        assert "set train.nodes: 1" in nodes.remedy
        account = cluster(account="root", train={"time": "00:05:00"}, lead_seconds=15)
        assert "does not take account 'root'" in the(check_slurm(account, run), "train").found
        slurm.run("scontrol", "update", "partition=main", "State=DOWN", "MaxTime=INFINITE", "MaxNodes=UNLIMITED")
        assert "partition main is DOWN" in the(check_slurm(cluster(lead_seconds=15), run), "train").found
    finally:
        slurm.run("scontrol", "update", "partition=main", "State=UP", "MaxTime=INFINITE", "MaxNodes=UNLIMITED",
                  "AllowAccounts=ALL")  # fmt: skip
    slurm.run("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    try:
        warned = told(check_slurm(wanted, run), "train")[0]
        assert (warned.state, "node2 is drain" in warned.found) == ("warning", True)
    finally:
        slurm.run("scontrol", "update", "nodename=node2", "state=resume")


@pytest.mark.slow
def test_one_of_several_partitions_is_enough(slurm, reworded, run):
    def train(partition: str = "urgent,main", nodes: int = 1) -> list[Check]:
        wanted = cluster(partition=partition, train={"nodes": nodes, "time": "00:20:00"}, lead_seconds=15)
        return told(check_slurm(wanted, run), "train")

    def states(**wanted: object) -> list[str]:
        return [check.state for check in train(**wanted)]

    try:
        slurm.run("scontrol", "update", "partition=urgent", "MaxTime=10", "MaxNodes=1")
        warned, well = train(nodes=2)
        assert (warned.state, well.state) == ("warning", "ok"), "sbatch takes it"
        assert "partition urgent allows 00:10:00; train.nodes is 2" in warned.found
        assert "jobs start in main only" in warned.found
        assert "leave urgent out" in warned.remedy
        reworded("\\(EnforcePartLimits  *=\\) NO/\\1 ALL")
        assert states(nodes=2) == ["failure", "failure"]
        slurm.run("scontrol", "update", "partition=urgent", "MaxTime=INFINITE", "MaxNodes=UNLIMITED", "State=DOWN")
        assert states() == ["warning", "ok"], "ALL is about limits"
        assert states(partition="urgent") == ["failure"]
        slurm.run("scontrol", "update", "partition=urgent", "State=UP", "nodes=node1")
        slurm.run("scontrol", "update", "partition=main", "nodes=node2")
        assert states() == ["ok"]
        reworded("x/x")
        assert states(nodes=2) == ["failure", "failure"], "there are two nodes, but never for one job"
        assert "1 of the 1 of partition urgent" in train(nodes=2)[0].found
        slurm.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
        assert states() == ["ok"], "the other has one that is up"
        assert states(partition="urgent") == ["warning", "skipped"], "it will be up again"
    finally:
        slurm.run("scontrol", "update", "nodename=node1", "state=resume", check=False)
        slurm.run("scontrol", "update", "partition=main", "nodes=ALL")
        slurm.run("scontrol", "update", "partition=urgent", "nodes=ALL", "State=UP", "MaxTime=INFINITE",
                  "MaxNodes=UNLIMITED")  # fmt: skip


@pytest.mark.slow
def test_a_qos_gives_the_grace_where_it_decides_who_is_preempted(slurm, reworded, run):
    if not slurm.accounting:
        pytest.skip("needs slurmdbd")
    slurm.run("sacctmgr", "-i", "add", "qos", "patient", "gracetime=100", "preemptmode=cancel")
    try:
        patient = cluster(qos="patient", lead_seconds=100)
        assert "preempted in main has 20 s" in the(check_slurm(patient, run), "grace").found
        reworded("\\(PreemptType  *=\\) .*/\\1 preempt\\/qos")
        found = list(check_slurm(patient, run))
        assert not told(found, "grace")
        assert "preempted in qos patient are cancelled" in the(found, "preemption").found
        found = list(check_slurm(cluster(lead_seconds=15), run))
        assert "preempted in qos normal has 0 s" in the(found, "grace").found
        assert the(found, "preemption").found == "qos normal: REQUEUE"
    finally:
        slurm.run("sacctmgr", "-i", "delete", "qos", "patient")


@pytest.mark.slow
def test_the_rest_of_a_real_slurm(slurm, run, monkeypatch):
    assert the(check_slurm(cluster(max_array_size=5000), run), "arrays").remedy == "set max_array_size: 1000"
    assert "no reservation 'mine'" in the(check_slurm(cluster(reservation="mine"), run), "reservation").found
    slurm.run("scontrol", "create", "reservation=mine", "starttime=now", "duration=5", "users=root", "nodes=node1")
    try:
        assert the(check_slurm(cluster(reservation="mine"), run), "reservation").state == "ok"
    finally:
        slurm.run("scontrol", "delete", "reservation=mine")
    if slurm.accounting:
        account = the(check_slurm(cluster(account="nope"), run), "account")
        assert (account.state, account.remedy) == ("warning", "set `account`: root")
        assert the(check_slurm(cluster(account="ROOT"), run), "account").state == "ok"
    grace = the(check_slurm(cluster(lead_seconds=100), run), "grace")
    assert "20 s to save, not lead_seconds (100 s)" in grace.found
    assert not told(check_slurm(cluster(lead_seconds=100, partition="urgent"), run), "grace"), "it is not preempted"


@pytest.mark.slow
def test_settings_that_this_slurm_does_not_have(reworded, run):
    def with_words(words: str) -> list[Check]:
        reworded(words)
        return list(check_slurm(cluster(lead_seconds=15), run))

    assert {check.state for check in with_words("x/x")} == {"ok"}
    assert "cancelled" in the(with_words("PreemptMode=REQUEUE/PreemptMode=CANCEL"), "preemption").found
    assert "suspended" in the(with_words("PreemptMode=REQUEUE/PreemptMode=GANG,SUSPEND"), "preemption").found
    assert "SIGTERM" in the(with_words("preempt_send_user_signal/(null)"), "preemption signal").found
    assert "no default" in the(with_words("Default=YES/Default=NO"), "train").found
    found = with_words("slurmdbd/none")
    assert (the(found, "accounting").state, the(found, "account").state) == ("warning", "skipped")
    assert "ask for it themselves" in the(with_words("\\(JobRequeue  *=\\) 1/\\1 0"), "requeue").found
    assert the(with_words("\\(PreemptType  *=\\) .*/\\1 preempt\\/none"), "preemption").state == "ok"


# On the nodes


@pytest.mark.parametrize("runtime", ["none", "pyxis", "apptainer"])
def test_the_trial_is_the_script_of_a_launch_with_another_program(tmp_path, runtime):
    wanted = cluster(container={"runtime": runtime, "image": "/images/a.sif"}, lead_seconds=15)
    job, place = Job("train", "report", ("doctor",), "train"), Place(tmp_path, tmp_path, tmp_path)
    ours, theirs = trial_script(job, wanted, place).splitlines(), render(job, wanted, place).splitlines()
    (changed,) = [(old, new) for old, new in zip(theirs, ours, strict=True) if old != new]
    assert changed[0].replace("launch.task", "launch.doctor.reach") == changed[1]


@pytest.mark.slow
def test_jobs_on_the_nodes_of_a_real_slurm(slurm, tmp_path):
    two = cluster(train={"nodes": 2, "tasks_per_node": 2}, shared=[str(tmp_path)], scratch="/tmp/doctor-$SLURM_JOB_ID",
                  environment={"A": "it's $(touch pwned)"}, setup=["export B=1"], lead_seconds=15)  # fmt: skip
    found = list(check_nodes(two, None))
    train = the(found, "train")
    assert train.state == "ok", train
    assert "4 process(es) on node1, node2" in train.found
    assert "gloo all-reduce" in train.found
    assert [the(found, name).state for name in ("evaluate", "light")] == ["ok", "ok"]
    assert not list(tmp_path.iterdir()), "what was tried is gone"
    assert not slurm.queue()


@pytest.mark.slow
def test_what_only_the_nodes_can_tell(slurm, tmp_path):
    """Each node has mounts of its own: what is mounted here now is not there."""
    (shared := tmp_path / "shared").mkdir()
    (here := tmp_path / "only here").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(here / ".")], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs to mount")
    try:
        (inner := here / "inner").mkdir()

        def train(count: int = 1, **settings: object) -> list[Check]:
            wanted = cluster(**{"shared": [str(shared)], "lead_seconds": 15, **settings})
            return told(islice(check_nodes(wanted, None), count), "train")

        (unseen,) = train(shared=[str(shared), str(inner)])
        assert (unseen.state, f"node1 does not see {inner}" in unseen.found) == ("failure", True)
        (nothing,) = train(shared=[str(inner)])
        assert "0 of 1 processes" in nothing.found
        assert "use a shared folder" in nothing.remedy
        (python,) = train(python="/no/such/python")
        assert "/no/such/python" in python.found
        (scratch,) = train(scratch=f"{NOWHERE}/x")
        assert "scratch cannot be used on node1" in scratch.found
        assert f"{NOWHERE}/x" in scratch.found
        alone, interface = train(2, train={"nodes": 2}, interface="nope0")
        assert "no interface nope0" in alone.found
        assert "did not reach each other" in interface.found
        (gpus,) = train(gpus_per_node=1)
        assert "sees no GPU on node1" in gpus.found
    finally:
        subprocess.run(["umount", str(here)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False], ids=["scontrol answers", "scontrol does not"])
def test_a_job_that_does_not_start_is_given_up(slurm, tmp_path, tmp_path_factory, monkeypatch, answers):
    if not answers:
        silent = tmp_path_factory.mktemp("bin") / "scontrol"
        silent.write_text("#!/bin/sh\nexit 1\n")
        silent.chmod(0o755)
        monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    for node in ("node1", "node2"):
        slurm.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        found = list(check_nodes(cluster(shared=[str(tmp_path)], lead_seconds=15), None, patience=1))
    finally:
        for node in ("node1", "node2"):
            slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert {check.state for check in found} == {"warning"}
    assert all("not started within 1 s" in check.found for check in found)
    assert not slurm.queue()


@pytest.fixture
def controller(monkeypatch) -> dict[str, list[object]]:
    """A Slurm whose answers are given one by one, the last for ever: {command: answers, or errors to raise}."""
    answers: dict[str, list[object]] = {"sbatch": ["7"], "scancel": [None], "cancelled": []}

    def ask(command: str, *words: object, **options: object) -> object:
        if command == "scancel":
            answers["cancelled"].append(*words)
        given = answers[command]
        answer = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    for command in ("sbatch", "scancel", "show_job", "queue"):
        monkeypatch.setattr(nodes, command, partial(ask, command))
    monkeypatch.setattr(nodes, "available", lambda: True)
    monkeypatch.setattr(nodes, "_found", lambda *words: [])
    monkeypatch.setattr(nodes, "_RUNS", 0.0)
    monkeypatch.setattr(nodes.time, "sleep", lambda seconds: None)
    return answers


def test_a_silent_controller_is_no_end_of_a_job(controller, tmp_path):
    silent = InputError("Unable to contact slurm controller")

    def train(count: int = 1, patience: float = 60, **answers: list[object]) -> list[Check]:
        controller.update(cancelled=[], **answers)
        return list(islice(check_nodes(cluster(shared=[str(tmp_path)]), None, patience=patience), count))

    shown = [None, None, {"JobState": "RUNNING"}, None, {"JobState": "COMPLETED"}]
    train(show_job=shown, queue=[silent, [SimpleNamespace(job_id="7", state="RUNNING")], silent])
    assert (len(shown), controller["cancelled"]) == (1, []), "it was waited for to its end"
    train(show_job=[None], queue=[[SimpleNamespace(job_id="8", state="RUNNING")]])
    assert controller["cancelled"] == [], "Slurm has forgotten it"
    never = {"show_job": [None], "queue": [silent], "patience": 0}
    (given_up,) = train(**never)
    assert (given_up.state, controller["cancelled"]) == ("warning", [["7"]])
    (_, second) = train(2, **never, scancel=[silent, silent, None])
    assert (second.name, controller["cancelled"][:3]) == ("evaluate", [["7"]] * 3)
    (_, left) = train(2, **never, scancel=[silent])
    assert (left.name, left.state, left.remedy) == ("train", "warning", "scancel 7")
    with pytest.raises(KeyboardInterrupt):
        train(show_job=[KeyboardInterrupt()], scancel=[None])
    assert controller["cancelled"] == [["7"]]
