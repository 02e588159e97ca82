"""Residual-stream directions -> a basis per parameter, closed over frozen neighbours. Ours.

A direction u of the residual stream is written by every module that adds to it, so each of those gets u itself. With
o_proj or down_proj blocked, or frozen, a fine-tune can still write u through them, by changing what they are fed:
- attention: u^T W_O dv. Every query head weighs tokens by its own attention, so all of their terms must vanish alone:
  query head h gives the direction W_O[:, h]^T u of *its* key-value head. Exact for a change of v alone.
- MLP: W_down^T u on the outputs of the neighbours. Exact for the linear map W_down dW; the activation and the gate
  between them weigh each neuron by itself, so this blocks the direction that is common to all tokens, not every token.

Legend: hidden is the width of the residual stream, k the number of directions, hd the size of a head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_dist.architecture import (
    WRITE_MODULES,
    decoder_layers,
    is_conv1d,
    linear_modules,
    logical_shape,
)
from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.base_weights import module_reader
from grasp_dist.detection.sources.models import model_skeleton
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_reference, read_header, tensor_files
from grasp_dist.subspaces import independent_columns, orthonormalise

__all__ = ["close_residual_basis"]

# Norms that stand between a module's output and the residual stream (Gemma 2 and 3, OLMo 2 and 3, GLM-4).
_POST_NORMS = ("post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
# Layouts of fused projections by model type. Values behind all queries and keys; per group of heads, its queries, then
# its key, then its value; gate rows, then up rows.
_IN_A_ROW = ("phi3", "gpt2", "mpt")
_BY_GROUP = ("gpt_neox", "bloom", "falcon")
_HALVES = ("phi3", "glm")
# Directions of one head that are this much weaker than its strongest are rounding.
_NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class _Heads:
    """Where v stands in the output of an attention projection: the first row of each key-value head."""

    starts: list[int]
    size: int


def close_residual_basis(
    directions: Tensor | Mapping[int, Tensor],
    model: nn.Module | str | os.PathLike[str],
    *,
    neighbours: bool = True,
) -> SpuriousBasis:
    """The write-side basis that keeps a fine-tune from writing `directions` into the residual stream.

    directions: (hidden, k) for all decoder layers, or {layer index: (hidden, k)}; independent columns, in order of
    importance. model: a model directory (its weights are read one at a time) or a module that holds whole weights.
    neighbours: also close over v_proj, up_proj, gate_proj and their fused forms; without, only the writing modules.

    The columns of attention neighbours stand in order of strength (their singular values are kept beside them) and
    number up to heads * k: `truncate` cuts every tensor at the same count, so choose k here instead.

    Raises `InputError` for directions that do not fit, for layers whose outputs are normalised before they are added,
    and for a neighbour whose layout is not known here.
    """
    reference: dict[str, Any] = {"id": None, "revision": None, "hash": None}
    if isinstance(model, nn.Module):
        skeleton, read = model, module_reader(model)
    else:
        reference = model_reference(model)
        skeleton, read = model_skeleton(Path(model)), _file_reader(Path(model))
    num_heads, model_type = _attention_config(skeleton)
    layers = decoder_layers(skeleton)
    modules = linear_modules(skeleton)

    tensors: dict[str, Tensor] = {}
    spectra: dict[str, Tensor] = {}
    for index, columns in _per_layer(directions, len(layers)).items():
        layer_name, layer = layers[index]
        _check_post_norm(layer_name, layer)
        writers = [n for n in modules if n.startswith(f"{layer_name}.") and n.rpartition(".")[2] in WRITE_MODULES]
        if not writers:
            raise InputError(f"layer {layer_name!r} has no known module that writes to the residual stream")
        for name in writers:
            hidden, _ = logical_shape(modules[name])
            tensors[f"{name}.weight.write"] = _orthonormal_directions(columns, hidden, name)
            parent, _, leaf = name.rpartition(".")
            if not neighbours:
                continue
            feeders = [n for s in WRITE_MODULES[leaf] if (n := f"{parent}.{s}") in modules]
            if not feeders:
                raise InputError(f"what feeds {name!r} is not known here, so it cannot be closed; use neighbours=False")
            stored = read(f"{name}.weight").double()
            weight = stored.mT if is_conv1d(modules[name]) else stored
            fed = weight.mT @ tensors[f"{name}.weight.write"]
            for feeder in feeders:
                out, _ = logical_shape(modules[feeder])
                heads = _value_heads(feeder, out, fed.shape[0], num_heads, model_type)
                if heads is not None:
                    vectors, strengths = _attention_columns(fed, heads, out, num_heads)
                    spectra[f"{feeder}.weight"] = strengths
                else:
                    vectors = _mlp_columns(fed, out, feeder, model_type)
                tensors[f"{feeder}.weight.write"] = vectors
    weights = {key.removesuffix(".write") for key in tensors}
    return SpuriousBasis.from_tensors(
        tensors,
        singular_values=spectra,
        shapes={weight: logical_shape(modules[weight.removesuffix(".weight")]) for weight in weights},
        provenance={
            "base_model": reference,
            "method": "residual_closure",
            "settings": {"neighbours": neighbours},
            "seeds": [],
        },
    )


def _attention_columns(fed: Tensor, heads: _Heads, out: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Columns (out, n) over the value rows, and their strengths (n,), strongest first.

    fed: W_O^T u, (num_heads * hd, k). Query head h reads key-value head h // (num_heads / key-value heads).
    """
    columns, strengths = [], []
    by_head = fed.unflatten(0, (num_heads, heads.size))
    group = num_heads // len(heads.starts)
    for index, start in enumerate(heads.starts):
        stacked = by_head[index * group : (index + 1) * group].permute(1, 0, 2).flatten(1)
        left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
        keep = int((values > _NEGLIGIBLE * values[0]).sum())
        placed = torch.zeros(out, keep, dtype=fed.dtype)
        placed[start : start + heads.size] = left[:, :keep]
        columns.append(placed)
        strengths.append(values[:keep])
    strength = torch.cat(strengths)
    order = strength.argsort(descending=True, stable=True)
    return torch.cat(columns, dim=1)[:, order], strength[order]


def _mlp_columns(fed: Tensor, out: int, feeder: str, model_type: str) -> Tensor:
    """Columns (out, n): W_down^T u, in the order of u; for a fused gate-and-up once in each half."""
    inner = fed.shape[0]
    columns, _ = independent_columns(fed[:, :0], fed)
    if out == inner:
        return columns
    if out == 2 * inner and model_type in _HALVES:
        blank = torch.zeros_like(columns)
        pairs = torch.stack([torch.cat([columns, blank]), torch.cat([blank, columns])], dim=2)
        return pairs.flatten(1)
    raise InputError(
        f"{feeder!r} has {out} outputs for {inner} neurons, a layout that is not known here; use neighbours=False"
    )


def _value_heads(feeder: str, out: int, inner: int, num_heads: int, model_type: str) -> _Heads | None:
    """Where the values are in an attention projection's output; None for a neighbour in an MLP."""
    leaf = feeder.rpartition(".")[2]
    if leaf not in ("v_proj", "qkv_proj", "c_attn", "Wqkv", "query_key_value"):
        return None
    if leaf != "v_proj" and model_type not in _IN_A_ROW + _BY_GROUP:
        raise InputError(
            f"where {feeder!r} of a {model_type!r} keeps its values is not known here; use neighbours=False"
        )
    size, rest = divmod(inner, num_heads)
    num_kv = out // size if leaf == "v_proj" else (out // size - num_heads) // 2
    expected = num_kv * size if leaf == "v_proj" else (num_heads + 2 * num_kv) * size
    if rest or num_kv < 1 or num_heads % num_kv or expected != out:
        raise InputError(
            f"{feeder!r} has {out} outputs, which {num_heads} heads of {size} do not explain; use neighbours=False"
        )
    if leaf == "v_proj":
        return _Heads([head * size for head in range(num_kv)], size)
    if model_type in _BY_GROUP:
        stride = (num_heads // num_kv + 2) * size
        return _Heads([(head + 1) * stride - size for head in range(num_kv)], size)
    return _Heads([(num_heads + num_kv + head) * size for head in range(num_kv)], size)


def _per_layer(directions: Tensor | Mapping[int, Tensor], num_layers: int) -> dict[int, Tensor]:
    if isinstance(directions, Tensor):
        return dict.fromkeys(range(num_layers), directions)
    if not directions:
        raise InputError("no directions are given; give (hidden, k) for at least one layer")
    if unknown := [index for index in directions if not 0 <= index < num_layers]:
        raise InputError(f"directions are given for layer {unknown[0]}, but the model has layers 0 to {num_layers - 1}")
    return dict(sorted(directions.items()))


def _orthonormal_directions(columns: Tensor, hidden: int, name: str) -> Tensor:
    if columns.ndim != 2 or columns.shape[0] != hidden or not 1 <= columns.shape[1] <= hidden:
        raise InputError(
            f"the directions have shape {tuple(columns.shape)}, but {name!r} writes {hidden} numbers; (hidden, k) is "
            "wanted"
        )
    if not columns.isfinite().all():
        raise InputError(f"the directions for {name!r} hold NaN or infinity")
    wide = columns.detach().cpu().double()
    _, kept = independent_columns(wide[:, :0], wide)
    if len(kept) < columns.shape[1]:
        raise InputError(
            f"{len(kept)} of the {columns.shape[1]} directions for {name!r} are independent (columns {kept}); leave"
            " out the others"
        )
    return orthonormalise(wide)


def _check_post_norm(name: str, layer: nn.Module) -> None:
    if found := [norm for norm in _POST_NORMS if isinstance(getattr(layer, norm, None), nn.Module)]:
        raise InputError(
            f"layer {name!r} normalises what it adds to the residual stream ({found[0]}), so a residual direction is "
            "not one of its modules' outputs; give a basis per parameter (SpuriousBasis.from_tensors) or detect one"
        )


def _attention_config(model: nn.Module) -> tuple[int, str]:
    """(number of query heads, model type)."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    if not (heads := getattr(config, "num_attention_heads", None)):
        raise InputError(
            f"{type(model).__name__} does not tell its number of attention heads (config.num_attention_heads)"
        )
    return int(heads), str(getattr(config, "model_type", ""))


def _file_reader(folder: Path) -> Callable[[str], Tensor]:
    from safetensors import safe_open

    files = {name: file for file in tensor_files(folder) for name in read_header(file)}

    def read(name: str) -> Tensor:
        # A checkpoint may leave out the prefix of the causal LM's own names ("transformer.", "model.").
        key = next((key for key in files if key == name or name.endswith(f".{key}")), None)
        if key is None:
            raise InputError(f"{folder} has no weight {name!r}; give a complete model directory")
        with safe_open(files[key], framework="pt") as opened:
            return opened.get_tensor(key)

    return read
