"""What a LoRA training's checkpoint adds to its base model: `s B A` per weight, from factors read one by one.

The factors are small; what stands beside them in a checkpoint (base weights, moments) is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from grasp_dist.detection.adapter import (
    FACTOR,
    AdapterUpdate,
    check_config,
    factor_update,
    read_adapter,
    read_config,
)
from grasp_dist.detection.sources import TensorSource, base_names, model_skeleton, open_source
from grasp_dist.detection.sources.source import is_beside
from grasp_dist.errors import InputError

__all__ = ["read_update"]

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
# Parts of the names of what an adapter may train besides the factors of linear weights.
_MORE = ("lora_", "modules_to_save", "trainable_tokens")


def read_update(
    path: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    lora_alpha: float | None = None,
    trust: bool = False,
) -> AdapterUpdate:
    """The update of a PEFT adapter directory, or of a LoRA training's checkpoint directory of any kind.

    lora_alpha: for a checkpoint without adapter_config.json in it or beside it, whose rank its factors tell (for
    rank-stabilised LoRA give alpha * sqrt(r)). base_model: a directory; its names settle the checkpoint's prefix.
    trust: as `open_source`. Raises `InputError` as `read_adapter` and `open_source` do, and for a checkpoint without
    LoRA factors, or whose training moved more than those.
    """
    folder = Path(path)
    named = any((folder / name).is_file() for name in _WEIGHTS)  # as a pickle, it is refused there
    if named or ((folder / _CONFIG).is_file() and not _is_checkpoint(folder)):
        adapter = read_adapter(folder)
        _check_alpha(folder / _CONFIG, adapter.config, lora_alpha)
        return adapter
    source = open_source(folder, trust=trust)
    settings, where = _settings(source, lora_alpha)
    factors = _factors(source, base_model)
    if settings is None:
        raise InputError(
            f"{folder} does not say how its adapter is scaled: there is no {_CONFIG} in {source.path} or beside it; "
            "copy the training's there, or give lora_alpha (--lora-alpha)"
        )
    digest = hashlib.sha256(json.dumps(_scale(settings), sort_keys=True).encode())
    weights = {}
    for module, keys in sorted(factors.items()):
        tensors = {letter: source.read(key) for letter, key in sorted(keys.items())}
        for letter, tensor in tensors.items():
            _add(digest, f"{module}.{letter}", tensor)
        name = f"{module}.weight"
        weights[name] = factor_update(source.path, name, module, tensors, settings)
    if not any(update.B.any() and update.A.any() for update in weights.values()):
        raise InputError(
            f"{folder} learnt nothing: its update is zero in every weight; give a checkpoint of a later step"
        )
    base = source.base_model
    return AdapterUpdate(
        weights=weights,
        base_model=base.get("id") or settings.get("base_model_name_or_path") or None,
        revision=base.get("revision") or settings.get("revision"),
        config=dict(settings),
        hash=digest.hexdigest(),
        base_hash=base.get("hash"),
        source=f"{source.kind}, settings from {where}",
    )


def _is_checkpoint(folder: Path) -> bool:
    return (
        any(folder.glob("*.safetensors"))
        or any(folder.glob("*/*_model_states.pt"))
        or any(
            (folder / name).exists()
            for name in ("checkpoint.json", ".metadata", "latest", "latest_universal", "zero", "pytorch_model_fsdp_0")
        )
    )


def _check_alpha(file: Path, config: Mapping[str, Any], lora_alpha: float | None) -> None:
    if lora_alpha is not None and config.get("lora_alpha") != lora_alpha:
        raise InputError(f"{file} has lora_alpha {config.get('lora_alpha')}, not {lora_alpha}; leave the option out")


def _settings(source: TensorSource, lora_alpha: float | None) -> tuple[dict[str, Any] | None, str]:
    """The adapter's settings by PEFT's names, and where they are from; None if nothing tells them."""
    if source.lora is not None:
        check_config(source.path, source.lora)
        _check_alpha(source.path, source.lora, lora_alpha)
        return dict(source.lora), "the checkpoint"
    for folder in source.folders:
        if (folder / _CONFIG).is_file():
            config = read_config(folder)
            check_config(folder, config)
            _check_alpha(folder / _CONFIG, config, lora_alpha)
            return config, str(folder / _CONFIG)
    if lora_alpha is not None:
        if not lora_alpha > 0:
            raise InputError(
                f"lora_alpha {lora_alpha} is no scale of {source.path}; give the number above 0 that the training used"
            )
        return {"r": None, "lora_alpha": lora_alpha}, "lora_alpha"
    return None, ""


def _factors(source: TensorSource, base_model: str | os.PathLike[str] | None) -> dict[str, dict[str, str]]:
    """{module name in the base model: {"lora_A": key, "lora_B": key}}."""
    found = {key: match for key in source.shapes if (match := FACTOR.match(key))}
    if not found:
        raise InputError(
            f"{source.path} ({source.kind}) holds no LoRA factors; give a full fine-tune as --tuned, beside "
            "--base-model (detect_difference in Python)"
        )
    for key in source.trained if source.trained is not None else source.shapes:
        trained = source.trained is not None or any(part in key for part in _MORE)
        if trained and key not in found and not is_beside(key) and not key.endswith(".base_layer.weight"):
            raise InputError(
                f"{source.path}: {key!r} is no LoRA factor of a linear weight, so the fine-tune differs from its base "
                "by more than low-rank updates of linear weights; train an adapter on linear modules only"
            )
    adapters = {(match["name"] or "one without a name").removeprefix(".") for match in found.values()}
    if len(adapters) > 1:
        raise InputError(f"{source.path} holds several adapters ({', '.join(sorted(adapters))}); "
                         "save the one that you mean by itself")  # fmt: skip
    stems = {f"{match['module']}.weight": (key, match) for key, match in found.items()}
    names = base_names(source, stems, _known(base_model))
    pairs: dict[str, dict[str, str]] = {}
    for name, stem in names.items():
        for letter in ("lora_A", "lora_B"):
            _, match = stems[stem]
            key = match.string.replace(f".{match['factor']}", f".{letter}")
            if key in found:
                pairs.setdefault(name.removesuffix(".weight"), {})[letter] = key
    return pairs


def _known(base_model: str | os.PathLike[str] | None) -> Collection[str] | None:
    """The names of the base model's weights, if it is here."""
    if base_model is None or not Path(base_model).is_dir():
        return None
    return model_skeleton(Path(base_model)).state_dict().keys()


def _scale(settings: Mapping[str, Any]) -> list[Any]:
    return [settings.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")]


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().float().numpy().tobytes())
