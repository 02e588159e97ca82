"""A run of a few steps on the tiny organism of `conftest.organism`, and a command line to run it with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.forks import CONTEXT

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


def grasp_dist(*arguments: object, nproc: int = 1, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in a process of its own, with this one's environment.

    nproc: processes of one group, with the variables that torchrun gives them. (With `--nproc` among the arguments
    torchrun itself starts them, which takes longer.) The output is the first one's, and so is the exit code.
    """
    argv = ["grasp-dist", *map(str, arguments)]
    environ = [dict(os.environ)]
    if nproc > 1:
        group = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(_free_port())
        environ = [{**environ[0], **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(rank) for rank in range(nproc)]
        processes = []
        for folder, variables in zip(folders, environ, strict=True):
            folder.mkdir()
            processes.append(CONTEXT.Process(target=_main, args=(argv, variables, Path.cwd(), folder)))
            processes[-1].start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        said = [path.read_text() if path.exists() else "" for path in (folders[0] / "1", folders[0] / "2")]
        if any(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(argv, timeout, *said)
        code = processes[0].exitcode
        assert code is not None
        return subprocess.CompletedProcess(argv, code, *said)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _main(argv: list[str], environ: dict[str, str], cwd: Path, folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for descriptor in (1, 2):
        os.dup2(os.open(folder / str(descriptor), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = argv
    from grasp_dist.cli import main

    main()
