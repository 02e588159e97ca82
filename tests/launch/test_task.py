"""What srun gives a process, as torchrun would have said it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from grasp_dist.launch.task import ranks_of

STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("visible", "local_rank"), [(None, "3"), ("0,1,2,3,4,5,6,7", "3"), ("5", "0"), ("GPU-5ebe9f43", "0")]
)
def test_ranks_and_the_process_own_gpu(visible, local_rank):
    environ = STEP if visible is None else {**STEP, "CUDA_VISIBLE_DEVICES": visible}
    assert ranks_of(environ) == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": local_rank}


def test_a_single_process_needs_no_group():
    assert ranks_of({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {"LOCAL_RANK": "0"}


def test_outside_a_step_nothing_is_touched():
    assert ranks_of({"SLURM_JOB_ID": "7", "WORLD_SIZE": "2"}) == {}


def test_a_configuration_that_is_gone_is_one_message(tmp_path):
    scratch = tmp_path / "scratch" / "7"
    done = subprocess.run(
        [sys.executable, "-m", "grasp_dist.launch.task", str(tmp_path / "no.yaml"), "naive", "--only", "naive/seed-0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the configuration")
    assert scratch.is_dir()
