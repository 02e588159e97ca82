"""Whether a text is sound shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCED = "SC1091"
"""shellcheck's complaint about files that setup lines read: they are on the cluster."""


def check_shell(text: str, folder: Path, *, exclude: str = "") -> None:
    """By `bash -n`, and by shellcheck where it is installed. `exclude`: of its findings."""
    path = folder / "script.sbatch"
    path.write_text(text)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        # SC2016: a $ between single quotes is what quoting is for.
        codes = ",".join(filter(None, ["SC2016", exclude]))
        command = ["shellcheck", "--shell=bash", f"--exclude={codes}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
