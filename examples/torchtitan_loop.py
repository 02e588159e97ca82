"""GRASP in torchtitan's Trainer, by a subclass; everything after `--basis FILE` goes to torchtitan's own command line.

    torchrun --standalone --nproc-per-node 8 examples/torchtitan_loop.py --basis basis.safetensors \
        --module llama3 --config llama3_8b --checkpoint.enable --checkpoint.initial_load_path ... --training.steps 500

Executed so far: torchtitan 0.3.0's own Trainer with its small llama3, FSDP2 on one and two CPU processes, saving and
resuming included, with stand-ins for what needs a GPU: FlexAttention (SDPA), the memory monitor, a barrier. Not run:
the command line above, GPUs, pretrained weights, CUDA graphs, compilation, tensor and context parallelism.
"""

from __future__ import annotations

import argparse
import re

from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

from grasp_dist import GraspProjector, InputError, SpuriousBasis


class GraspTrainer(Trainer):
    """torchtitan clips inside `train_step`, so gradients are projected in the optimizer's step, after clipping."""

    projector: GraspProjector | None = None

    def __init__(self, config: Trainer.Config, basis: SpuriousBasis) -> None:
        super().__init__(config)
        self.basis = torchtitan_names(basis, config)
        self.protect()  # so that there is something for the pins of a checkpoint to be loaded into

    def train_step(self, data_iterator) -> None:
        if self.step == 1:  # not resumed: the pretrained weights have been read by now, and are those before training
            self.protect()
        super().train_step(data_iterator)

    def protect(self) -> None:
        if self.projector is not None:
            self.projector.detach()
        (model,), (optimizer,) = self.model_parts, self.optimizers  # no pipeline parallelism, one kind of optimizer
        self.projector = GraspProjector(model, self.basis)
        self.projector.attach(optimizer)
        if self.checkpointer.enable:
            self.checkpointer.states["grasp_pins"] = self.projector  # saved and resumed with the rest


def torchtitan_names(basis: SpuriousBasis, config: Trainer.Config) -> SpuriousBasis:
    """The basis of a Hugging Face checkpoint under torchtitan's names. q, k and v are stored in another order there."""
    names = config.model_spec.state_dict_adapter(config.model_spec.model, None).from_hf_map
    tensors = {}
    for weight in basis.weights:
        layer = re.search(r"\.(\d+)\.", weight)
        pattern = re.sub(r"\.\d+\.", ".{}.", weight, count=1)
        if layer is None or pattern not in names or re.search(r"\.[qkv]_proj\.", weight):
            raise InputError(
                f"{weight!r} has no counterpart in torchtitan; use SpuriousBasis.only(...) to leave it out"
            )
        for side in basis.sides(weight):
            tensors[f"{names[pattern].format(layer[1])}.{side}"] = basis.tensor(weight, side)
    return SpuriousBasis.from_tensors(tensors)


def main(basis: SpuriousBasis, config: Trainer.Config) -> GraspTrainer:
    trainer = GraspTrainer(config, basis)
    try:
        trainer.train()
        residual = trainer.projector.residual()
        print(f"{len(residual)} weights protected; largest residual {max(residual.values()):.1e}")
    finally:
        trainer.close()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--basis", required=True, help="basis.safetensors, with the model's Hugging Face names")
    options, rest = parser.parse_known_args()
    init_logger()
    main(SpuriousBasis.load(options.basis), ConfigManager().parse_args(rest))
