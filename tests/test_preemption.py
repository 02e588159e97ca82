"""Signals to a run of the command line: every process saves, the exit code says so, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from grasp_dist.errors import FORCED_OUT, PREEMPTED
from grasp_dist.training import preemption
from grasp_dist.training.checkpoints.store import Checkpoints
from tests.tiny_runs import grasp_dist, tiny_config

STEPS = 400


def _config(organism: Path, folder: Path, **checkpoint: object) -> Path:
    tree = tiny_config(organism, folder / "run")
    tree["training"]["steps"] = STEPS
    tree["checkpoint"] = checkpoint
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def _start(config: Path, nproc: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grasp_dist.cli", "naive", str(config), "--nproc", str(nproc)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _when_training(run: Path, process: subprocess.Popen[str], steps: int = 20) -> None:
    metrics = run / "naive" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("nproc", "number"), [(1, signal.SIGTERM), pytest.param(2, signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_command_saves_and_the_same_command_goes_on(organism, tmp_path, nproc, number):
    config = _config(organism, tmp_path, every=None)
    process = _start(config, nproc)
    _when_training(tmp_path / "run", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, errors
    (saved,) = Checkpoints(tmp_path / "run" / "naive" / "seed-0" / "checkpoints").listing()
    assert saved.state == "valid"
    assert f"saved behind step {saved.step}" in errors
    assert "Traceback" not in errors
    done = grasp_dist("naive", config, "--nproc", nproc)
    assert done.returncode == 0, done.stderr
    assert f"continued behind step {saved.step}" in done.stdout
    manifest = json.loads((tmp_path / "run" / "naive" / "seed-0" / "manifest.json").read_text())
    assert manifest["metrics"]["steps"] == STEPS
    lines = (tmp_path / "run" / "naive" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_signal_that_reaches_one_process_stops_all(organism, tmp_path):
    config = _config(organism, tmp_path, every=None)
    process = _start(config, 2)
    _when_training(tmp_path / "run", process)
    workers = [child for child in psutil.Process(process.pid).children() if "grasp_dist.worker" in child.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, errors
    assert "saved behind step" in errors


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_cannot_save_in_time_is_forced_out(asked):
    """The main thread hangs in one long call, as in a save onto a file system that does not answer."""
    program = (
        "import hashlib, os, signal, time\n"
        "from grasp_dist.training.preemption import StopSignals\n"
        "with StopSignals(lead_seconds=1.0):\n"
        f"    {'os.kill(os.getpid(), signal.SIGTERM)' if asked else 'pass'}\n"
        "    begun = time.monotonic()\n"
        "    while time.monotonic() < begun + 3: hashlib.pbkdf2_hmac('sha256', b'', b'', 4_000_000)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    if asked:
        assert done.returncode == FORCED_OUT
        assert "before the scheduler would kill this process (SIGTERM" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun > 3


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.StopSignals() as signals:
        assert not preemption.stop_requested()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.stop_requested()
        assert signals.requested == signal.SIGUSR1
    assert not preemption.stop_requested()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
