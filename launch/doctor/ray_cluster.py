"""Ray: whether the cluster answers, and whether it asks those who come for a token."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from packaging.version import Version

from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import Check, Group
from grasp_dist.launch.doctor.software import installed

__all__ = ["check_ray"]

RAY = Group("ray")
_PATIENCE = 60
# docs.ray.io/en/latest/ray-security/token-auth.html, and the notice of 2.59 on every page there.
_TOKENS, _LOCAL_DEFAULT, _DEFAULT = Version("2.52"), Version("2.59"), Version("2.61")


def check_ray(cluster: Cluster) -> Iterator[Check]:
    """Nothing is started; Ray on this machine alone (`address: local`) is there when a sweep starts it."""
    version = installed("ray")
    if version is None:
        yield RAY.skipped("cluster", "Ray is not installed; see above")
        return
    yield _token(cluster, Version(version))
    if cluster.address == "local":
        yield RAY.ok("cluster", "a sweep starts Ray on this machine, and stops it")
    else:
        yield _reached(cluster)


def _token(cluster: Cluster, version: Version) -> Check:
    # CVE-2023-48022: who reaches the dashboard can run code; by design, says Ray, and since 2.52 there are tokens.
    mode = cluster.environment.get("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", ""))
    on_by_default = version >= (_LOCAL_DEFAULT if cluster.address == "local" else _DEFAULT)
    if mode == "token" or (not mode and on_by_default):
        return RAY.ok("token", f"asked for ({'RAY_AUTH_MODE=token' if mode else f'the default of Ray {version}'})")
    remedy = "set RAY_AUTH_MODE: token in `environment`, and start Ray on every node with RAY_AUTH_MODE=token"
    if version < _TOKENS:
        remedy = "pip install 'ray>=2.56', and then " + remedy
    return RAY.failure("token", "without one, whoever reaches Ray's ports can run code here (CVE-2023-48022)", remedy)


def _reached(cluster: Cluster) -> Check:
    if cluster.address != "auto":
        host, _, port = cluster.address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            remedy = "start it (`ray start --head`), correct `address`, or set address: local"
            return RAY.failure("cluster", f"nobody listens at {cluster.address}: {error.strerror or error}", remedy)
    if cluster.address.startswith("ray://"):
        return RAY.ok("cluster", f"{cluster.address}: somebody listens; `ray status` cannot ask a server of Ray Client")
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    if cluster.address != "auto":
        command += ["--address", cluster.address]
    try:
        done = subprocess.run(
            command, env={**os.environ, **cluster.environment}, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return RAY.failure("cluster", f"`ray status` does not answer: {error}", "see that `ray start` has run")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1][:200]
        remedy = "start it (`ray start --head`), correct `address`, or set address: local"
        if "auth" in said.lower():
            remedy = "give this machine the cluster's token (~/.ray/auth_token), and set RAY_AUTH_MODE: token"
        return RAY.failure("cluster", f"no cluster at {cluster.address}: {said}", remedy)
    usage = [line.strip() for line in done.stdout.splitlines() if line.strip().endswith(("CPU", "GPU"))]
    return RAY.ok("cluster", f"{cluster.address}: {', '.join(usage) or 'it answers'}")
