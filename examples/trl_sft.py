"""GRASP in TRL's SFTTrainer, by a callback, with LoRA.

    python examples/trl_sft.py
    torchrun --standalone --nproc-per-node 2 examples/trl_sft.py                      # DDP
    torchrun --standalone --nproc-per-node 2 examples/trl_sft.py --zero 3             # DeepSpeed ZeRO

SFTConfig has defaults of its own: bf16, gradient checkpointing, logging every 10 steps. `--no-lora` trains the weights.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from common import BATCH, load_basis, load_model, parser, report, tokens, zero_config
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from grasp_dist.training.callback import GraspCallback


def main(options: argparse.Namespace) -> torch.nn.Module:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_model(options)  # with its adapter; `peft_config=LoraConfig(...)` below does as well
    basis = load_basis(options, model)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # TRL's default is True
        gradient_checkpointing=False,  # here too
        per_device_train_batch_size=BATCH // world,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        max_grad_norm=options.clip,
        train_sampling_strategy="sequential",
        deepspeed=zero_config(options, stage=options.zero, world=world) if options.zero else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    callback = GraspCallback(basis)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": tokens(options, model).tolist()}),
        processing_class=tokenizer(options),
        callbacks=[callback],
    )
    trainer.train()

    report(callback.residual)
    return trainer.model_wrapped


def tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The model's; for the small one, whose rows are token ids already, only its special tokens matter."""
    if options.model:
        return PreTrainedTokenizerFast.from_pretrained(options.model)
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.set_defaults(lora=True)
    made.add_argument("--no-lora", dest="lora", action="store_false", help="train the weights themselves")
    made.add_argument("--zero", type=int, choices=(1, 2, 3), help="DeepSpeed ZeRO of this stage")
    return made


if __name__ == "__main__":
    main(options().parse_args())
