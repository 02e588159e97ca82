"""GRASP in transformers' Trainer, by a callback.

    python examples/hf_trainer.py
    torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py                   # DDP
    torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py --zero 3          # DeepSpeed ZeRO
    deepspeed --num_gpus 2 examples/hf_trainer.py --zero 2

The Trainer clips before the callback can project, so `max_grad_norm` sees the blocked directions too. `--out` keeps
checkpoints; `--resume` goes on from the last of them, with the pins of the first run.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from common import BATCH, load_basis, load_model, parser, report, tokens, zero_config
from transformers import Trainer, TrainingArguments

from grasp_dist.training.callback import GraspCallback


def main(options: argparse.Namespace) -> torch.nn.Module:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_model(options)  # before TrainingArguments: with ZeRO-3 those change how models are made
    basis = load_basis(options, model)
    args = TrainingArguments(
        output_dir=options.out or tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=BATCH // world,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        max_grad_norm=options.clip,
        train_sampling_strategy="sequential",
        deepspeed=zero_config(options, stage=options.zero, world=world) if options.zero else None,
        torch_compile=options.compile is not None,
        torch_compile_backend=options.compile,
        save_strategy="steps" if options.out else "no",
        save_steps=options.save_steps,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(options, model)]
    callback = GraspCallback(basis)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=options.resume)

    report(callback.residual)
    return trainer.model_wrapped


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed ZeRO of this stage")
    made.add_argument("--compile", metavar="BACKEND", help="torch.compile the model: inductor, aot_eager, ...")
    made.add_argument("--out", help="folder for checkpoints (default: none are kept)")
    made.add_argument("--save-steps", type=int, default=2)
    made.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    return made


if __name__ == "__main__":
    main(options().parse_args())
