"""Processes, device and mesh of a run: what is read from torchrun's environment, once.

`init_parallel` makes the process group (gloo on the CPU, NCCL on GPUs) and says how the model is to be sharded; the
rest of the package asks the `Parallel` that it returns and never the environment.
"""

from __future__ import annotations

import gc
import os
import uuid
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grasp_dist.config import ParallelConfig
from grasp_dist.errors import InputError

__all__ = ["Parallel", "init_parallel"]


@dataclass
class Parallel:
    """The processes of one run. Without a process group every collective is that of a group of one."""

    strategy: Literal["fsdp2", "zero1", "zero2", "zero3", "none"]
    world_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """1-D mesh over all processes; None with strategy "none"."""
    reshard_after_forward: bool = True
    offload: Literal["none", "optimizer", "all"] = "none"
    owns_group: bool = field(default=False, repr=False)
    """Whether `close` ends the process group, because `init_parallel` made it."""
    sets_local_rank: bool = field(default=False, repr=False)
    """Whether `close` takes LOCAL_RANK out of the environment, because `init_parallel` put it there."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.world_rank == 0

    def for_scoring(self) -> Parallel:
        """The same processes for models that no engine trains: with `fully_shard` in place of ZeRO."""
        strategy: Literal["fsdp2", "none"] = "none" if self.mesh is None else "fsdp2"
        return replace(self, strategy=strategy, offload="none", owns_group=False, sets_local_rank=False)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's picklable object, on every process."""
        if self.world_size == 1:
            return obj
        holder = [obj]
        dist.broadcast_object_list(holder, src=0, device=self._object_device())
        return holder[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every process' picklable object by rank, on every process."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj)
        return gathered

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` (any shape and dtype, on `device`) over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_error(self, error: Exception | None) -> None:
        """Raise on every process if any has an error, so that none is left waiting in a collective."""
        errors = [found for found in self.gather_objects(None if error is None else (type(error), str(error))) if found]
        if error is not None:
            raise error
        if errors:
            kind, message = errors[0]
            raise (InputError if issubclass(kind, InputError) else RuntimeError)(message)

    def free_memory(self) -> None:
        """Give back what models that nobody holds any more have: `fully_shard` makes cycles of references."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the process group, if `init_parallel` made it. Safe to call twice."""
        if self.owns_group and dist.is_initialized():
            self.mesh = None  # it holds the group, whose threads would else outlive it into the interpreter's end
            dist.destroy_process_group()
        self.owns_group = False
        if self.sets_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        self.sets_local_rank = False

    def __enter__(self) -> Parallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _object_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def init_parallel(config: ParallelConfig) -> Parallel:
    """Join the other processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone without them.

    The device is the GPU LOCAL_RANK where CUDA is available, else the CPU. A process group that exists already is used
    and left open by `close`. Raises `InputError` for a strategy that the number of processes does not allow, and for
    more processes than GPUs on this machine.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if config.strategy == "none" and world_size > 1:
        raise InputError(
            f"parallel.strategy is 'none', but {world_size} processes were started, which would train the same model "
            "apart; use 'auto', 'fsdp2' or 'zero1' to 'zero3', or start one process"
        )
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if config.strategy in ("auto", "none") and world_size == 1:
        return Parallel("none", 0, 1, device)
    owns_group = not dist.is_initialized()
    if owns_group:
        _init_group(device)
    # DeepSpeed asks for it again and again, also of a process that is alone. Not without a group: Accelerate takes it
    # for the sign of one.
    sets_local_rank = config.strategy.startswith("zero") and "LOCAL_RANK" not in os.environ
    if sets_local_rank:
        os.environ["LOCAL_RANK"] = "0"
    return Parallel(
        "fsdp2" if config.strategy == "auto" or config.strategy == "none" else config.strategy,
        dist.get_rank(),
        dist.get_world_size(),
        device,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",)),
        reshard_after_forward=config.reshard_after_forward,
        offload=config.offload,
        owns_group=owns_group,
        sets_local_rank=sets_local_rank,
    )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"process {local_rank} of this machine has no GPU of its own ({count} visible); start at most {count} "
            "processes here, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _init_group(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device_id)
        return
    # One process that wants fully_shard all the same, as for mixed precision on a single GPU.
    store = dist.PrefixStore(uuid.uuid4().hex, dist.HashStore())
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id)
