"""What a cluster file says about machines, tried on this one: variables, the network interface, the container, the
jobs' Python, modules. On a login node some of that can only be seen on the nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import DEEP, Check, Group

__all__ = ["check_machine", "is_elsewhere"]

MACHINE = Group("this machine")
_PATIENCE = 60.0
# Variables that force what NCCL, libfabric and rdma-core choose better by themselves: NVIDIA's list of what is not to
# be kept (docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, "Debugging"), and AWS' (github.com/aws-samples/
# awsome-distributed-training, efa-cheatsheet.md).
_FORCED = {
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_ALGO", "NCCL_PROTO",
    "NCCL_BUFFSIZE", "NCCL_NTHREADS", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_CHECKS_DISABLE",
    "NCCL_LAUNCH_MODE", "NCCL_NET_GDR_LEVEL", "FI_EFA_USE_DEVICE_RDMA", "RDMAV_FORK_SAFE",
}  # fmt: skip
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY)(_|$)")
_NO_SECRET = re.compile(r"(_PATH|_FILE|_DIR|_MODE)$")


def check_machine(cluster: Cluster) -> Iterator[Check]:
    """In the order in which a user would mend them."""
    yield from _environment(cluster)
    if cluster.interface:
        yield _interface(cluster, cluster.interface)
    if cluster.container.runtime != "none":
        yield from _container(cluster)
    yield _python(cluster)
    if cluster.modules and cluster.kind == "slurm":
        yield _modules(cluster)


def is_elsewhere(cluster: Cluster) -> bool:
    """Whether others than this machine do the work, which may have neither their GPUs nor their network."""
    return cluster.kind == "slurm" or (cluster.kind == "ray" and cluster.address != "local")


def _environment(cluster: Cluster) -> Iterator[Check]:
    secrets = [name for name in cluster.environment if _SECRET.search(name) and not _NO_SECRET.search(name)]
    for name in secrets:
        yield MACHINE.warning(
            "environment", f"{name} looks like a secret, and would stand in every job script",
            "keep it in a file that only you can read, and `source` that in `setup`",
        )  # fmt: skip
    forced = {name: "in this shell, which jobs inherit" for name in os.environ if name in _FORCED}
    forced |= {name: "in `environment`" for name in cluster.environment if name in _FORCED}
    for name, where in forced.items():
        yield MACHINE.warning(
            "environment", f"{name} is set {where}; it is for finding faults, and slows or breaks newer releases",
            "leave it out, unless you have measured that it is needed",
        )  # fmt: skip
    if not secrets and not forced:
        yield MACHINE.ok("environment", ", ".join(cluster.environment) or "nothing is set")


def _interface(cluster: Cluster, interface: str) -> Check:
    import psutil

    here = psutil.net_if_addrs()
    missing = [name for name in interface.split(",") if name not in here]
    if not missing:
        return MACHINE.ok("interface", f"{interface} is there")
    found, known = f"{', '.join(missing)} is not on this machine", f"here are {', '.join(sorted(here))}"
    if is_elsewhere(cluster):
        where = DEEP if cluster.kind == "slurm" else "see `ip link` there"
        return MACHINE.warning("interface", found, f"{known}; the nodes may have others: {where}")
    return MACHINE.failure("interface", found, f"{known}; correct `interface`, or leave it out")


def _container(cluster: Cluster) -> Iterator[Check]:
    container = cluster.container
    if container.runtime == "apptainer":
        program = shutil.which("apptainer")
        missing = "there is no `apptainer` on this machine"
        if program:
            yield MACHINE.ok("container", f"{program}: {_said('apptainer', '--version')}")
        elif cluster.kind == "slurm":
            yield MACHINE.warning("container", missing, f"list its module under `modules` if it has one; {DEEP}")
        else:
            yield MACHINE.failure("container", missing, "install it, or set container.runtime: none")
    elif shutil.which("srun") is None:
        yield MACHINE.skipped("container", "pyxis belongs to Slurm's srun, which is not on this machine")
    elif "--container-image" in _said("srun", "--help"):
        yield MACHINE.ok("container", "srun has pyxis")
    else:
        yield MACHINE.failure(
            "container", "srun does not know --container-image: this cluster has no pyxis",
            "use container.runtime: apptainer, or none",
        )  # fmt: skip
    image = str(container.image)
    if not image.startswith(("/", ".")) and not image.endswith((".sif", ".sqsh")):
        yield MACHINE.skipped("image", f"{image} is a registry's; {DEEP}")
    elif Path(image).exists():
        yield MACHINE.ok("image", image)
    else:
        yield MACHINE.failure("image", f"{image} is not there", "correct container.image; nodes must see it too")


def _python(cluster: Cluster) -> Check:
    """The jobs' Python, as far as it can be tried from here."""
    name = "python of the jobs"
    if cluster.container.runtime != "none":
        return MACHINE.skipped(name, f"it is in the container; {DEEP}")
    if cluster.python is None:
        return MACHINE.ok(name, f"{sys.executable} (this one)")
    program = shutil.which(cluster.python)
    if program is None:
        found = f"{cluster.python} is not on this machine"
        return MACHINE.warning(name, found, f"correct `python`, unless only the nodes have it: {DEEP}")
    done = _call([program, "-c", "import grasp_dist; print(grasp_dist.__file__)"])
    if done and done.returncode == 0:
        return MACHINE.ok(name, f"{program}, with {Path(done.stdout.strip()).parent}")
    said = done.stderr.strip().splitlines()[-1:] if done else ["no answer"]
    remedy = f"`{program} -m pip install grasp-dist`, or correct `python`"
    return MACHINE.failure(name, f"{program} cannot import grasp_dist: {' '.join(said)}", remedy)


def _modules(cluster: Cluster) -> Check:
    loaded = " ".join(cluster.modules)
    # A login shell, as job scripts with modules are. Some versions of `module` fail with exit code 0.
    done = _call(["bash", "-lc", f"module load {loaded}"])
    if done and done.returncode == 0 and "error" not in done.stderr.lower():
        return MACHINE.ok("modules", loaded)
    said = " ".join(done.stderr.split())[-200:] if done else "no answer"
    return MACHINE.warning("modules", f"`module load {loaded}` fails here: {said}", f"see `module avail`; {DEEP}")


# Commands


def _call(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, errors="replace",
            timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


def _said(*command: str) -> str:
    """What a command printed, on either stream."""
    done = _call(list(command))
    return "" if done is None else f"{done.stdout}{done.stderr}".strip()
