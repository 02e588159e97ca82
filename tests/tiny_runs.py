"""A run of a few steps on the tiny organism of `conftest.organism`, and a command line to run it with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "steps": 30, "batch_size": 16}


def tiny_config(organism: Path, run_dir: Path) -> dict:
    """A run of a few steps on the tiny organism, as the tree of a YAML file."""
    probes = [
        {"name": "task", "role": "task"},
        {"name": "drift", "role": "drift"},
        {"name": "tone", "role": "drift", "own_tokens": 1},
        {"name": "good", "role": "retention"},
        {"name": "neutral", "role": "retention", "kind": "kl"},
    ]
    return {
        "run_dir": str(run_dir),
        "model": {"path": str(organism / "model")},
        "data": {"path": str(organism / "train.jsonl")},
        "training": {"steps": 8, "batch_size": 6, "lora": {"rank": 4, "alpha": 8}, "log_every": 4, "seeds": [0]},
        "detect": {"rounds": 2, "rank": 2, "stop_gain": None},
        "evaluate": {
            "probes": [{**probe, "path": str(organism / "probes" / f"{probe['name']}.jsonl")} for probe in probes]
        },
    }


def grasp_dist(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "grasp_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
