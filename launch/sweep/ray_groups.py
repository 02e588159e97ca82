"""Groups of processes in Ray: what one takes, the cluster that has room for it, and the work that it does.

Each is a `TorchTrainer` (Train V2). A group that lost a process is started again, finds what it had saved in the run
directory, and goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from grasp_dist.config import RunConfig
from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.launch.cluster import Cluster
from grasp_dist.run_lock import holder_of

__all__ = ["Group", "await_free", "connected", "require_ray", "room", "train"]

_SILENT = 120.0
"""Seconds without a heartbeat after which whoever holds a task is thought dead, as `RunLock` does."""

_MARK = "GRASP_DIST_RAY"
"""Variable by which the processes of a Ray that was started here are known."""
_LEAVE = 20.0
"""Seconds that they have to end by themselves: now and then a process of Ray 2.60 hangs in its own exit, for good."""


@dataclass(frozen=True)
class Group:
    """What Ray is asked for, and what each process has to know before it can read the run's configuration."""

    run_dir: str
    workdir: str
    """Where relative paths of the configuration start."""
    num_workers: int
    cpus: float
    gpu: bool
    max_failures: int

    @property
    def state(self) -> Path:
        """Where Ray keeps what it knows of the sweep."""
        return Path(self.run_dir) / "sweep" / "ray"

    def config(self) -> RunConfig:
        """The run's configuration, in a process anywhere in the cluster."""
        os.chdir(self.workdir)
        return load_config(Path(self.run_dir) / "config.yaml")


def require_ray(cluster: Cluster) -> None:
    """Import Ray with the environment that decides how it behaves; some of it is read on import."""
    os.environ |= cluster.environment
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables come again with every restored sweep
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run is sent to anyone
    if cluster.address == "local":
        # No node to lose: a process less for each trial to start. (Train hands it on to its controllers.)
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        import ray.train.torch
        import ray.tune  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a sweep in Ray needs `pip install 'grasp-dist[ray]'` ({error}); without Ray (--no-ray) the same sweep "
            "runs one trial after the other"
        ) from None


@contextmanager
def connected(cluster: Cluster, group: Group) -> Iterator[None]:
    """Ray, for as long as the context lasts. Raises `InputError` if it is not there, or has no room for a group."""
    import ray

    variables = {name: os.environ[name] for name in ("RAY_TRAIN_V2_ENABLED", "RAY_CHDIR_TO_TRIAL_DIR")}
    if cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    variables |= cluster.environment
    # Nothing of size goes through Ray's own memory.
    local = cluster.address == "local"
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 128 << 20} if local else {}
    mark = os.environ[_MARK] = uuid.uuid4().hex
    try:
        # What the processes print is mixed and full of Ray's own; how far each is stands in the run directory.
        ray.init(
            address=cluster.address,
            runtime_env={"env_vars": variables, "worker_process_setup_hook": "grasp_dist.process.set_up_process"},
            log_to_driver=False,
            logging_level=logging.WARNING,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster at {cluster.address!r} ({error}); start one with `ray start --head`, give its address "
            "(--cluster.address HOST:PORT), or use --cluster.address local"
        ) from None
    try:
        room(group)
        yield
    finally:
        ray.shutdown()
        if local:
            _await_end(mark)


def _await_end(mark: str) -> None:
    """Until the processes of a Ray that was started here have left; those that do not are killed."""
    deadline = time.monotonic() + _LEAVE
    while left := [process for process in psutil.process_iter() if _has(process, mark)]:
        if time.monotonic() > deadline:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            return
        time.sleep(0.1)


def _has(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):
        other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
        return other and process.environ().get(_MARK) == mark
    return False


def room(group: Group) -> int:
    """How many groups the cluster holds at a time; raises `InputError` for none."""
    import ray

    total = ray.cluster_resources()
    needs = {"CPU": group.cpus * group.num_workers} | ({"GPU": float(group.num_workers)} if group.gpu else {})
    groups = min(int(total.get(kind, 0.0) / count) for kind, count in needs.items())
    if groups < 1:
        wanted, there = (", ".join(f"{of.get(kind, 0.0):g} {kind}s" for kind in needs) for of in (needs, total))
        raise InputError(
            f"a trial takes {wanted} ({group.num_workers} processes), and the Ray cluster has {there}; lower "
            "train.nodes, train.tasks_per_node or train.cpus_per_task of the cluster's configuration, or add nodes"
        )
    return groups


def train(group: Group, name: str, stages: tuple[str, ...], tasks: Sequence[str]) -> None:
    """Do tasks in a group of processes that Ray places; a group that lost a process is started again, and goes on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    before = signal.getsignal(signal.SIGINT)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"group": asdict(group), "stages": stages, "tasks": list(tasks)},
        scaling_config=ScalingConfig(
            num_workers=group.num_workers,
            use_gpu=group.gpu,
            resources_per_worker={"CPU": group.cpus} | ({"GPU": 1} if group.gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(group.state / "train"),
            failure_config=FailureConfig(max_failures=group.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)  # Ray leaves a handler behind that swallows the next Ctrl-C


def _work(settings: dict[str, Any]) -> None:
    """What each process of a group does. Ray has made the process group, and set RANK, LOCAL_RANK and WORLD_SIZE."""
    from grasp_dist.stages import work

    group = Group(**settings["group"])
    config = group.config()
    if os.environ["RANK"] == "0":
        await_free(group, settings["tasks"])
    work(config, tuple(settings["stages"]), only=settings["tasks"])


def await_free(group: Group, tasks: Collection[str]) -> None:
    """Wait while other processes are at work on these tasks: those of an earlier driver, which Ray is about to end, or
    of the same combination, if a search chose it twice."""
    said = False
    for task in tasks:
        while (found := holder_of(group.run_dir, task)) and found[1] < _SILENT:
            if not said:
                print(f"waiting for {found[0].describe()}", flush=True)
                said = True
            time.sleep(0.5)
