"""Reads a PEFT LoRA adapter directory as what it adds to the base model: `s B A` per weight, and nothing else.

Whatever makes the fine-tune differ from the base by more (or by something else) than `s B A` is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from grasp_dist.architecture import canonical_name
from grasp_dist.errors import InputError

__all__ = [
    "FACTOR",
    "AdapterUpdate",
    "LowRankUpdate",
    "check_config",
    "factor_update",
    "pattern_value",
    "read_adapter",
    "read_config",
]

# Settings of LoraConfig that make the update another thing than s B A on one weight each.
_NOT_LOW_RANK: Mapping[str, str] = {
    "use_dora": "DoRA rescales every column by a trained magnitude",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "block-diagonal LoRA keeps its factors in blocks",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "lora_bias": "it trains biases as well",
    "layer_replication": "it repeats layers, so one base weight has several updates",
    "target_parameters": "it adapts bare parameters (stacked experts)",
    "trainable_token_indices": "it trains token embeddings as well",
    "modules_to_save": "it replaces whole modules",
}
# Initialisations that leave the base weights alone; others move part of the base into the adapter.
_PLAIN_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<factor>lora_[AB])(?P<name>\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class LowRankUpdate:
    """dW = scale * B @ A of logical shape (out, in): A (r, in), B (out, r), as stored. `fan_in_fan_out`: the adapter
    says that the base weight itself is stored (in, out)."""

    A: Tensor
    B: Tensor
    scale: float
    fan_in_fan_out: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class AdapterUpdate:
    """What an adapter adds to its base model, by the base model's weight names, sorted."""

    weights: dict[str, LowRankUpdate]
    base_model: str | None
    revision: str | None
    config: dict[str, Any]
    hash: str
    base_hash: str | None = None
    """Of the base model, where what holds the adapter knows it."""
    source: str | None = None
    """The kind of checkpoint that the factors were read from; None for an adapter directory."""


def read_adapter(path: str | os.PathLike[str]) -> AdapterUpdate:
    """The update of the PEFT LoRA adapter in directory `path` (adapter_config.json, adapter_model.safetensors).

    Honours r, lora_alpha, use_rslora, rank_pattern and alpha_pattern as PEFT does. Raises `InputError` for a method or
    option that is not a plain low-rank update, damaged or non-finite content, and an adapter that learnt nothing.
    """
    folder = Path(path)
    config = read_config(folder)
    check_config(folder, config)
    file = _weights_file(folder)
    tensors = _read_tensors(file)
    pairs = _pair(file, tensors)
    weights = {}
    for module, factors in sorted(pairs.items()):
        name = f"{canonical_name(module)}.weight"
        weights[name] = factor_update(file, name, module, factors, config)
    if not weights:
        raise InputError(f"adapter {file} holds no LoRA factors; give the directory of a trained LoRA adapter")
    if not any(update.B.any() and update.A.any() for update in weights.values()):
        raise InputError(
            f"adapter {file} learnt nothing: its update is zero in every weight; train it for some steps first"
        )
    return AdapterUpdate(
        weights=weights,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision"),
        config=config,
        hash=_hash(folder / "adapter_config.json", file),
    )


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for a module, as PEFT matches: the first key that is, as a regular
    expression, the whole name or its ending behind a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises `InputError` if there is none that can be read."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise InputError(
            f"{folder} is no PEFT adapter: it has no adapter_config.json; give the directory that holds it"
        )
    try:
        config = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not readable JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no settings; save the adapter again")
    return config


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the settings say that the update is s B A of linear weights."""
    remedy = "detection needs a plain LoRA adapter (update s B A on linear weights): train one with peft.LoraConfig"
    if (method := config.get("peft_type")) != "LORA":
        raise InputError(f"adapter {folder} is of type {method!r}, not LORA; {remedy}")
    for option, reason in _NOT_LOW_RANK.items():
        if config.get(option):
            raise InputError(f"adapter {folder} was trained with {option} ({reason}); {remedy} without {option}")
    if (bias := config.get("bias", "none")) != "none":
        raise InputError(f"adapter {folder} was trained with bias={bias!r} (it trains biases as well); {remedy}")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise InputError(
            f"adapter {folder} was initialised with {init!r}, which takes its start out of the base weights, so that "
            "s B A is not its update; convert it with PEFT (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)) or train one with the default initialisation"
        )
    if not isinstance(config.get("r"), int) or config.get("lora_alpha") is None:
        raise InputError(f"{folder}/adapter_config.json has no 'r' or 'lora_alpha'; save the adapter again with PEFT")


def _weights_file(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return file
    if (pickled := folder / "adapter_model.bin").is_file():
        raise InputError(
            f"{pickled} is a pickle, which can run code when read, and is not opened; load the adapter with PEFT where "
            "you trust it and save it with save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"adapter {folder} has no adapter_model.safetensors; save it again with save_pretrained")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file} is not a readable safetensors file ({error}); copy it again or save the adapter again"
        ) from None


def _pair(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{module name in the base model: {"lora_A": (r, in), "lora_B": (out, r)}}."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT saves a frozen copy of an adapted head or embedding beside its factors
        match = FACTOR.match(key)
        if match is None:
            what = "a LoRA of an embedding layer" if "lora_embedding" in key else "no LoRA factor of a linear weight"
            raise InputError(
                f"adapter {file}: {key!r} is {what}, so the fine-tune differs from its base by more than low-rank "
                "updates of linear weights; train an adapter on linear modules only (no embeddings, modules_to_save, "
                "biases or DoRA magnitudes)"
            )
        pairs.setdefault(match["module"].removeprefix("base_model.model."), {})[match["factor"]] = tensor
    return pairs


def factor_update(
    file: Path, name: str, module: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LowRankUpdate:
    """The update of one weight from its factors {"lora_A": (r, in), "lora_B": (out, r)}, scaled as PEFT does.

    config: of `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern`, `r` (None: the factors' own rank). Raises
    `InputError` for a factor that is missing, misshapen or not finite.
    """
    if len(factors) != 2:
        missing = "lora_B" if "lora_A" in factors else "lora_A"
        raise InputError(f"adapter {file} has no {missing} for {name!r}; save the adapter again")
    a, b = factors["lora_A"], factors["lora_B"]
    rank = pattern_value(config.get("rank_pattern"), module, config.get("r"))
    if rank is None and a.ndim:
        rank = a.shape[0]
    alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise InputError(
            f"adapter {file}: {name!r} has A {tuple(a.shape)} and B {tuple(b.shape)}, but its configuration says "
            f"rank {rank}: A (r, in) and B (out, r) are wanted; weights and config are not of one training, or "
            "the module is no linear one"
        )
    for letter, factor in (("A", a), ("B", b)):
        if not factor.isfinite().all():
            raise InputError(
                f"adapter {file}: {letter} of {name!r} holds NaN or infinity; the training diverged: train it again "
                "with a lower learning rate"
            )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRankUpdate(A=a, B=b, scale=float(scale), fan_in_fan_out=bool(config.get("fan_in_fan_out")))


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
