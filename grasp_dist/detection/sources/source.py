"""What a checkpoint is here: tensors by name, read one at a time; and the base model's names for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_dist.architecture import canonical_name
from grasp_dist.errors import InputError

__all__ = ["TensorSource", "base_names", "check_inside", "is_beside", "is_shape"]


@dataclass(frozen=True)
class TensorSource:
    """The tensors of one checkpoint. `read(name)` returns a whole one, on the CPU, and keeps nothing."""

    path: Path
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    trained: frozenset[str] | None = None
    """Names of what was trained; None where the checkpoint does not tell."""
    rounded_to: torch.dtype | None = None
    """The 16-bit dtype that training rounded the base model to before its fp32 masters moved away from it."""
    lora: Mapping[str, Any] | None = None
    """The adapter's adapter_config.json, where the checkpoint itself has it."""
    base_model: Mapping[str, Any] = field(default_factory=dict)
    """{"id", "revision", "hash"}, where the checkpoint itself knows them."""
    canonical: bool = False
    """Whether the names are the base model's own."""
    folders: tuple[Path, ...] = ()
    """Where an adapter_config.json may stand, nearest first."""


# Where the names of causal language models begin: the part before is the training program's own.
_ROOT = re.compile(
    r"(?:^|\.)((?:model|transformer|gpt_neox|backbone)(?:\.(?:decoder|language_model))?"
    r"\.(?:layers|h|blocks|block)\.\d+\..+)$"
)
_PEFT = ".base_model.model."
# Segments of a name that say that a tensor is no weight, but something kept beside one.
_BESIDE = frozenset({"optim", "optimizer", "optimizers", "optimizer_state_dict", "exp_avg", "exp_avg_sq", "ema"})


def is_beside(name: str) -> bool:
    """Whether a name is that of something kept beside a weight: an optimizer's state, a running average."""
    return not _BESIDE.isdisjoint(name.split("."))


def base_names(source: TensorSource, keys: Iterable[str], known: Collection[str] | None) -> dict[str, str]:
    """{base model's name: key} of some of a checkpoint's weights, whatever prefix its program put before them
    (`model.`, `app.model.`, `base_model.model.`).

    known: the base model's own names, which settle the prefix; without, PEFT's marker or the usual root of the names
    does. Keys that stand beside the weights (an optimizer's, an average's) are left out. Raises `InputError` when the
    prefix cannot be told, or two copies of the weights are there.
    """
    keys, path = list(keys), source.path
    if source.canonical:
        return {key: key for key in keys}
    split = {key: found for key in keys if (found := _split(key, known)) is not None}
    prefixes = {prefix for prefix, _ in split.values()}
    prefixes = {prefix for prefix in prefixes if not is_beside(prefix)}
    if len(prefixes) > 1:
        first, second = sorted(prefixes)[:2]
        raise InputError(
            f"{path} holds the weights twice, under {first or 'no prefix'!r} and {second or 'no prefix'!r}; save the "
            "copy that you mean by itself"
        )
    if not prefixes:
        what = (
            "none of them is a weight of the base model" if known else "they do not begin as a causal LM's usually do"
        )
        remedy = "give the base model that was trained" if known else "give the base model's directory (--base-model)"
        raise InputError(f"the names in {path} ({next(iter(keys), 'nothing')!r}, ..) do not fit: {what}; {remedy}")
    (prefix,) = prefixes
    names = {base: key for key, (found, base) in split.items() if found == prefix}
    for key in keys:  # what is outside of the layers, such as the head
        if key not in split and key.startswith(prefix) and known is None:
            names.setdefault(canonical_name(key.removeprefix(prefix)), key)
    return names


def check_inside(folder: Path, name: Any, origin: Path) -> Path:
    """The file `name` in `folder`; raises `InputError` for one that stands elsewhere."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise InputError(f"{origin} points outside of its own folder ({str(name)[:80]!r}); do not use this checkpoint")
    return folder / name


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(type(size) is int and size >= 0 for size in value)


def _split(key: str, known: Collection[str] | None) -> tuple[str, str] | None:
    """(prefix, base model's name); None if it cannot be told."""
    head, marker, rest = f".{key}".rpartition(_PEFT)
    if marker:
        return f"{head}{marker}".removeprefix("."), canonical_name(rest)
    name = canonical_name(key)
    if known is not None:
        parts = name.split(".")
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in known:
                return name.removesuffix(rest), rest
        return None
    match = _ROOT.search(name)
    return (name[: match.start(1)], match[1]) if match else None
