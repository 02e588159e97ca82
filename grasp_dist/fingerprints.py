"""What identifies a base model: its hub id and revision, or a hash of a local directory. Reads headers only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError

__all__ = ["model_fingerprint", "model_reference", "read_header", "tensor_files", "tensor_shapes"]

# Rewritten by every save_pretrained, without a change of the model.
VOLATILE = ("transformers_version", "_name_or_path")
_SAMPLE = 1024


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a local model: its config.json; name, dtype, shape and first KiB of every tensor.

    Independent of how the files are sharded. The samples tell a base from its instruct version, or two trainings of one
    architecture; they are no guard against manipulation. Raises `InputError` for a folder without config.json or
    safetensors.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} has no readable config.json ({error}); give the directory of a model") from None
    tensors = {}
    for path in tensor_files(folder):
        header = read_header(path)
        with path.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                file.seek(data + start)
                sample = file.read(min(_SAMPLE, stop - start))
                tensors[name] = [entry["dtype"], entry["shape"], hashlib.sha256(sample).hexdigest()]
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps([stable, tensors], sort_keys=True).encode()).hexdigest()


def model_reference(path: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """What a basis says about its base model: {"id", "revision", "hash"}; the hash is None for a hub id."""
    local = Path(path).is_dir()
    return {"id": str(path), "revision": revision, "hash": model_fingerprint(path) if local else None}


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises `InputError` if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{folder} has no *.safetensors; save the model with save_pretrained (safetensors is its default format)"
        )
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape as stored} over all safetensors files of a model directory."""
    return {name: tuple(entry["shape"]) for file in tensor_files(folder) for name, entry in read_header(file).items()}


def read_header(path: Path) -> dict[str, Any]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file, without its metadata entry.

    Raises `InputError` for a file that has no whole header.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("it is cut short")
            header = json.loads(file.read(size))
            return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); copy or download it again") from None
