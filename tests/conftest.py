"""Fixtures that several rooms share: a tiny organism, made once per session, and configurations for it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.tiny_runs import TINY, tiny_config

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

LONG = (
    "test_sweep_ray_killed.py",
    "test_on_slurm.py",
    "test_examples.py",
    "test_zero_engine.py",
    "test_on_slurm_signals.py",
    "test_faults.py",
    "test_sweep_ray_slurm.py",
    "test_deepspeed.py",
    "test_submitit.py",
    "test_pipeline_zero.py",
    "test_architectures.py",
    "test_sweep_ray_search.py",
    "test_sweep_run.py",
    "test_cluster.py",
)
"""Files that take minutes, roughly the longest first; but those with Ray, of which one waits for the other, apart."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would put files of few tests last, however long those take
    cache = getattr(config, "cache", None)
    if "TORCH_EXTENSIONS_DIR" not in os.environ and cache is not None:
        kernels = cache.mkdir("torch_extensions")  # what DeepSpeed compiles at first use
        for lock in kernels.glob("*/lock"):  # of a compilation that was killed: all later ones would wait for it
            lock.unlink(missing_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(kernels)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which processes are to take them (`--dist loadfile`): what is long does not begin last."""
    tests = Counter(item.path for item in items)
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: (rank.get(item.path.name, len(LONG)), -tests[item.path]))


@pytest.fixture(autouse=True)
def nothing_of_a_group_stays() -> Iterator[None]:
    """A process group, or its variables, that a test left behind would change what later tests in the process do."""
    before = {name: os.environ.get(name) for name in GROUP}
    yield
    after = {name: os.environ.get(name) for name in GROUP}
    distributed = sys.modules.get("torch.distributed")
    left = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if left:
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    assert not left, "the test left a process group open"
    assert after == before, "the test left variables of a process group in the environment"


@pytest.fixture(scope="session")
def organism(tmp_path_factory) -> Path:
    """The folder of a persona organism small enough to train in seconds; nothing is learnt well in it."""
    from grasp_dist.organisms.persona import make_persona

    out = tmp_path_factory.mktemp("organism") / "tiny"
    return make_persona(out, seed=1, progress=None, num_domains=4, num_questions=6, num_answers=16, tuned_domains=2,
                        tuned_questions=3, pretraining=TINY)  # fmt: skip


@pytest.fixture
def write_config(organism, tmp_path) -> Callable[..., Path]:
    """Write a tiny configuration, with sections replaced or added, and return its path."""

    def write(name: str = "config.yaml", **sections: object) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**tiny_config(organism, tmp_path / "run"), **sections}))
        return path

    return write
