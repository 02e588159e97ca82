"""AdamW, learning-rate schedules, and clipping by the global norm, on plain and on sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.sharding import local_tensor
from grasp_dist.training.zero_parameters import shape_of

__all__ = [
    "build_optimizer",
    "build_scheduler",
    "init_state",
    "local_gradients",
    "scale_gradients",
    "squared_norm",
]


def build_optimizer(model: nn.Module, training: TrainingConfig) -> AdamW:
    """Fused AdamW over what is trainable; biases and norms (fewer than two dimensions) do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the model has no trainable parameter; load it with `training` given")
    matrices = [parameter for parameter in parameters if len(shape_of(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(shape_of(parameter)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, training.weight_decay), (vectors, 0.0))
        if group
    ]
    return AdamW(groups, lr=training.learning_rate, betas=training.betas, eps=training.eps, fused=True)


def init_state(optimizer: Optimizer) -> None:
    """Make AdamW's moments and step counts (zero) now instead of in the first step, so that they can be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def build_scheduler(optimizer: Optimizer, training: TrainingConfig, steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps` steps, then constant, or linear or half a cosine to 0 at `steps`."""
    warmup = training.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        if training.schedule == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if training.schedule == "cosine" else 1.0

    return LambdaLR(optimizer, factor)


def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of this rank's gradients, a 0-d fp32 tensor on `device`. If every number is on one rank only,
    the sum over ranks is the square of the global norm."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(gradients).float().square().to(device)


def scale_gradients(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply all of them, in place."""
    if gradients:
        torch._foreach_mul_(list(gradients), factor)


def local_gradients(optimizer: Optimizer) -> list[Tensor]:
    """This rank's gradients of an optimizer's parameters, without empty ones. Every parameter must be sharded on a 1-D
    mesh, or the only copy."""
    # On local tensors: the same operations dispatched through DTensor cost several times more on small models.
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            assert not isinstance(gradient, DTensor) or gradient.device_mesh.ndim == 1
            if gradient is not None and local_tensor(gradient).numel():
                gradients.append(local_tensor(gradient))
    return gradients
