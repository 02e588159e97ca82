"""GRASP in an Accelerate loop: whatever `accelerate launch` makes of the model.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py             # DDP
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --zero 3    # DeepSpeed ZeRO
accelerate launch --num_processes 2 examples/accelerate_loop.py --fsdp            # FSDP2; on CPU Accelerate runs DDP
"""

from __future__ import annotations

import argparse
import os
import warnings

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from common import BATCH, load_basis, load_model, parser, report, tokens, zero_config

from grasp_dist import GraspProjector


def main(options: argparse.Namespace) -> torch.nn.Module:
    world, cpu = int(os.environ.get("WORLD_SIZE", "1")), not torch.cuda.is_available()
    zero = DeepSpeedPlugin(hf_ds_config=zero_config(options, stage=options.zero, world=world)) if options.zero else None
    fsdp = FullyShardedDataParallelPlugin(fsdp_version=2) if options.fsdp else None
    accelerator = Accelerator(
        cpu=cpu and not zero,  # cpu=True turns sharding off, DeepSpeed's too, without a word
        deepspeed_plugin=zero,
        fsdp_plugin=fsdp,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if cpu and zero else None,
    )
    wanted = DistributedType.DEEPSPEED if zero else DistributedType.FSDP if fsdp else accelerator.distributed_type
    if accelerator.distributed_type != wanted:
        warnings.warn(f"asked for {wanted.value}, Accelerate runs {accelerator.distributed_type.value}", stacklevel=1)

    model = load_model(options)
    basis = load_basis(options, model)
    rows = torch.utils.data.DataLoader(tokens(options, model), batch_size=BATCH // world)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    projector = GraspProjector(model, basis)  # of what prepare() returned
    projector.attach(optimizer)

    for batch in rows:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)  # DeepSpeed: projects, clips and steps in here
        if options.clip and not options.zero:
            projector.project_gradients()  # optional: without it the step projects, after clipping
            accelerator.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()

    report(projector.residual())
    return model


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    sharding = made.add_mutually_exclusive_group()
    sharding.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed ZeRO of this stage")
    sharding.add_argument("--fsdp", action="store_true", help="FSDP2 (needs an accelerator)")
    return made


if __name__ == "__main__":
    main(options().parse_args())
