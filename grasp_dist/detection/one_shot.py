"""One-shot detection: the leading singular vectors of a LoRA fine-tune's update, weight by weight. Ours.

The baseline of detection: no further training. Deflation finds more (the routes that open when these are blocked).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.detection.checkpoint_adapter import read_update
from grasp_dist.detection.svd import NUMERICAL_RANK, low_rank_svd, numerical_rank
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_reference, tensor_shapes

__all__ = ["detect_basis"]


def detect_basis(
    source: str | os.PathLike[str],
    *,
    rank: int,
    side: Literal["write", "read", "both"] | str = "write",
    weights: Sequence[str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    lora_alpha: float | None = None,
    trust: bool = False,
) -> SpuriousBasis:
    """A basis of the `rank` leading singular vectors of each weight's update in a LoRA fine-tune.

    source: a PEFT adapter directory, or a training's checkpoint directory: of this package, of
    torch.distributed.checkpoint, or of DeepSpeed. lora_alpha: for a checkpoint without adapter_config.json in it or
    beside it. trust: unpickle what does not pass as plain tensors, which runs whatever code is in it.

    side: left singular vectors ("write"), right ones ("read"), or both. weights: names or endings ("o_proj"); default
    all that the adapter has. base_model: directory or hub id; default what the adapter names; a directory is held
    against the adapter's shapes. A weight whose update has fewer directions than `rank` contributes those it has, and
    one that was not changed contributes none. The whole spectrum of each update is kept beside the vectors.

    Raises `InputError` for what `read_update` refuses, a rank above the adapter's, or a base model that does not fit.
    """
    if side not in ("write", "read", "both"):
        raise InputError(f"side {side!r} is not one of 'write', 'read', 'both'")
    adapter = read_update(source, base_model=base_model, lora_alpha=lora_alpha, trust=trust)
    chosen = _choose(source, adapter.weights, weights)
    largest = max(update.rank for update in chosen.values())
    if not 1 <= rank <= largest:
        raise InputError(
            f"rank {rank} is asked of adapter {source}, whose updates have rank {largest}; choose a rank from 1 "
            f"to {largest}, or train the naive adapter at a larger one (training.lora.rank)"
        )
    base = _base_reference(source, adapter, base_model)

    spectra: dict[str, Tensor] = {}
    vectors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, update in chosen.items():
        left, values, right = low_rank_svd(update.A, update.B, update.scale)
        if keep := min(rank, numerical_rank(values)):
            spectra[name], vectors[name] = values, (left[:, :keep], right[:, :keep])
    floor = NUMERICAL_RANK * max((values[0].item() for values in spectra.values()), default=0.0)
    tensors = {}
    for name, (left, right) in vectors.items():
        if spectra[name][0] <= floor:
            continue
        if side in ("write", "both"):
            tensors[f"{name}.write"] = left
        if side in ("read", "both"):
            tensors[f"{name}.read"] = right
    found = {key.rpartition(".")[0] for key in tensors}
    if not found:
        raise InputError(f"adapter {source} changed none of the chosen weights; choose others, or train it longer")
    return SpuriousBasis.from_tensors(
        tensors,
        singular_values={name: spectra[name] for name in found},
        shapes={name: chosen[name].shape for name in found},
        provenance={
            "base_model": base,
            "method": "one_shot",
            "settings": {"rank": rank, "side": side, "weights": list(weights) if weights is not None else None},
            "seeds": [],
            "adapter_hash": adapter.hash,
        }
        | ({"source": adapter.source} if adapter.source is not None else {}),
    )


def _choose(
    path: str | os.PathLike[str], available: Mapping[str, LowRankUpdate], wanted: Sequence[str] | None
) -> dict[str, LowRankUpdate]:
    if wanted is None:
        return dict(available)
    chosen: set[str] = set()
    for name in wanted:
        ending = name if name.endswith(".weight") else f"{name}.weight"
        hits = [key for key in available if key == ending or key.endswith(f".{ending}")]
        if not hits:
            endings = {".".join(key.split(".")[-ending.count(".") - 1 :]) for key in available}
            near = difflib.get_close_matches(ending, sorted(endings), n=1, cutoff=0.0)
            raise InputError(
                f"adapter {path} has no update for {name!r}; the nearest that it has is "
                f"{near[0].removesuffix('.weight')!r}"
            )
        chosen.update(hits)
    if not chosen:
        raise InputError("the list of weights is empty; name at least one, or leave it out for all")
    return {key: update for key, update in available.items() if key in chosen}


def _base_reference(
    path: str | os.PathLike[str], adapter: AdapterUpdate, base_model: str | os.PathLike[str] | None
) -> dict[str, Any]:
    if base_model is None:
        known = {"id": adapter.base_model, "revision": adapter.revision, "hash": adapter.base_hash}
        if adapter.base_model is None or adapter.base_hash is not None:
            return known
        try:
            return model_reference(adapter.base_model, adapter.revision)
        except InputError:  # a hub id beside a folder of that name, or a path that holds another thing by now
            return known
    if Path(base_model).is_dir():
        _check_shapes(path, adapter, Path(base_model))
    same = str(base_model) == adapter.base_model
    return model_reference(base_model, adapter.revision if same else None)


def _check_shapes(path: str | os.PathLike[str], adapter: AdapterUpdate, folder: Path) -> None:
    """The base model's files must have the adapter's weights; a checkpoint may leave out a prefix of the names."""
    stored = tensor_shapes(folder)
    found = False
    for name, update in adapter.weights.items():
        shape = next((shape for key, shape in stored.items() if key == name or name.endswith(f".{key}")), None)
        if shape is None:
            continue
        found = True
        if shape not in (update.shape, update.shape[::-1]):
            raise InputError(
                f"adapter {path} updates {name!r} of shape {update.shape}, but in {folder} it is {shape}; the adapter "
                "belongs to another base model"
            )
    if not found:
        raise InputError(
            f"none of the weights that adapter {path} updates ({next(iter(adapter.weights))!r}, ..) is in {folder}; "
            "the adapter belongs to another base model"
        )
