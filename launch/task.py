"""One process of a job, as srun starts it: `python -m grasp_dist.launch.task CONFIG STAGE --only TASK`.

srun gives each process its number; the rest of the package reads what torchrun gives. The rendezvous (MASTER_ADDR,
MASTER_PORT) is the job script's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.graph import STAGES
from grasp_dist.process import set_up_process
from grasp_dist.stages import work
from grasp_dist.training.preemption import hold_signals
from grasp_dist.worker import run_worker

__all__ = ["main", "ranks_of"]


def ranks_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, from those of a Slurm step; empty outside one. A single process needs no
    group, so no WORLD_SIZE.

    LOCAL_RANK is the number of the process' GPU among those that it sees: 0 where each process sees its own only.
    """
    if "SLURM_PROCID" not in environ:
        return {}
    processes = int(environ["SLURM_STEP_NUM_TASKS"])
    if processes == 1:
        return {"LOCAL_RANK": "0"}
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    alone = visible is not None and len(visible.split(",")) == 1
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": "0" if alone else environ["SLURM_LOCALID"],
    }


def main() -> None:
    """Entry point of each process."""
    hold_signals()
    set_up_process()
    parser = argparse.ArgumentParser(prog="python -m grasp_dist.launch.task", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--only", required=True, metavar="TASK", help="this task, e.g. project/grasp/seed-0")
    options = parser.parse_args()
    os.environ |= ranks_of(os.environ)
    try:
        if scratch := os.environ.get("TMPDIR"):
            Path(scratch).mkdir(parents=True, exist_ok=True)  # each node has its own
        config = load_config(options.config)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    run_worker(lambda: work(config, (options.stage,), only=[options.only]))


if __name__ == "__main__":
    main()
