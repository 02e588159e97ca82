"""PEFT LoRA adapters on a sharded model: put in, started, loaded, saved.

An adapter starts the same for every world size: each A is drawn whole on the CPU from a generator that is seeded by the
run's seed and the parameter's name, and a rank keeps its rows. On disk it is an ordinary PEFT directory.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from grasp_dist.architecture import canonical_name, is_conv1d, linear_modules, resolve_modules
from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.files import replace_folder
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.seeds import derived_seed
from grasp_dist.training.sharding import fill, whole_tensor
from grasp_dist.training.weights import is_adapter
from grasp_dist.training.zero_parameters import shape_of

__all__ = ["adapter_config", "add_lora", "load_adapter", "reset_adapter", "save_adapter"]

_ADAPTER = "default"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def add_lora(model: nn.Module, training: TrainingConfig, base_name: str, revision: str | None = None) -> nn.Module:
    """The model with LoRA factors (adapter "default", on the meta device) on `training.modules`; the rest is frozen.

    base_name: what the saved adapter names as its base model.
    """
    from peft import LoraConfig, get_peft_model

    targets = resolve_modules(model, training.modules)
    linear = linear_modules(model)
    config = LoraConfig(
        r=training.lora.rank,
        lora_alpha=training.lora.alpha,  # type: ignore[arg-type]  # PEFT divides by it only
        use_rslora=training.lora.rslora,
        lora_dropout=training.lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(is_conv1d(linear[name]) for name in targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    # get_peft_model takes the name from the model, which was built from its configuration and has none.
    config.base_model_name_or_path = base_name
    config.revision = revision
    return wrapped


@torch.no_grad()
def reset_adapter(model: nn.Module, seed: int, parallel: Parallel) -> None:
    """Start the adapter anew, in place: A uniform in +-1/sqrt(in) as PEFT's default (`kaiming_uniform_(a=sqrt(5))`),
    B zero. The same for every world size; ranks need no communication."""
    for name, parameter in _factors(model):
        shape = shape_of(parameter)
        if ".lora_B." in name:
            fill(parameter, lambda slices, shape=shape: torch.zeros(()).expand(shape)[slices])  # type: ignore[misc]
            continue
        generator = torch.Generator().manual_seed(derived_seed("lora", seed, canonical_name(name)))
        bound = 1 / math.sqrt(shape[1])
        whole = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        fill(parameter, whole.__getitem__)


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path, parallel: Parallel) -> None:
    """Copy a PEFT adapter directory into the model's LoRA factors, in place; each rank reads its own rows.

    The adapter must have the rank, scale and modules of the one in the model: raises `InputError` where it has not, and
    for a directory that holds no readable adapter.
    """
    folder = Path(path)
    _check_config(folder, model.peft_config[_ADAPTER])  # type: ignore[index]
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            factors = {_saved_name(name): parameter for name, parameter in _factors(model)}
            if differing := sorted(shapes.keys() ^ factors.keys()):
                where = "lacks" if differing[0] in factors else "also holds"
                raise InputError(
                    f"the adapter {folder} {where} {differing[0]!r} ({len(differing)} such); it was trained on other "
                    "modules: set training.modules to what it was trained with"
                )
            for name, parameter in factors.items():
                if shapes[name] != shape_of(parameter):
                    raise InputError(
                        f"{name!r} has shape {shapes[name]} in {folder}, and {shape_of(parameter)} in this model; "
                        "the adapter belongs to another base model"
                    )
                fill(parameter, handle.get_slice(name).__getitem__)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / _WEIGHTS} is not a readable safetensors file ({error})") from None


def save_adapter(model: nn.Module, path: str | Path, parallel: Parallel) -> None:
    """Write the adapter as a directory that `PeftModel.from_pretrained` reads; collective.

    It appears under its name when it is whole. Raises `InputError`, on every rank, if the disk is full or read-only.
    """
    tensors = {_saved_name(name): whole_tensor(parameter).cpu() for name, parameter in _factors(model)}
    config: Any = model.peft_config[_ADAPTER]  # type: ignore[index]

    def write(folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS, {"format": "pt"})
        inference, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.inference_mode = inference

    with replace_folder(path, parallel) as target:
        target.write(write)


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The adapter's settings as JSON values, as in the adapter_config.json of `save_adapter`."""
    config: Any = model.peft_config[_ADAPTER]  # type: ignore[index]
    settings = {**config.to_dict(), "inference_mode": True}
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def _factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if is_adapter(name))


def _saved_name(name: str) -> str:
    """'...down_proj.lora_A.default.weight', however wrapped -> 'base_model.model....down_proj.lora_A.weight'."""
    return f"base_model.model.{canonical_name(name)}".replace(f".{_ADAPTER}.weight", ".weight")


def _check_config(folder: Path, config: Any) -> None:
    try:
        saved = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no PEFT adapter directory ({error}); give the folder with {_CONFIG}") from None
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"):
        own, theirs = getattr(config, key), saved.get(key, getattr(config, key))
        if (own or None) != (theirs or None):
            raise InputError(
                f"the adapter {folder} has {key} {theirs!r}, and the model was loaded for {own!r}; set training.lora "
                "to what the adapter was trained with"
            )
