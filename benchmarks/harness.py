"""What the timing scripts share: processes, interleaved timing, tables, and a line about the machine."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["interleaved", "machine", "run_ranks", "table"]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """`function(*args)` in `world_size` gloo processes that share the cores; what rank 0 returns.

    OMP_NUM_THREADS, where it is set, is the number of threads of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(function, world_size, folder, args), nprocs=world_size)
        return torch.load(Path(folder) / "result", weights_only=False)


def _worker(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result = function(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


def interleaved(contestants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each, taken turn by turn so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for index in range(warmup + rounds):
        for name in names if index % 2 else reversed(names):
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            contestants[name]()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> str:
    load = os.getloadavg()[0]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, python {platform.python_version()}, "
        f"load average {load:.1f} at the start"
    )
