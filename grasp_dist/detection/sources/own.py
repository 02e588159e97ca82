"""A checkpoint step folder of this package's own training: safetensors, no pickle."""

from __future__ import annotations

from pathlib import Path

from grasp_dist.detection.sources.source import TensorSource
from grasp_dist.training.checkpoints.reader import Shards

__all__ = ["open_own"]

_MODEL = "model."


def open_own(folder: Path) -> TensorSource:
    """The trained weights in a step folder, all of whose files are held against their checksums first.

    Raises `InputError` for a checkpoint that is unfinished or damaged.
    """
    shards = Shards(folder)
    names = {name.removeprefix(_MODEL): name for name in shards.names() if name.startswith(_MODEL)}
    return TensorSource(
        path=folder,
        kind=f"checkpoint of step {shards.record.get('step')}",
        shapes={name: shards.shape(key) for name, key in names.items()},
        read=lambda name: shards.read(names[name]),
        trained=frozenset(names),
        lora=shards.record.get("adapter_config"),
        canonical=True,
        base_model=shards.record.get("base_model") or {},
    )
