"""Alternatives that change a naive adapter on disk, one weight's factors at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_dist.architecture import canonical_name
from grasp_dist.baselines.safelora import safe_lora
from grasp_dist.baselines.settings import SafeLora, Truncation
from grasp_dist.baselines.truncation import truncate
from grasp_dist.detection.base_weights import open_base
from grasp_dist.errors import InputError

__all__ = ["change_adapter"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"
Edit = Callable[[str, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""edit(canonical name of the weight, A, B, scale) -> new A, B."""


def change_adapter(alternative: Any, naive: Path, base: Path, out: Path) -> dict[str, Any]:
    """Write the naive adapter, changed, as an adapter of the same settings; in one process.

    base: directory of the model that was fine-tuned. out: an existing folder. Returns what was done, as JSON values.
    Raises `InputError` for another model in the place of the unaligned one.
    """
    done: dict[str, Any] = {}
    edit = _truncating(alternative) if isinstance(alternative, Truncation) else _projecting(alternative, base, done)
    config = json.loads((naive / _CONFIG).read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(naive / _WEIGHTS)
    for name in sorted(tensors):
        if name.endswith(_A):
            other = name.removesuffix(_A) + _B
            weight = canonical_name(name.removesuffix(_A)) + ".weight"
            new = edit(weight, tensors[name], tensors[other], scale)
            tensors[name], tensors[other] = (one.contiguous() for one in new)
    save_file(tensors, out / _WEIGHTS, {"format": "pt"})
    shutil.copyfile(naive / _CONFIG, out / _CONFIG)
    return done


def _truncating(alternative: Truncation) -> Edit:
    def edit(weight: str, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return truncate(A, B, scale, rank=alternative.rank, keep=alternative.keep)

    return edit


def _projecting(alternative: SafeLora, base: Path, done: dict[str, Any]) -> Edit:
    aligned, unaligned = open_base(base), open_base(alternative.unaligned)
    done["cosines"] = {}

    def edit(weight: str, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        own, other = aligned.read(weight), unaligned.read(weight)
        if own.shape != other.shape:
            raise InputError(
                f"{weight!r} is {tuple(own.shape)} in {base} and {tuple(other.shape)} in {alternative.unaligned}; give "
                "the same model before its alignment"
            )
        new, done["cosines"][weight] = safe_lora(A, B, own - other, threshold=alternative.threshold)
        return A, new

    return edit
