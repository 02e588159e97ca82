"""What kind of checkpoint a directory is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grasp_dist.detection.sources.distributed import METADATA, has_sharding, open_pickled, open_safetensors
from grasp_dist.detection.sources.models import open_files
from grasp_dist.detection.sources.own import open_own
from grasp_dist.detection.sources.source import TensorSource
from grasp_dist.detection.sources.zero import find_tag, open_zero
from grasp_dist.errors import InputError

__all__ = ["open_source"]

_KINDS = (
    "a PEFT adapter (adapter_model.safetensors), a checkpoint step folder of grasp-dist (checkpoint.json), a "
    "torch.distributed.checkpoint directory (.metadata, or its safetensors shards), a DeepSpeed checkpoint (latest, "
    "global_step*) or a model directory (*.safetensors)"
)
# Where Accelerate and the Hugging Face Trainer put a sharded model in a checkpoint of theirs.
_NESTED = ("pytorch_model_fsdp_0",)
_STEP = re.compile(r"step-\d+")


def open_source(path: str | os.PathLike[str], *, trust: bool = False) -> TensorSource:
    """The tensors of a checkpoint directory of any kind that is known here.

    trust: unpickle what does not pass as plain tensors. Raises `InputError` for another kind of directory, and what the
    reader of the kind refuses.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; give the directory of {_KINDS}")
    if (folder / "checkpoint.json").is_file():
        return open_own(folder)
    for candidate in (folder, *(folder / name for name in _NESTED)):
        if (candidate / METADATA).is_file():
            return open_pickled(candidate, trust=trust)
    if (tag := find_tag(folder)) is not None:
        return open_zero(tag, trust=trust)
    if has_sharding(folder):
        if _STEP.fullmatch(folder.name):
            raise InputError(f"{folder} is an unfinished checkpoint: it has no checkpoint.json; give an earlier step's")
        return open_safetensors(folder)
    if any(folder.glob("*.safetensors")):
        return open_files(folder)
    pickled = next((file for end in ("bin", "pt", "pth", "ckpt") for file in sorted(folder.glob(f"*.{end}"))), None)
    if pickled is not None:
        raise InputError(
            f"{pickled} is a pickle, which can run code when read, and is not opened; load it where you trust it and "
            "save it as safetensors (save_pretrained does)"
        )
    raise InputError(f"{folder} is no checkpoint that is known here; give the directory of {_KINDS}")
