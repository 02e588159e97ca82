"""Engines: what computes gradients, steps the optimizer, and holds the state that a checkpoint saves.

The training loop knows only `Engine`. Gradients are averaged over the ranks; the loop scales the loss so that their sum
is meant, projects, takes the norm, clips, and steps.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from grasp_dist.config import TrainingConfig
from grasp_dist.training.checkpoints.pieces import FlatPiece
from grasp_dist.training.parallel import Parallel

__all__ = ["Engine", "build_engine"]


class Engine(Protocol):
    """One model in training."""

    module: nn.Module
    """What the forward pass is called on."""
    optimizer: Optimizer
    """Its parameter groups hold the learning rates."""
    projects: Any
    """What a `GraspProjector` is built from ..."""
    attach_to: Any
    """... and attached to."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; last: it is the step's last one. Collective."""

    def gradients(self) -> list[Tensor]:
        """This rank's gradients after the last backward, in place, none of them empty; every number is on one rank."""

    def step(self) -> None:
        """Step the optimizer with the gradients as they are; then they are gone. Collective."""

    def drop_gradients(self) -> None:
        """Forget them: the step is left out. Collective."""

    def pieces(self) -> dict[str, FlatPiece]:
        """`model.<name>`, and `optimizer.<key>.<name>`, of every trainable parameter: views of what is trained, fp32
        masters where there are any. Moments that do not exist yet are made, as zeros."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{canonical name: logical shape} of every trainable parameter."""

    def loaded(self) -> None:
        """Called when something was read into `pieces`: whatever is computed with follows them. Collective."""

    def close(self) -> None:
        """Let go of the model. Safe to call twice."""


def build_engine(model: nn.Module, training: TrainingConfig, parallel: Parallel, *, micro_batches: int) -> Engine:
    """The engine that `parallel` asks for; collective. micro_batches: backward passes per optimizer step and rank."""
    if parallel.strategy.startswith("zero"):
        from grasp_dist.training.engines.zero import ZeroEngine

        return ZeroEngine(model, training, parallel, micro_batches=micro_batches)
    from grasp_dist.training.engines.tensors import TensorEngine

    return TensorEngine(model, training)
