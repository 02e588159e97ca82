"""Sweeps in local Ray clusters of a test's own, and how far they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from grasp_dist.run_lock import holder_of

__all__ = ["Ray", "finished", "in_training", "wait"]

MARK = "GRASP_DIST_TEST_RAY"


class Ray:
    """Sweeps in local Ray clusters of a test's own, whose processes are known by a variable in their environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: sockets are made in it
        self.env = {
            **os.environ,
            MARK: self.mark,
            "RAY_TMPDIR": self.folder,
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "OMP_NUM_THREADS": "1",
        }

    def sweep(self, config: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "grasp_dist.cli", "sweep", str(config), "--ray", *options]
        with config.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT, text=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def await_end(self, seconds: float = 120) -> None:
        """Until Ray's processes have left, which they do by themselves once the driver has ended."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"{seconds:g} s behind the end of their driver there are still {left}"
            time.sleep(0.2)

    def clear(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def finished(run: Path, pattern: str) -> dict[str, int]:
    """{task: when its manifest was last written} of the finished tasks that match."""
    found = {}
    for path in run.glob(f"{pattern}/manifest.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["status"] == "finished":
                found[str(path.parent.relative_to(run))] = path.stat().st_mtime_ns
    return found


def wait(condition: Callable[[], Any], driver: subprocess.Popen[str], seconds: float = 600) -> Any:
    """Until the condition is met while the driver runs; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        assert driver.poll() is None, "the driver ended before the test could interfere"
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)
    return met


def in_training(run: Path) -> tuple[str, int] | None:
    """A trial that trains on behind a checkpoint of its own, not only of an earlier start, and its process."""
    for marker in run.glob("project/*/seed-*/checkpoints/step-*/checkpoint.json"):
        task = str(marker.parents[2].relative_to(run))
        if task not in finished(run, "project/*/seed-*") and (found := holder_of(run, task)):
            with contextlib.suppress(OSError, psutil.Error):
                if psutil.Process(found[0].pid).create_time() < marker.stat().st_mtime:
                    return task, found[0].pid
    return None
