"""A seeded tenth of the fault table (`make faults` is the whole): every bar of it holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.table import Row, markdown


@pytest.mark.slow
def test_a_tenth_of_the_faults():
    command = [sys.executable, "-m", "tests.faults", "--share", "0.1", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]  # below the heading
    assert len(rows) >= 15
    assert all(int(line.split("|")[2]) > 0 for line in rows if "not run" not in line)


def test_a_bar_that_does_not_hold_shows_in_the_table():
    row = Row("a fault", injected=3, outcome="as it should be")
    row.check(True, "nothing")
    row.replay(4)
    row.replay(2)
    assert markdown([row]).splitlines()[-1] == "| a fault | 3 | 0 | 4 | as it should be |"
    row.check(1 > 2, "one is not more than two\nby far")
    assert "**1 failed**: one is not more than two |" in markdown([row])
