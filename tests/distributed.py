"""Real processes for tests: `run_distributed(function, world_size, *args)`."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forks import CONTEXT

__all__ = ["run_distributed"]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `world_size` gloo processes of their own; their return values, by rank.

    The function and what it returns must be picklable (importable by name). The default process group exists during the
    call, the environment is the caller's, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set. Raises
    `AssertionError` with the traceback of the ranks that failed, and `TimeoutError` after `timeout` seconds; no process
    is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _worker,
            args=(dict(os.environ), function, world_size, folder, args),
            nprocs=world_size,
            join=False,
            start_method=CONTEXT.get_start_method(),
        )
        try:
            deadline = time.monotonic() + timeout
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):  # returns as each process ends
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} did not finish on {world_size} ranks in {timeout} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error-*")))
            raise AssertionError(errors or str(error)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _worker(
    rank: int,
    environ: dict[str, str],
    function: Callable[..., Any],
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environ)  # the server of the forks has that of its own start
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # Accelerate asks for them, and does not use them
    torch.set_num_threads(1)
    with Path(folder, f"error-{rank}").open("w") as log:
        faulthandler.enable(log)  # says where, if native code aborts the process
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        try:
            torch.save(function(*args), Path(folder) / f"result-{rank}")
            dist.barrier()
        except BaseException:
            log.write(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
            raise
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the result is written: gloo's threads need not outlive the interpreter's teardown
