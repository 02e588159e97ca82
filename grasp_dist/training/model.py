"""Any transformers causal LM, ready to train or to score: built on meta, sharded, each rank reading its part.

The order matters: adapters and dtypes first, then activation checkpointing, then `fully_shard`, then memory, then the
weights. An adapter that is attached after `fully_shard` would be trained without gradient reduction.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp_dist.architecture import canonical_name, resolve_modules
from grasp_dist.config import ModelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.lora import add_lora, load_adapter, reset_adapter, save_adapter
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.sharding import checkpoint_layers, materialize, shard
from grasp_dist.training.weights import is_adapter, load_weights, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "meta_model",
    "model_folder",
    "reset_adapter",
    "save_adapter",
    "save_model",
]

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def load_model(
    config: ModelConfig,
    parallel: Parallel,
    *,
    precision: str,
    training: TrainingConfig | None,
    seed: int,
) -> nn.Module:
    """The model on this run's device, sharded over its processes, in evaluation mode; collective.

    training: with method "lora", a PeftModel whose adapter "default" is started from `seed`, over a frozen base; with
    "full", the chosen weights (and their biases) are trainable; None: everything is frozen, for scoring.
    precision: "fp32", or "bf16": frozen weights in bf16, trained ones in fp32, bf16 compute.
    Raises `InputError` for a path, file, weight or module name that does not fit.
    """
    folder = model_folder(config)
    base = meta_model(config)
    model: nn.Module = base
    base.requires_grad_(False)
    if training is not None and training.method == "lora":
        name = str(folder.resolve()) if Path(config.path).is_dir() else config.path
        model = add_lora(base, training, name, config.revision)
    elif training is not None:
        _choose_trainable(base, training)
    if precision == "bf16" and (training is None or training.method == "lora"):
        for name, parameter in model.named_parameters():
            if not is_adapter(name):
                parameter.data = parameter.data.to(torch.bfloat16)
    if training is not None and training.activation_checkpointing:
        checkpoint_layers(model, check=parallel.strategy != "zero3")
    if parallel.strategy == "fsdp2":
        shard(model, parallel, precision=precision)
    elif parallel.strategy == "zero3" and training is not None:
        from grasp_dist.training.engines.zero import load_zero3

        load_zero3(model, training, parallel)
    materialize(model, parallel.device)
    load_weights(model, folder, parallel)
    reset_adapter(model, seed, parallel)
    return model.eval()


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """The bare model in fp32 on the meta device, weights tied, buffers real; takes no memory to speak of.

    Raises `InputError` for a directory without a config.json that transformers knows as a causal LM's.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = model_folder(config)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; model.path must be a Hugging Face model directory or a hub id")
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=torch.float32,
                attn_implementation=None if config.attention == "auto" else config.attention,
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, ImportError, OSError, KeyError) as error:
        hint = " (set model.attention: eager)" if "attention implementation" in str(error) else ""
        hint = (
            " (set model.trust_remote_code: true if you trust its author)"
            if "trust_remote_code" in str(error)
            else hint
        )
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} cannot be loaded as a causal language model{hint}: {reason}") from None
    # init_empty_weights replaces parameters one by one, which parts tied ones.
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, or the model's own. Raises `InputError` if there is none to read."""
    from transformers import AutoTokenizer

    path = config.tokenizer or config.path
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if not Path(path).is_dir():
        arguments["revision"] = None if config.tokenizer else config.revision
    try:
        return AutoTokenizer.from_pretrained(path, **arguments)
    except Exception as error:
        # The tokenizer libraries raise bare exceptions for malformed files.
        reason = str(error).strip().splitlines()[0]
        if not config.tokenizer:
            model_folder(config)  # where there is no model, there is nothing to say about tokenizers
        raise InputError(
            f"no tokenizer can be read from {path} ({reason}); give a directory with tokenizer.json, or set "
            "model.tokenizer"
        ) from None


def model_folder(config: ModelConfig) -> Path:
    """The local directory of `model.path`; a hub id is downloaded first, if it is not in the local cache.

    Raises `InputError` for a path that does not exist and an id that cannot be had.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        return path
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if looks_local or path.exists():
        raise InputError(f"model.path {config.path} is no directory; give a Hugging Face model directory or a hub id")
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.py"] if config.trust_remote_code else _FILES
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except Exception as error:
        # Network, authentication, validation and file-system errors share no base class.
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.path {config.path} is no directory here and could not be fetched from the hub: {reason}"
        ) from None


def _choose_trainable(model: nn.Module, training: TrainingConfig) -> None:
    chosen = None if training.modules == "everything" else set(resolve_modules(model, training.modules))
    for name, parameter in model.named_parameters():
        if chosen is None or canonical_name(name).rpartition(".")[0] in chosen:
            parameter.requires_grad_(True)
