"""GRASP with a DeepSpeed engine: ZeRO stages 1, 2 and 3.

deepspeed --num_gpus 2 examples/deepspeed_loop.py --zero 3
DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/deepspeed_loop.py --zero 2     # without GPUs
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from common import batches, load_basis, load_model, parser, report, start_processes, zero_config

from grasp_dist import GraspProjector


def main(options: argparse.Namespace) -> torch.nn.Module:
    world = start_processes()
    model = load_model(options)
    basis = load_basis(options, model)
    rows = list(batches(options, model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0),
        config=zero_config(options, stage=options.zero, world=world),
    )
    projector = GraspProjector(engine, basis)
    projector.attach(engine)

    for batch in rows:
        batch = batch.to(engine.device)
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()  # projects, clips, steps, pins

    report(projector.residual())
    return engine


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    made.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    return made


if __name__ == "__main__":
    main(options().parse_args())
