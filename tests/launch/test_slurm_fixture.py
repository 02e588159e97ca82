"""The Slurm that the other tests stand on: what they rely on holds for it."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.slow


def test_two_nodes_with_names_of_their_own(slurm):
    assert sorted(slurm.run("srun", "-N2", "hostname").split()) == ["node1", "node2"]
    assert slurm.run("srun", "-N1", "-n1", "--gres=gpu:1", "printenv", "CUDA_VISIBLE_DEVICES") == "0"


def test_a_job_is_requeued_within_seconds(slurm, tmp_path):
    job = slurm.run("sbatch", "--parsable", "--requeue", "--output=/dev/null", "--wrap", "sleep 60")
    slurm.wait(job, "RUNNING")
    slurm.run("scontrol", "requeue", job)
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1" and slurm.state(job) == "RUNNING", 30)


def test_a_killed_node_takes_its_processes_along_and_comes_back(slurm, tmp_path):
    beats = tmp_path / "beats"
    program = f"while :; do date +%s.%N >> {beats}; sleep 0.1; done"
    job = slurm.run("sbatch", "--parsable", "--no-requeue", "-w", "node1", "--output=/dev/null", "--wrap", program)
    slurm.until(beats.exists, 20)
    slurm.kill_node("node1")
    size = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == size
    assert slurm.wait(job, timeout=60) == "NODE_FAIL"
    slurm.start_node("node1")
    slurm.until(lambda: slurm.run("srun", "-w", "node1", "hostname", check=False) == "node1", 60)


def test_accounting_knows_what_has_ended(slurm):
    if not slurm.accounting:
        pytest.skip("needs slurmdbd and mariadb-server-core")
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 3")
    slurm.wait(job)
    shown = ["sacct", "-nPX", "-j", job, "-o", "state,exitcode"]
    slurm.until(lambda: slurm.run(*shown) == "FAILED|3:0", 20, lambda: slurm.run(*shown))
