"""What the examples share: their options, a small model and its basis, batches, and a DeepSpeed configuration.

Nothing here is about GRASP, apart from the random basis that stands in for a detected one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from grasp_dist import SpuriousBasis

BATCH = 4  # over all ranks


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every example has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="directory or hub id of a causal LM (default: a two-layer Llama, made here)")
    made.add_argument("--basis", help="basis.safetensors of that model (default: random directions, for a trial)")
    made.add_argument("--lora", action="store_true", help="train a LoRA adapter instead of the weights")
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    return made


def load_model(options: argparse.Namespace) -> torch.nn.Module:
    """In fp32, on the CPU; the same on every rank."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    return model.train()


def load_basis(options: argparse.Namespace, model: torch.nn.Module) -> SpuriousBasis:
    """The file, or three random directions on either side of each `o_proj` and `down_proj`. Call it before sharding."""
    if options.basis:
        return SpuriousBasis.load(options.basis)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            name = name.removeprefix("base_model.model.")  # PEFT's; a basis names weights as the base model does
            for side, size in (("write", module.out_features), ("read", module.in_features)):
                random = torch.randn(size, 3, generator=generator)
                tensors[f"{name}.weight.{side}"] = torch.linalg.qr(random).Q
    return SpuriousBasis.from_tensors(tensors)


def tokens(options: argparse.Namespace, model: torch.nn.Module) -> torch.Tensor:
    """(steps * BATCH, 16) made-up tokens."""
    size = (options.steps * BATCH, 16)
    return torch.randint(3, model.config.vocab_size, size, generator=torch.Generator().manual_seed(2))


def batches(options: argparse.Namespace, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """This rank's rows of each batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for batch in tokens(options, model).split(BATCH):
        yield batch.chunk(world)[rank]


def start_processes() -> int:
    """Join the process group that torchrun describes, if it started us; the number of processes."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()
    return dist.get_world_size() if dist.is_initialized() else 1


def zero_config(options: argparse.Namespace, *, stage: int, world: int) -> dict:
    """A DeepSpeed configuration in fp32."""
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_clipping": options.clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def report(residual: dict[str, float]) -> None:
    """How far the weights are off their pins: rounding, if all is well."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{len(residual)} weights protected; largest residual {max(residual.values()):.1e}")
