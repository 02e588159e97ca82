"""The engine for models in one process and for `fully_shard`: a torch optimizer steps the parameters themselves."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from grasp_dist.architecture import canonical_name
from grasp_dist.config import TrainingConfig
from grasp_dist.training.checkpoints.pieces import FlatPiece, piece_of
from grasp_dist.training.optimizer import build_optimizer, init_state, local_gradients

__all__ = ["TensorEngine"]


class TensorEngine:
    """See `Engine`."""

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        self.module = self.projects = model
        self.optimizer: Optimizer = build_optimizer(model, training)
        self.attach_to = self.optimizer
        # LoRA's small gradients stay whole until the last micro-batch and are reduced once. Those of full weights are
        # reduced and sharded each time, so that no rank ever holds a whole gradient of the model.
        self._waits = training.method == "lora" and isinstance(model, FSDPModule)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._waits:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()

    def gradients(self) -> list[Tensor]:
        return local_gradients(self.optimizer)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def pieces(self) -> dict[str, FlatPiece]:
        init_state(self.optimizer)
        pieces = {}
        for name, parameter in self._trainable():
            pieces[f"model.{name}"] = piece_of(parameter)
            for key, value in self.optimizer.state[parameter].items():
                pieces[f"optimizer.{key}.{name}"] = piece_of(value)
        return pieces

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._trainable()}

    def loaded(self) -> None:
        pass

    def close(self) -> None:
        self.optimizer.zero_grad()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(canonical_name(name), p) for name, p in self.module.named_parameters() if p.requires_grad]
