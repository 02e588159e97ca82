"""DeepSpeed engines for the tests of the adapter, one for each way in which ZeRO stores what it steps."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.projection.flat_cases import BATCH, LEARNING_RATE, inputs_of

# name -> what it changes in the configuration; "offload" and "param_offload" are short for CPU offload.
SETTINGS: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage1-hookless": {"stage": 1, "contiguous_gradients": False},
    "stage1-offload": {"stage": 1, "offload": True},
    "stage1-bf16": {"stage": 1, "dtype": "bf16"},
    "stage1-bf16-offload-fp32": {"stage": 1, "dtype": "bf16", "offload": True, "accumulate_in": "fp32"},
    "bf16-optimizer": {"stage": 1, "dtype": "bf16", "accumulate_in": "fp32"},
    "bf16-optimizer-clipped": {"stage": 1, "dtype": "bf16", "accumulate_in": "fp32", "clip": 1.0},
    "stage2": {"stage": 2},
    "stage2-round-robin": {"stage": 2, "round_robin_gradients": True},
    "stage2-aligned": {"stage": 2, "parameter_alignment": True},
    "stage2-overlap": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 64},
    "stage2-allreduce": {"stage": 2, "reduce_scatter": False},
    "stage2-offload": {"stage": 2, "offload": True},
    "stage2-offload-accumulated": {"stage": 2, "offload": True, "accumulate": 2},
    "stage2-accumulated": {"stage": 2, "accumulate": 2},
    "stage2-clipped": {"stage": 2, "clip": 1.0},
    "stage2-bf16": {"stage": 2, "dtype": "bf16"},
    "stage2-bf16-fp32": {"stage": 2, "dtype": "bf16", "accumulate_in": "fp32"},
    "stage2-bf16-offload-fp32": {"stage": 2, "dtype": "bf16", "offload": True, "accumulate_in": "fp32"},
    "stage2-fp16": {"stage": 2, "dtype": "fp16"},
    "stage2-groups": {"stage": 2, "groups": True},
    "stage3": {"stage": 3},
    "stage3-persistent": {"stage": 3, "stage3_param_persistence_threshold": 10**6},
    "stage3-offload": {"stage": 3, "offload": True},
    "stage3-offload-all": {"stage": 3, "offload": True, "param_offload": True},
    "stage3-param-offload": {"stage": 3, "param_offload": True},
    "stage3-groups": {"stage": 3, "groups": True},
    "stage3-sub-groups": {"stage": 3, "sub_group_size": 40},
    "stage3-accumulated": {"stage": 3, "accumulate": 2},
    "stage3-bf16": {"stage": 3, "dtype": "bf16"},
    "stage3-bf16-fp32": {"stage": 3, "dtype": "bf16", "accumulate_in": "fp32"},
    "stage3-bf16-offload": {"stage": 3, "dtype": "bf16", "offload": True, "sub_group_size": 40},
    "stage3-fp16": {"stage": 3, "dtype": "fp16"},
}
QUICK = [
    "stage0",
    "bf16-optimizer",
    "stage1-offload",
    "stage2-round-robin",
    "stage2-aligned",
    "stage2-bf16-fp32",
    "stage2-groups",
    "stage3-persistent",
    "stage3-bf16-offload",
]
UNCHECKED = {"stage": 2, "dtype": "bf16", "check_overflow": False}


def configuration(
    stage: int,
    *,
    dtype: str = "fp32",
    accumulate_in: str | None = None,
    accumulate: int = 1,
    offload: bool = False,
    ratio: float = 1.0,
    param_offload: bool = False,
    clip: float = 0.0,
    check_overflow: bool = True,
    **zero: Any,
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    if dtype == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": check_overflow}
    if accumulate_in is not None:
        settings["data_types"] = {"grad_accum_dtype": accumulate_in}
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "ratio": ratio}
    if param_offload:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return settings


def make_engine(model: nn.Module, settings: dict[str, Any], optimizer: Any = torch.optim.SGD, **arguments: Any) -> Any:
    """settings: what SETTINGS holds. "groups": biases in a group of their own, of another learning rate."""
    import deepspeed

    settings = dict(settings)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Any = trainable
    if settings.pop("groups", False):
        groups = [{"params": [p for p in trainable if p.ndim > 1]}, {"params": [p for p in trainable if p.ndim == 1]}]
    arguments.setdefault("lr", LEARNING_RATE)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer(groups, **arguments), config=configuration(**settings)
    )
    return engine


def prepare() -> None:
    """In a worker, before the first engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # torch has the kernels; DeepSpeed is only careful


def dtype_of(settings: dict[str, Any]) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.get("dtype", ""), torch.float32)


def backward(engine: Any, micro_steps: int) -> None:
    """One optimizer step's worth of backward passes; the last `engine.step()` is left to the caller."""
    dtype = next(p for p in engine.module.parameters() if p.requires_grad).dtype
    for micro_step in range(micro_steps):
        engine.backward(engine(inputs_of(dist.get_rank(), micro_step, dtype)))
        if micro_step < micro_steps - 1:
            engine.step()
