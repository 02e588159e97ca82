"""Processes and devices: alone, under torchrun, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from grasp_dist.config import ParallelConfig
from grasp_dist.errors import InputError
from grasp_dist.training.parallel import init_parallel
from tests.distributed import run_distributed


def test_alone_there_is_no_process_group():
    with init_parallel(ParallelConfig()) as parallel:
        assert (parallel.strategy, parallel.world_size, parallel.is_main, parallel.mesh) == ("none", 1, True, None)
        assert not dist.is_initialized()
        parallel.barrier()
        assert parallel.broadcast_object("x") == "x"
        assert parallel.gather_objects(3) == [3]
        assert parallel.sum_(torch.ones(2)).tolist() == [1, 1]


def test_fsdp2_can_be_asked_for_on_one_process():
    with init_parallel(ParallelConfig(strategy="fsdp2")) as parallel:
        assert (parallel.strategy, parallel.world_size) == ("fsdp2", 1)
        assert parallel.mesh is not None
        assert dist.is_initialized()
    assert not dist.is_initialized()


def _collectives() -> dict[str, object]:
    parallel = init_parallel(ParallelConfig(reshard_after_forward=False))
    rank = parallel.world_rank
    with pytest.raises(InputError, match="'none', but 3 processes"):
        init_parallel(ParallelConfig(strategy="none"))
    errors = []
    for error in (InputError("disk") if rank == 1 else None, KeyError("bug") if rank == 2 else None, None):
        try:
            parallel.share_error(error)
        except Exception as found:
            errors.append(type(found).__name__)
    parallel.close()
    assert dist.is_initialized(), "the group is the test's, not ours"
    return {
        "main": parallel.is_main,
        "strategy": parallel.strategy,
        "reshard": parallel.reshard_after_forward,
        "broadcast": parallel.broadcast_object({"rank": rank}),
        "gather": parallel.gather_objects(rank),
        "sum": parallel.sum_(torch.tensor([rank, 1])).tolist(),
        "errors": errors,
    }


def test_collectives():
    runs = run_distributed(_collectives, 3)
    assert [run["main"] for run in runs] == [True, False, False]
    for run in runs:
        assert (run["strategy"], run["reshard"]) == ("fsdp2", False)
        assert run["broadcast"] == {"rank": 0}
        assert run["gather"] == [0, 1, 2]
        assert run["sum"] == [3, 3]
    assert [run["errors"] for run in runs] == [
        ["InputError", "RuntimeError"],
        ["InputError", "RuntimeError"],
        ["InputError", "KeyError"],
    ]


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from grasp_dist.config import ParallelConfig\n"
        "from grasp_dist.training.parallel import init_parallel\n"
        "import torch.distributed as dist\n"
        "with init_parallel(ParallelConfig()) as parallel:\n"
        "    assert dist.get_backend() == ('nccl' if parallel.device.type == 'cuda' else 'gloo')\n"
        "    seen = parallel.gather_objects(parallel.world_rank)\n"
        "    if parallel.is_main:\n"
        "        print('seen', seen)\n"
        "assert not dist.is_initialized()\n"
        "import os, sys; sys.stdout.flush(); os._exit(0)  # gloo's threads can abort the interpreter's end\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "seen [0, 1]" in done.stdout
