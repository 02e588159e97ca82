"""What an update writes into, and reads from, the residual stream, through frozen neighbours where it must. Ours.

Writes: dW itself for a module that writes to the stream; W_O[:, h] dW_V for every query head h, since every head weighs
tokens by its own attention; W_down dW_up and W_down dW_gate, the linear map without activation and gate.
Reads: dW diag(g), g the gain of the norm before the module; for the modules that write, what they read of the stream
through the frozen ones: dW_O[:, h] W_V diag(g) for every query head h, dW_down W_up diag(g).

Legend: hidden is the width of the stream, D = U diag(S) V^T an update of (out, in) with m values, hd a head's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grasp_dist.architecture import WRITE_MODULES, decoder_layers, linear_modules, logical_shape
from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.base_weights import BaseWeights
from grasp_dist.detection.detectors.factors import Factors
from grasp_dist.errors import InputError
from grasp_dist.subspaces import independent_columns

__all__ = ["Stream", "close_residual_reads"]

# What is added to the stored weight of a norm, by model type: Gemma stores its distance from 1.
_GAIN_OFFSET = {"llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "phi3": 0.0, "gemma": 1.0}
# The norm before a module, by its leaf name.
_NORM = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "input_layernorm") | dict.fromkeys(
    ("gate_proj", "up_proj", "gate_up_proj"), "post_attention_layernorm"
)
# The module that writes what a module's output feeds, and the one through which a writing module reads the stream.
_FEEDS = {"v_proj": "o_proj", "up_proj": "down_proj", "gate_proj": "down_proj"}
_FED_BY = {"o_proj": "v_proj", "down_proj": "up_proj"}


class Stream:
    """The residual stream of a base model, as its modules write and read it. Weights are read one at a time."""

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self.modules = linear_modules(base.skeleton)
        self.layers = [name for name, _ in decoder_layers(base.skeleton)]
        config: Any = getattr(base.skeleton, "config", None)
        config = getattr(config, "text_config", None) or config
        self.num_heads = int(getattr(config, "num_attention_heads", 0))
        self.model_type = str(getattr(config, "model_type", ""))

    def writes(self, name: str, update: Factors, *, through: bool = True) -> Tensor | None:
        """(hidden, c): what the update of weight `name` writes into the stream, its squared norm the energy; None for a
        weight that does not write, or only through another where `through` is False.

        Raises `InputError` for heads that do not fit.
        """
        module, leaf = self._leaf(name)
        strong = update.left * update.values
        if leaf in WRITE_MODULES:
            return strong
        writer = self._sibling(module, _FEEDS.get(leaf))
        if writer is None or not through:
            return None
        weight = self._base.read(f"{writer}.weight")
        if leaf != "v_proj":
            return weight @ strong
        return torch.cat([weight[:, q] @ strong[kv] for q, kv in self._heads(writer, module)], dim=1)

    def reads(self, name: str, update: Factors, *, through: bool = True) -> Tensor | None:
        """(hidden, c): what the update of weight `name` reads from the stream, as `writes`.

        Raises `InputError` for heads that do not fit, and a model type whose norms are not known here.
        """
        module, leaf = self._leaf(name)
        strong = update.right * update.values
        if leaf in _NORM:
            return self.gain(module).unsqueeze(1) * strong
        reader = self._sibling(module, _FED_BY.get(leaf))
        if reader is None or not through:
            return None
        weight, gain = self._base.read(f"{reader}.weight"), self.gain(reader).unsqueeze(1)
        if leaf != "o_proj":
            return gain * (weight.mT @ strong)
        return gain * torch.cat([weight[kv].mT @ strong[q] for q, kv in self._heads(module, reader)], dim=1)

    def gain(self, module: str) -> Tensor:
        """(hidden,) fp64: the scale of the norm before a module that reads the stream."""
        if self.model_type not in _GAIN_OFFSET:
            raise InputError(
                f"which norms stand before the readers of a {self.model_type!r} is not known here; use side 'write'"
            )
        layer = next(name for name in self.layers if module.startswith(f"{name}."))
        norm = self._base.read(f"{layer}.{_NORM[module.rpartition('.')[2]]}.weight")
        return norm + _GAIN_OFFSET[self.model_type]

    def read_columns(self, module: str, directions: Tensor, *, through: bool = True) -> Tensor | None:
        """(in, n) orthonormal, fp64: what an update dW of `module` must not read so that it does not read directions
        (hidden, k) of the stream: diag(g) d; for o_proj W_V diag(g) d of every query head, for down_proj
        W_up diag(g) d.
        None for a module that does not read the stream, or only through another where `through` is False."""
        leaf = module.rpartition(".")[2]
        if leaf in _NORM:
            columns = self.gain(module).unsqueeze(1) * directions
        else:
            reader = self._sibling(module, _FED_BY.get(leaf))
            if reader is None or not through:
                return None
            columns = self._base.read(f"{reader}.weight") @ (self.gain(reader).unsqueeze(1) * directions)
            if leaf == "o_proj":
                columns = _by_head(columns, self._heads(module, reader), logical_shape(self.modules[module])[1])
        return independent_columns(columns[:, :0], columns)[0]

    def _leaf(self, name: str) -> tuple[str, str]:
        module = name.removesuffix(".weight")
        return module, module.rpartition(".")[2]

    def _sibling(self, module: str, leaf: str | None) -> str | None:
        name = f"{module.rpartition('.')[0]}.{leaf}"
        return name if leaf is not None and name in self.modules else None

    def _heads(self, writer: str, values: str) -> Iterator[tuple[slice, slice]]:
        """(columns of o_proj, rows of v_proj) of every query head; several heads share the rows of their group."""
        inner, out = logical_shape(self.modules[writer])[1], logical_shape(self.modules[values])[0]
        size, rest = divmod(inner, self.num_heads) if self.num_heads else (0, 1)
        if rest or out % size or self.num_heads % (out // size):
            raise InputError(
                f"{values!r} has {out} outputs and {writer!r} {inner} inputs, which {self.num_heads} heads do not "
                "explain; use through=False"
            )
        group = self.num_heads // (out // size)
        for head in range(self.num_heads):
            yield slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)


def close_residual_reads(directions: Tensor, base: BaseWeights, *, through: bool = True) -> SpuriousBasis:
    """The read-side basis that keeps a fine-tune from reading `directions` of the residual stream, in every layer: the
    counterpart of `close_residual_basis`.

    directions: (hidden, k), independent columns in order of importance. through: also o_proj and down_proj, which read
    the stream through frozen neighbours. Exact for a change of one module alone, but for down_proj, before whose inputs
    the activation and the gate are left out. Raises `InputError` for directions that do not fit, a model without a
    known reader, and model types whose norms are not known here.
    """
    stream = Stream(base)
    hidden = base.skeleton.get_input_embeddings().weight.shape[1]  # type: ignore[operator,union-attr]
    if directions.ndim != 2 or directions.shape[0] != hidden or not directions.isfinite().all():
        raise InputError(f"the directions have shape {tuple(directions.shape)}; finite ({hidden}, k) is wanted")
    tensors = {}
    for module in stream.modules:
        columns = stream.read_columns(module, directions.detach().cpu().double(), through=through)
        if columns is not None:
            tensors[f"{module}.weight.read"] = columns
    if not tensors:
        raise InputError("the model has no module that is known to read its residual stream; use side 'write'")
    return SpuriousBasis.from_tensors(
        tensors,
        shapes={
            key.removesuffix(".read"): logical_shape(stream.modules[key.removesuffix(".weight.read")])
            for key in tensors
        },
        provenance={
            "base_model": base.reference,
            "method": "residual_reads",
            "settings": {"through": through},
            "seeds": [],
        },
    )


def _by_head(values: Tensor, heads: Iterator[tuple[slice, slice]], inner: int) -> Tensor:
    """(inner, k * heads): each direction's values (rows of v_proj, k), once at the place of every query head."""
    placed = []
    for queries, rows in heads:
        block = torch.zeros(inner, values.shape[1], dtype=values.dtype)
        block[queries] = values[rows]
        placed.append(block)
    return torch.stack(placed, dim=2).flatten(1)
