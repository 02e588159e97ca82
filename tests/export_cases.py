"""Checkpoints as training leaves them, made without training: trained numbers, and the files of any ranks; and what
the libraries read of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grasp_dist.config import LoraConfig, TrainingConfig
from grasp_dist.fingerprints import model_reference
from grasp_dist.training.checkpoints.store import Checkpoints, fingerprint
from grasp_dist.training.lora import adapter_config, add_lora
from grasp_dist.training.parallel import Parallel

__all__ = ["ALONE", "auto", "cut", "full_checkpoint", "logits", "lora_state", "peft", "record_of", "write_step"]

ALONE = Parallel("none", 0, 1, torch.device("cpu"))
IDS = torch.arange(3, 19)[None]

Piece = tuple[list[int], Tensor]
"""Offsets, and the numbers that stand there."""


def lora_state(
    base: Path, modules: Any = "write", *, rank: int = 3, alpha: float = 5.0, rslora: bool = False, seed: int = 0
) -> tuple[torch.nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A PEFT model over the base with random factors, B among them; these by canonical name; the record's settings."""
    from transformers import AutoModelForCausalLM

    training = TrainingConfig(modules=modules, lora=LoraConfig(rank=rank, alpha=alpha, rslora=rslora))
    model = add_lora(AutoModelForCausalLM.from_pretrained(base).float().eval(), training, str(base.resolve()))
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            owner, _, leaf = name.rpartition(".")
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
            factors[name.removeprefix("base_model.model.")] = values
    settings = {"method": "lora", "adapter_config": adapter_config(model), "base_model": model_reference(base)}
    return model.eval(), factors, settings


def record_of(tensors: Mapping[str, Tensor], **settings: Any) -> dict[str, Any]:
    """What a marker says, of tensors in their logical shapes."""
    plain = {"task": None, "config": "c0ffee", "base_model": None, "basis": None, "method": "full", "world_size": 1}
    extra = {"step": 5, "tokens": 640, "losses": [2.5, 1.25], "cursor": 30, "best": None, "skipped": []}
    shapes = {
        name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for name, value in tensors.items()
    }
    versions = {"torch": str(torch.__version__)}
    return {
        **plain,
        "step": 5,
        "strategy": "fsdp2",
        "versions": versions,
        "tensors": shapes,
        "extra": extra,
        **settings,
    }


def cut(tensors: Mapping[str, Tensor], world_size: int) -> list[dict[str, Piece]]:
    """Each tensor flat, in odd runs over the ranks, as ZeRO cuts them; small ones leave ranks without any."""
    ranks: list[dict[str, Piece]] = [{} for _ in range(world_size)]
    for name, value in tensors.items():
        flat = value.reshape(-1)
        edges = [0, *(min(flat.numel(), flat.numel() * rank // world_size + 1) for rank in range(1, world_size))]
        edges.append(flat.numel())
        for rank in range(world_size):
            if edges[rank] < edges[rank + 1]:
                ranks[rank][name] = ([edges[rank]], flat[edges[rank] : edges[rank + 1]].clone())
    return ranks


def write_step(root: Path, record: Mapping[str, Any], ranks: Sequence[Mapping[str, Piece]]) -> Path:
    """A finished checkpoint whose files are exactly `ranks`, whole or not."""
    checkpoints = Checkpoints(root)
    folder = checkpoints.prepare(record["step"])
    files = {}
    for rank, pieces in enumerate(ranks, start=1):
        path = folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        places = {name: {"saved_offsets": offsets} for name, (offsets, _) in pieces.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        save_file({name: values.contiguous() for name, (_, values) in pieces.items()}, path, metadata)
        files[path.name] = fingerprint(path)
    checkpoints.commit(folder, {**record, "world_size": len(ranks)}, files)
    return folder


def full_checkpoint(root: Path, base: Path, trained: dict[str, Tensor]) -> Path:
    tensors = {f"model.{name}": value for name, value in trained.items()}
    return write_step(root, record_of(tensors, base_model=model_reference(base)), cut(tensors, 3))


def logits(model) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def auto(folder: Path, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def peft(base: Path, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(auto(base), folder)
