"""A real two-node Slurm for the tests that ask for it: one per session, emptied after each test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from grasp_dist.config import RunConfig
from grasp_dist.config_files import load_config
from tests.launch.launching import write_launch_config
from tests.launch.ray_cases import Ray
from tests.slurm_cluster import SlurmCluster, missing
from tests.tiny_runs import grasp_dist


@pytest.fixture
def run(write_config) -> RunConfig:
    """The configuration of a tiny run, which is not made."""
    return load_config(write_config())


@pytest.fixture
def ray_alone() -> Iterator[None]:
    """No other test uses Ray meanwhile: ending a Ray job ends every Ray of this user on the machine."""
    with FileLock(Path(tempfile.gettempdir()) / "grasp-dist-tests-ray.lock"):
        yield


@pytest.fixture
def ray(ray_alone) -> Iterator[Ray]:
    ray = Ray()
    yield ray
    ray.clear()


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session, monkeypatch) -> Iterator[SlurmCluster]:
    """The cluster, reached by every command that a test starts; its jobs are cancelled at the end."""
    monkeypatch.setenv("SLURM_CONF", slurm_session.env["SLURM_CONF"])
    yield slurm_session
    slurm_session.clear()


@pytest.fixture(scope="session")
def uninterrupted(organism, tmp_path_factory) -> Path:
    """The run directory of the same pipeline, run here by two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = grasp_dist("run", write_launch_config(organism, folder), nproc=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"
