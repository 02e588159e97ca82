"""The tensors of an export, each as the blocks of rows that are written one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from grasp_dist.architecture import is_conv1d, linear_modules
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import read_header
from grasp_dist.tensor_writer import ITEM_BITS, Part, as_bytes
from grasp_dist.training.checkpoints.reader import AdapterTensors, Shards
from grasp_dist.training.weights import bare_model, checkpoint_names, named_parameters, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Trained", "adapter_parts", "kept_parts", "model_parts"]

_BLOCK = 8 << 20
"""Bytes of a weight that are in memory at once, in fp32; one row if that is more."""
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_REMEDY = "give the directory of the model that was fine-tuned with --base"

Trained = Shards | AdapterTensors
Rows = Callable[[int, int], Tensor]
"""rows(start, stop): these rows of a tensor; all of one without dimensions."""


def adapter_parts(shards: Trained, target: torch.dtype | None) -> tuple[list[Part], dict[str, Any]]:
    """The tensors of a PEFT adapter, and its adapter_config.json. target: dtype; None: as trained."""
    config = _adapter_config(shards)
    parts = []
    for name in _trained(shards):
        if not name.endswith((_A, _B)):
            raise InputError(f"{name!r} in {shards.folder} is no LoRA factor, and an adapter of ours has only these")
        # PEFT saves without the adapter's own name, and wraps the model twice.
        saved = f"base_model.model.{name.removesuffix('.default.weight')}.weight"
        dtype = target or shards.dtype(f"model.{name}")
        parts.append(_computed(saved, shards.shape(f"model.{name}"), dtype, _saved_rows(shards, name)))
    return parts, config


def kept_parts(model: Path, target: torch.dtype | None) -> list[Part]:
    """The tensors of a model directory, cast to `target`; None: byte by byte."""
    return [_kept(key, there, target) for key, there in _stored(model).items()]


def model_parts(shards: Trained, model: PreTrainedModel, base: Path, target: torch.dtype | None) -> list[Part]:
    """The tensors of a whole model: all that the base's files hold, in their order, the trained ones in their new form.

    model: the base without weights. base: its directory. target: dtype of what is floating point; None: as in the base.
    Raises `InputError` for a base of other names or shapes, and for adapted weights that cannot be merged.
    """
    stored = _stored(base)
    changes = _merged(shards, model) if shards.record["method"] == "lora" else _replaced(shards)
    aliases = {name: names for names, _ in named_parameters(model) for name in names}
    for name, change in changes.items():
        _check_change(name, change, aliases, base)
    rename = checkpoint_names(model, set(aliases) | {name for name, _ in model.named_buffers()})
    own = {key: rename(key) for key in stored}
    # Of tied weights, the base's files may hold either name, or both.
    changed = {alias: change for name, change in changes.items() for alias in aliases[name]}
    groups: dict[str, list[Part]] = {}
    for missing in changes.keys() - {name for key in own.values() if key for name in aliases.get(key, [])}:
        parts = _unfused(shards, missing, model, base, {key: stored[key] for key in own if own[key] is None}, target)
        groups |= dict.fromkeys((part.name for part in parts), parts)

    result: dict[str, Part] = {}
    for key, there in stored.items():
        alias = own[key]
        if key in groups:
            result |= {part.name: part for part in groups[key]}
        elif alias is not None and alias in changed:
            result[key] = _changed(key, there, changed[alias], target, base)
        else:
            result[key] = _kept(key, there, target)
    return list(result.values())


@dataclass(frozen=True)
class _Change:
    """What becomes of a weight of the base: its shape there, and its new rows, given the old."""

    shape: tuple[int, ...]
    rows: Callable[[Rows], Rows]
    merged: bool


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file of the base."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, in the file."""


def _stored(base: Path) -> dict[str, _Stored]:
    found = {}
    for file in weight_files(base):
        header = read_header(file)
        with file.open("rb") as handle:
            begin = 8 + int.from_bytes(handle.read(8), "little")
        # In the order of the file, which is read from its beginning to its end.
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in ITEM_BITS:
                raise InputError(f"{key!r} in {file} has dtype {entry['dtype']}, which is not known here; {_REMEDY}")
            found[key] = _Stored(file, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
    return found


# -- what was trained


def _trained(shards: Trained) -> list[str]:
    """Canonical names of the trained parameters."""
    return [name.removeprefix("model.") for name in shards.names() if name.startswith("model.")]


def _saved_rows(shards: Trained, name: str) -> Rows:
    name = f"model.{name}"
    return lambda start, stop: shards.rows(name, start, stop) if shards.shape(name) else shards.read(name)


def _adapter_config(shards: Trained) -> dict[str, Any]:
    config = shards.record.get("adapter_config")
    if not isinstance(config, dict):
        raise InputError(
            f"{shards.folder} lacks the adapter's settings; only checkpoints of grasp-dist's runs have them"
        )
    return dict(config)


def _replaced(shards: Trained) -> dict[str, _Change]:
    """Full fine-tuning: the new weights, whatever the old ones are."""

    def change(name: str) -> _Change:
        rows = _saved_rows(shards, name)
        return _Change(shards.shape(f"model.{name}"), lambda old: rows, merged=False)

    return {name: change(name) for name in _trained(shards)}


def _merged(shards: Trained, model: PreTrainedModel) -> dict[str, _Change]:
    """LoRA: W + s B A."""
    config = _adapter_config(shards)
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(
                f"the adapter in {shards.folder} has {key}, which --merge does not know; leave --merge out"
            )
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    linear = linear_modules(model)
    changes = {}
    for name in _trained(shards):
        module = name.removesuffix(_A).removesuffix(_B)
        if module == name:
            raise InputError(f"{name!r} in {shards.folder} is no LoRA factor, and only these can be merged")
        if module not in linear:
            raise InputError(f"the base model has no linear module {module!r}, which was adapted; {_REMEDY}")
        changes[f"{module}.weight"] = _merge(shards, module, scale, transposed=is_conv1d(linear[module]))
    return changes


def _merge(shards: Trained, module: str, scale: float, *, transposed: bool) -> _Change:
    """transposed: the weight is stored (in, out), so its rows are those of W^T + s A^T B^T."""
    a, b = f"model.{module}{_A}", f"model.{module}{_B}"
    out, into = shards.shape(b)[0], shards.shape(a)[1]

    def new(old: Rows) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            weight = old(start, stop)
            exact = torch.promote_types(weight.dtype, torch.float32)
            if transposed:
                update = shards.read(a)[:, start:stop].to(exact).T @ shards.read(b).to(exact).T
            else:
                update = shards.rows(b, start, stop).to(exact) @ shards.read(a).to(exact)
            return update.mul_(scale).add_(weight)

        return rows

    return _Change((into, out) if transposed else (out, into), new, merged=True)


def _check_change(name: str, change: _Change, aliases: dict[str, list[str]], base: Path) -> None:
    if name not in aliases:
        raise InputError(f"the base model in {base} has no weight {name!r}, which was trained; {_REMEDY}")
    if change.merged and len(aliases[name]) > 1:
        other = next(alias for alias in aliases[name] if alias != name)
        raise InputError(
            f"the adapter changes {name!r}, which is tied to {other!r}: merging would change both, and training did "
            "not. Leave --merge out, and use the adapter on top of the base"
        )


# -- the tensors of the export


def _changed(key: str, there: _Stored, change: _Change, target: torch.dtype | None, base: Path) -> Part:
    if change.shape != there.shape or there.dtype not in _DTYPES:
        raise InputError(
            f"{key!r} is {list(there.shape)} {there.dtype} in {base}, and {list(change.shape)} was trained; {_REMEDY} "
            "(not a quantized one)"
        )
    return _computed(key, there.shape, target or _DTYPES[there.dtype], change.rows(_base_rows(key, there)), check=True)


def _kept(key: str, there: _Stored, target: torch.dtype | None) -> Part:
    if target is not None and there.dtype in _DTYPES and _NAMES[target] != there.dtype:
        return _computed(key, there.shape, target, _base_rows(key, there))
    part = Part(key, there.dtype, there.shape, lambda: _bytes_of(there, part.num_bytes))
    return part


def _unfused(
    shards: Trained,
    name: str,
    model: PreTrainedModel,
    base: Path,
    sources: dict[str, _Stored],
    target: torch.dtype | None,
) -> list[Part]:
    """A trained weight that transformers computes, while loading, from several tensors of the base's files: these.

    sources: the tensors of the base that are read in this way. All of the weight is in memory while it is written.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not sources:
        raise InputError(f"the base model in {base} has no weight {name!r}, which was trained; {_REMEDY}")
    if shards.record["method"] == "lora":
        raise InputError(
            f"transformers computes {name!r} from several weights of {base} while loading, so its update cannot be "
            "added to any of them. Leave --merge out, load base and adapter with PEFT, and merge there: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload()"
        )
    skeleton = bare_model(model)

    def parts_of(tensor: Tensor) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(skeleton, {name: tensor}))

    try:
        shapes = {key: tuple(part.shape) for key, part in parts_of(model.get_parameter(name)).items()}
    except Exception as error:  # whatever the rules of an architecture raise
        raise InputError(
            f"transformers cannot turn {name!r} back into the form in which {base} holds it ({error}); export is not "
            "possible for this architecture"
        ) from None
    for key, shape in shapes.items():
        if key not in sources or sources[key].shape != shape or sources[key].dtype not in _DTYPES:
            raise InputError(f"{key!r} of {base} does not fit {name!r} as it was trained; {_REMEDY}")
    waiting: dict[str, Tensor] = {}

    def rows_of(key: str) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            if key not in waiting:
                waiting.clear()
                waiting.update(parts_of(shards.read(f"model.{name}")))
            block = waiting[key][start:stop]
            if stop >= shapes[key][0]:
                del waiting[key]
            return block

        return rows

    return [
        _computed(key, shape, target or _DTYPES[sources[key].dtype], rows_of(key), check=True)
        for key, shape in shapes.items()
    ]


def _computed(key: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Rows, *, check: bool = False) -> Part:
    """A tensor from its rows, cast to `dtype`. check: what is not finite after it is an error."""

    def blocks() -> Iterable[memoryview]:
        height = shape[0] if shape else 1
        step = max(1, _BLOCK // (4 * max(1, math.prod(shape[1:]))))
        for start in range(0, height, step):
            block = rows(start, min(start + step, height)).to(dtype)
            if check and not block.isfinite().all():
                raise InputError(
                    f"{key!r} has numbers that are not finite in {dtype}; export with --dtype bf16 or fp32"
                )
            yield as_bytes(block)

    return Part(key, _NAMES[dtype], shape, blocks)


def _base_rows(key: str, there: _Stored) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        with safe_open(there.file, framework="pt") as handle:
            return handle.get_slice(key)[start:stop] if there.shape else handle.get_tensor(key)

    return rows


def _bytes_of(there: _Stored, num_bytes: int) -> Iterator[bytes]:
    with there.file.open("rb") as file:
        file.seek(there.offset)
        while num_bytes:
            block = file.read(min(_BLOCK, num_bytes))
            if not block:
                raise InputError(f"{there.file} is cut short; copy or download it again")
            num_bytes -= len(block)
            yield block
