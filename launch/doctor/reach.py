"""One process of a trial job: what it sees where it is, and whether it reaches the others. Started by `grasp-dist
doctor`, here or on the nodes, in the place of `grasp_dist.launch.task`; what it finds is one JSON file per process.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import tempfile
import time
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from grasp_dist.launch.task import ranks_of

__all__ = ["ERRAND", "PORTS", "Errand", "main", "writable"]

ERRAND = "GRASP_DIST_DOCTOR"
"""Variable that holds what is to be done: an `Errand`, as JSON."""
PORTS = range(20000, 32000)
"""Where a job's processes meet: the job script takes one that follows from the job's number."""
_PATIENCE = timedelta(seconds=60)

Errand = dict[str, Any]
"""out: folder for what is found; marker: a file that every node must see; shared: folders to look at; scratch: as the
cluster file has it; backend: gloo or nccl, default as training."""


def main() -> None:
    """Look around, then meet the others; exit code 0 if they were reached. Arguments are ignored."""
    errand: Errand = json.loads(os.environ[ERRAND])
    os.environ |= ranks_of(os.environ)
    found = look_around(errand)
    try:
        found["reached"] = meet(errand.get("backend"))
    except Exception as error:  # whatever torch, gloo or NCCL raise
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    _report(Path(errand["out"]), found)
    sys.stdout.flush()
    # Threads of a broken group would keep the interpreter from ending.
    os._exit(1 if "error" in found else 0)


def look_around(errand: Errand) -> dict[str, Any]:
    """What this process sees without the others."""
    import psutil
    import torch

    return {
        "host": socket.gethostname(),
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "marker": Path(errand["marker"]).is_file() if errand.get("marker") else None,
        "unseen": [folder for folder in errand["shared"] if not Path(folder).is_dir()],
        "scratch": _scratch(errand["scratch"]) if errand.get("scratch") else None,
        "interfaces": sorted(psutil.net_if_addrs()),
        "port": None if os.environ.get("RANK", "0") != "0" else _port_taken(int(os.environ.get("MASTER_PORT", "0"))),
    }


def meet(backend: str | None = None) -> dict[str, float]:
    """All-reduce over the processes: with NCCL where there are GPUs and with gloo on the CPU, as training would, or
    with `backend`.

    Returns {backend: seconds}; empty for a process that is alone. Raises what torch does where they do not reach each
    other within a minute.
    """
    import torch
    import torch.distributed as dist

    if "WORLD_SIZE" not in os.environ:
        return {}
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    cuda = backend == "nccl"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    start = time.monotonic()
    dist.init_process_group(backend, timeout=_PATIENCE, device_id=device if cuda else None)
    ours = torch.full((1024,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(ours)
    world = dist.get_world_size()
    if ours.unique().tolist() != [world * (world + 1) / 2]:
        raise RuntimeError(f"the sum over {world} processes is wrong: {ours.unique().tolist()}")
    seconds = time.monotonic() - start
    dist.destroy_process_group()
    return {backend: round(seconds, 2)}


def writable(folder: Path) -> str | None:
    """Why no file can be written in a folder; None if one can. It is removed again."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".grasp-dist-doctor-", dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _scratch(wanted: str) -> str | None:
    """Why the scratch folder cannot be used. Where Slurm cannot make it, it sets TMPDIR to /tmp without a word."""
    folder, given = os.path.expandvars(wanted), os.environ.get("TMPDIR", "")
    with suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if why := writable(Path(folder)):
        return f"{folder}: {why}"
    return None if folder == given else f"TMPDIR is {given or 'not set'}, not {folder}"


def _port_taken(port: int) -> str | None:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return None


def _report(folder: Path, found: dict[str, Any]) -> None:
    path = folder / f"rank-{found['rank']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)


if __name__ == "__main__":
    main()
