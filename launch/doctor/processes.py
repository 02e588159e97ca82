"""Processes on this machine: the ports at which jobs meet, the GPUs, and whether processes reach each other."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import DEEP, Check, Group
from grasp_dist.launch.doctor.machine import is_elsewhere
from grasp_dist.launch.doctor.reach import ERRAND, PORTS
from grasp_dist.launch.local import free_port

__all__ = ["check_processes"]

PROCESSES = Group("processes")
_PATIENCE = 120.0


def check_processes(cluster: Cluster | None) -> Iterator[Check]:
    """Takes seconds: it imports torch, and starts processes."""
    yield _ports()
    yield _gpus(cluster)
    yield from _loopback(cluster)


def _ports() -> Check:
    """Whether they are free, and not those that the kernel gives to outgoing connections."""
    wanted = f"{PORTS.start}-{PORTS.stop - 1}, where the processes of a job meet"
    sample = random.Random(0).sample(PORTS, 50)
    taken = [port for port in sample if not _free(port)]
    if len(taken) > len(sample) // 10:
        return PROCESSES.warning(
            "ports", f"{len(taken)} of {len(sample)} ports tried in {wanted}, are taken",
            f"see what listens there with `ss -ltn`; {DEEP}",
        )  # fmt: skip
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low, high = map(int, given.read_text().split()) if given.is_file() else (PORTS.stop, PORTS.stop)
    if low < PORTS.stop and high >= PORTS.start:
        return PROCESSES.warning(
            "ports", f"outgoing connections take ports {low}-{high}, and so now and then one of {wanted}",
            "a job that finds its port taken fails and can be launched again; administrators avoid it with "
            f"net.ipv4.ip_local_port_range from {PORTS.stop} on",
        )  # fmt: skip
    return PROCESSES.ok("ports", f"{wanted}: {len(sample) - len(taken)} of {len(sample)} tried are free")


def _free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _gpus(cluster: Cluster | None) -> Check:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(seen)}))
    here = f"{seen} x {names}" if seen else f"torch {torch.__version__} sees none"
    wanted = cluster.gpus_per_node if cluster else 0
    if cluster and cluster.kind == "slurm":
        of_the_jobs = cluster.python is None and cluster.container.runtime == "none"
        if wanted and of_the_jobs and torch.version.cuda is None and torch.version.hip is None:
            return PROCESSES.failure(
                "gpus", f"torch {torch.__version__} is built for CPUs, and gpus_per_node is {wanted}",
                "install torch for your GPUs (pytorch.org has the command), or name another `python`",
            )  # fmt: skip
        return PROCESSES.skipped("gpus", f"those of this machine do not matter ({here}); {DEEP}")
    if cluster and is_elsewhere(cluster):
        return PROCESSES.skipped("gpus", f"those of this machine alone do not matter ({here}), but those that Ray has")
    if wanted > seen:
        return PROCESSES.failure(
            "gpus", f"gpus_per_node is {wanted}, but {here}",
            "lower gpus_per_node (0: the CPU), or look at `nvidia-smi`, CUDA_VISIBLE_DEVICES and torch's build",
        )  # fmt: skip
    return PROCESSES.ok("gpus", here)


def _loopback(cluster: Cluster | None) -> Iterator[Check]:
    """Two processes of this machine sum a tensor with gloo, and those of its GPUs with NCCL."""
    import torch

    interface = cluster.interface if cluster and not is_elsewhere(cluster) else None
    yield _all_reduce("gloo", 2, interface)
    if torch.cuda.is_available():
        yield _all_reduce("nccl", min(2, torch.cuda.device_count()), interface)


def _all_reduce(backend: str, processes: int, interface: str | None) -> Check:
    name = f"{backend} all-reduce"
    with tempfile.TemporaryDirectory(prefix="grasp-dist-doctor-") as folder:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
        names = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface) if interface else {}
        errand = {ERRAND: json.dumps({"out": folder, "shared": [], "backend": backend})}
        group = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **names,
            **errand,
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "grasp_dist.launch.doctor.reach"],
                env={**clean, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        said = []
        for process in started:
            try:
                said.append(process.communicate(timeout=_PATIENCE)[1])
            except subprocess.TimeoutExpired:
                process.kill()
                said.append(process.communicate()[1])
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    reached = [found["reached"] for found in results if "reached" in found]
    if len(reached) == processes:
        return PROCESSES.ok(name, f"{processes} processes, {max(found[backend] for found in reached):.1f} s")
    errors = [found["error"] for found in results if "error" in found]
    errors += [text.strip().splitlines()[-1] for text in said if text.strip()] + ["no answer"]
    return PROCESSES.failure(
        name, f"{processes} processes of this machine did not reach each other: {errors[0]}",
        "look at the firewall and at /etc/hosts (the host's own name), and name the right network under `interface`",
    )  # fmt: skip
