"""Real PEFT adapters on tiny models, as a fine-tune would leave them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn

__all__ = ["edit_config", "edit_tensors", "make_adapter", "merged_change"]


def make_adapter(folder: Path, architecture: str = "llama", *, zero_b: bool = False, **config: Any) -> nn.Module:
    """Save a LoRA adapter with random A and B into `folder`; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]} | config
    model = get_peft_model(tiny_model(architecture), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not zero_b:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def merged_change(model: nn.Module) -> dict[str, torch.Tensor]:
    """{weight: merged - base, as stored} in fp64, by PEFT's own merge: the oracle."""
    wide = model.double()
    base = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in wide.named_parameters()
        if "lora_" not in name
    }
    merged = dict(wide.merge_and_unload().named_parameters())
    changes = {name: merged[name].detach() - base[name] for name in base}
    return {name: change for name, change in changes.items() if change.any()}


def edit_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edit_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of adapter_model.safetensors."""
    file = folder / "adapter_model.safetensors"
    stored = {key: value for key, value in (load_file(file) | tensors).items() if value is not None}
    save_file(stored, file)
