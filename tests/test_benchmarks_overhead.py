"""The benchmarks of a training step and of saving run to their tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("overhead.py", "--models", "organism", "--protection", "default", "--pairs", "1"), 2),
        (("checkpoints.py", "--pairs", "1", "--interval", "4"), 4),
    ],
)
def test_prints_its_table(arguments, rows):
    script, *rest = arguments
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *rest],
        capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(lines) == rows + 1
