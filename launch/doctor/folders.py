"""Folders: the run directory, what the configuration names, what every node shares, and each node's scratch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from grasp_dist.config import RunConfig
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import DEEP, Check, Group
from grasp_dist.launch.doctor.reach import writable
from grasp_dist.launch.preconditions import named_paths

__all__ = ["check_folders", "existing", "local_paths"]

FOLDERS = Group("folders")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NO_FILES = ("detected", "one_shot", "random", "none")
"""What an arm's basis may be beside a file."""
_DATA_FILE = (".jsonl", ".json", ".parquet", ".txt", ".csv")


def check_folders(cluster: Cluster | None, config: RunConfig | None) -> Iterator[Check]:
    """On this machine; whether the nodes see the same, only a job there can tell."""
    if config:
        yield _run_dir(config)
    if cluster and cluster.kind != "local":
        yield from _shared(cluster, config)
    if config:
        yield from _inputs(cluster, config)
    if cluster and cluster.scratch:
        yield _scratch(cluster, cluster.scratch)


def local_paths(config: RunConfig) -> dict[str, Path]:
    """{setting: path} of every file or folder of this machine that a configuration names. Hub ids are none."""
    hub = ("model.path", "model.tokenizer", "data.path", "detect.adapter")
    return {
        key: Path(value)
        for key, value in named_paths(config).items()
        if not (key in hub and _is_hub_id(value)) and not (key.startswith("project.") and value in _NO_FILES)
    }


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _is_hub_id(value: str) -> bool:
    return not Path(value).exists() and bool(_HUB_ID.fullmatch(value)) and not value.endswith(_DATA_FILE)


def _run_dir(config: RunConfig) -> Check:
    folder = Path(config.run_dir).absolute()
    above = existing(folder)
    if not above.is_dir():
        return FOLDERS.failure("run_dir", f"{above} is a file", "choose another run_dir (--run_dir ...)")
    if why := writable(above):
        return FOLDERS.failure("run_dir", f"{above} cannot be written: {why}", "choose another run_dir (--run_dir ...)")
    return FOLDERS.ok("run_dir", f"{folder}, {shutil.disk_usage(above).free / 2**30:.0f} GiB free")


def _shared(cluster: Cluster, config: RunConfig | None) -> Iterator[Check]:
    if not cluster.shared:
        yield FOLDERS.warning(
            "shared", "the cluster file names no shared folders, so nobody checks that the nodes see the run's files",
            "list them under `shared`, for example the file system of your home directory",
        )  # fmt: skip
        return
    run_dir = Path(config.run_dir).resolve() if config else None
    for name in cluster.shared:
        folder = Path(name)
        if not folder.is_dir():
            yield FOLDERS.failure("shared", f"{name} is no folder here", "correct `shared`, or mount it here")
        elif why := writable(folder):
            if run_dir and run_dir.is_relative_to(folder.resolve()) and not writable(existing(run_dir)):
                yield FOLDERS.ok("shared", f"{name}; not to be written itself, but the run directory in it is")
                continue
            remedy = "name the folder in it that is yours, unless models or data are only read from it"
            yield FOLDERS.warning("shared", f"{name} cannot be written: {why}", remedy)
        else:
            yield FOLDERS.ok("shared", name)


def _inputs(cluster: Cluster | None, config: RunConfig) -> Iterator[Check]:
    paths = local_paths(config)
    for key, path in paths.items():
        if not path.exists():
            yield FOLDERS.failure(key, f"{path} is not there", "correct the path in the configuration")
    if cluster is None or cluster.kind == "local" or not cluster.shared:
        return
    roots = [Path(name).resolve() for name in cluster.shared]
    everything = {"run_dir": Path(config.run_dir), "working directory": Path.cwd()}
    everything |= {key: path for key, path in paths.items() if path.exists()}
    outside = {
        key: path for key, path in everything.items() if not any(path.resolve().is_relative_to(root) for root in roots)
    }
    for key, path in outside.items():
        yield FOLDERS.failure(
            key, f"{path.resolve()} is in none of the shared folders, so the nodes may not see it",
            f"move it into one of {', '.join(cluster.shared)}, or add its folder to `shared` if the nodes do see it",
        )  # fmt: skip
    if not outside:
        yield FOLDERS.ok("inputs", f"{', '.join(everything)}: in the shared folders")


def _scratch(cluster: Cluster, scratch: str) -> Check:
    folder = os.path.expandvars(scratch)
    if cluster.kind == "slurm" or "$" in folder:
        return FOLDERS.skipped("scratch", f"{scratch} is a folder of the nodes; {DEEP}")
    above = existing(Path(folder))
    if why := writable(above):
        return FOLDERS.failure(
            "scratch", f"{above} cannot be written: {why}", "choose another `scratch`, or leave it out"
        )
    return FOLDERS.ok("scratch", folder)
