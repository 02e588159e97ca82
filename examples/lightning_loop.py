"""GRASP in PyTorch Lightning: three hooks of the LightningModule, and two for checkpoints.

    python examples/lightning_loop.py
    torchrun --standalone --nproc-per-node 2 examples/lightning_loop.py               # DDP

Lightning runs forward and backward inside `optimizer.step(closure)`, that is after the optimizer's pre-step hooks: the
call in `on_before_optimizer_step` is what projects the gradients here, and must not be left out.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import lightning
import torch
from common import BATCH, load_basis, load_model, parser, report, tokens

from grasp_dist import GraspProjector


class Module(lightning.LightningModule):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options, self.model = options, load_model(options)
        self.basis = load_basis(options, self.model)
        self.pins: dict[str, torch.Tensor] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.options.lr, weight_decay=0.0)

    def on_train_start(self) -> None:  # the model is where it will be trained, and a checkpoint has been read
        self.projector = GraspProjector(self.model, self.basis)
        self.projector.attach(self.optimizers().optimizer)
        if self.pins is not None:
            self.projector.load_state_dict(self.pins)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # before Lightning clips
        self.projector.project_gradients()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["grasp_pins"] = self.projector.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pins = checkpoint["grasp_pins"]


def main(options: argparse.Namespace) -> torch.nn.Module:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    module = Module(options)
    rows = torch.utils.data.DataLoader(tokens(options, module.model), batch_size=BATCH // world)
    trainer = lightning.Trainer(
        max_epochs=1,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        gradient_clip_val=options.clip or None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows)

    report(module.projector.residual())
    return module.model


def options() -> argparse.ArgumentParser:
    return parser(__doc__)


if __name__ == "__main__":
    main(options().parse_args())
