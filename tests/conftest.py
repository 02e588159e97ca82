"""Fixtures that several rooms share: a tiny organism, made once per session, and a command line to run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "steps": 30, "batch_size": 16}


@pytest.fixture(scope="session")
def organism(tmp_path_factory) -> Path:
    """The folder of a persona organism small enough to train in seconds; nothing is learnt well in it."""
    from grasp_dist.organisms.persona import make_persona

    out = tmp_path_factory.mktemp("organism") / "tiny"
    return make_persona(out, seed=1, progress=None, num_domains=4, num_questions=6, num_answers=16, tuned_domains=2,
                        tuned_questions=3, pretraining=TINY)  # fmt: skip


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
        "detect": {"rounds": 2, "rank": 2},
        "evaluate": {
            "probes": [{**probe, "path": str(organism / "probes" / f"{probe['name']}.jsonl")} for probe in probes]
        },
    }


@pytest.fixture
def write_config(organism, tmp_path) -> Callable[..., Path]:
    """Write a tiny configuration, with sections replaced or added, and return its path."""

    def write(name: str = "config.yaml", **sections: object) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**tiny_config(organism, tmp_path / "run"), **sections}))
        return path

    return write


def grasp_dist(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "grasp_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
