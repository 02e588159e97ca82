"""Model directories: weights under the names that transformers gives them in memory, whatever the files call them.

transformers renames weights while it loads, and stacks experts. The same rules are applied here to the tensors of one
weight at a time, so that no more than that is in memory.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grasp_dist.detection.sources.source import TensorSource
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import read_header, tensor_files

__all__ = ["model_skeleton", "open_files", "open_model"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def model_skeleton(folder: Path) -> nn.Module:
    """The model of a directory without its weights: names and shapes as transformers has them.

    No code of the directory's own is run. Raises `InputError` if it is no causal language model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not the directory of a causal language model: {error}") from None


def open_files(folder: Path) -> TensorSource:
    """The safetensors of a directory under the files' own names. Pickles (pytorch_model.bin) are never opened.

    Raises `InputError` if there are none.
    """
    headers = {name: (file, entry) for file in tensor_files(folder) for name, entry in read_header(file).items()}
    shapes = {name: tuple(entry["shape"]) for name, (_, entry) in headers.items()}

    def read(name: str) -> Tensor:
        file = headers[name][0]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}); copy or download it again") from None

    return TensorSource(folder, "model directory", shapes, read, folders=(folder,))


def open_model(folder: Path, skeleton: nn.Module) -> TensorSource:
    """The weights of a model directory under the names of `skeleton`, its architecture without weights.

    Raises `InputError` as `open_files`, and for experts that do not fit together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    files = open_files(folder)
    known = set(skeleton.state_dict().keys())
    transforms = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix, places = getattr(skeleton, "base_model_prefix", ""), dict.fromkeys(known, True)

    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(files.shapes, key=_natural):
        name, pattern = (key, None) if key in known else rename_source_key(key, renamings, converters, prefix, places)  # type: ignore[arg-type]
        if pattern is None:
            shapes[name], readers[name] = files.shapes[key], lambda key=key: files.read(key)  # type: ignore[misc]
        else:
            groups[name].append((key, pattern))

    def convert(target: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        members = groups[target]
        converter = copy.deepcopy(next(entry for entry in converters if members[0][1] in entry.source_patterns))
        for key, pattern in members:
            converter.add_tensor(target, key, pattern, read(key))  # type: ignore[arg-type]
        try:
            parts = converter.convert(target, model=skeleton, config=skeleton.config)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{target!r} in {folder} cannot be put together ({error}); copy the model again") from None
        return {name: part[0] if isinstance(part, list) else part for name, part in parts.items()}

    for target in groups:
        for name, part in convert(target, lambda key: torch.empty(files.shapes[key], device="meta")).items():
            shapes[name] = tuple(part.shape)
            readers[name] = lambda target=target, name=name: convert(target, files.read)[name]  # type: ignore[misc]
    return TensorSource(folder, files.kind, shapes, lambda name: readers[name](), folders=(folder,))


def _natural(key: str) -> list[Any]:
    """Sorts expert 10 behind expert 9, as transformers does."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
