"""GRASP in a plain PyTorch loop: one process, DDP, or FSDP2.

python examples/plain_pytorch.py
torchrun --standalone --nproc-per-node 2 examples/plain_pytorch.py                 # fully_shard
torchrun --standalone --nproc-per-node 2 examples/plain_pytorch.py --layout ddp
"""

from __future__ import annotations

import argparse

import torch
from common import batches, load_basis, load_model, parser, report, start_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grasp_dist import GraspProjector


def main(options: argparse.Namespace) -> torch.nn.Module:
    world = start_processes()
    model = load_model(options)
    basis = load_basis(options, model)
    rows = list(batches(options, model))

    if world > 1 and options.layout == "ddp":
        model = DistributedDataParallel(model)
    elif world > 1:
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world,))
        for layer in [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    projector = GraspProjector(model, basis)  # after sharding and PEFT, before training
    projector.attach(optimizer)

    for batch in rows:
        model(input_ids=batch, labels=batch).loss.backward()
        if options.clip:
            if options.project_first:
                projector.project_gradients()  # optional: without it the step projects, after clipping
            torch.nn.utils.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        optimizer.zero_grad()

    report(projector.residual())
    return model


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--layout", choices=("fsdp2", "ddp"), default="fsdp2", help="with more than one process")
    made.add_argument("--project-first", action=argparse.BooleanOptionalAction, default=True, help="before clipping")
    return made


if __name__ == "__main__":
    main(options().parse_args())
