"""What a causal language model is made of: decoder layers, linear modules, who writes to the residual stream, names.

Works on any `transformers` causal LM, wrapped by PEFT, `fully_shard`, DDP or not, on the meta device too. Torch only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from grasp_dist.errors import InputError

__all__ = [
    "WRITE_MODULES",
    "canonical_name",
    "decoder_layers",
    "is_conv1d",
    "is_linear",
    "linear_modules",
    "logical_shape",
    "resolve_modules",
]

WRITE_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "o_proj": ("v_proj", "qkv_proj"),
        "down_proj": ("up_proj", "gate_proj", "gate_up_proj"),
        "c_proj": ("c_attn", "c_fc"),
        "dense": ("query_key_value", "v_proj"),
        "dense_4h_to_h": ("dense_h_to_4h",),
        "out_proj": ("v_proj", "Wqkv", "qkv_proj"),
        "fc2": ("fc1",),
        "fc_out": ("fc_in",),
        "wo": ("wqkv",),
        "w2": ("w1", "w3"),
    }
)
"""Leaf names of the linear modules whose output is added to the residual stream, each with its frozen neighbours: the
siblings through whose outputs a fine-tune can write the same direction (Llama, Qwen, Gemma, Mistral and Phi-3; GPT-2;
GPT-NeoX and Falcon; OPT, GPT-J, Phi; InternLM2 and Mixtral)."""

# Segments that wrappers put into names, anywhere; and what they put in front.
_WRAPPER_SEGMENTS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer"})
_WRAPPER_PREFIXES = ("module.", "base_model.model.")


def canonical_name(name: str) -> str:
    """The base model's own name of a parameter or module, without what PEFT, FSDP, DDP, DeepSpeed, torch.compile and
    activation checkpointing put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)
    while prefix := next((prefix for prefix in _WRAPPER_PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's linear layer, whose weight is stored (in, out)."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, also where the weight is stored transposed."""
    rows, columns = module.weight.shape  # type: ignore[union-attr,misc]
    return (int(columns), int(rows)) if is_conv1d(module) else (int(rows), int(columns))


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(canonical name, module) of the layers that hold most of the model, in order; the units of `fully_shard`.

    The classes that the transformers model names in `_no_split_modules`; without such, the entries of the longest
    `nn.ModuleList`. Raises `InputError` if there is neither.
    """
    classes: set[str] = set()
    for module in model.modules():
        classes |= set(getattr(module, "_no_split_modules", None) or ())
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # fully_shard derives a class of its own, so the bases are looked at as well.
        if classes & {kind.__name__ for kind in type(module).__mro__}:
            name = canonical_name(name)
            if not any(name.startswith(f"{outer}.") for outer in layers):
                layers.setdefault(name, module)
    if layers:
        return list(layers.items())
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers; only models made of a stack of decoder layers can be used"
        )
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [(canonical_name(f"{name}.{index}"), layer) for index, layer in enumerate(longest)]


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{canonical name: linear module} of the base model, in order; an adapter's own matrices are left out."""
    return dict(_walk(model, ""))


def resolve_modules(model: nn.Module, modules: str | Sequence[str]) -> list[str]:
    """Canonical full names of the linear modules that a setting means, in the model's order.

    "write": those of the decoder layers that write to the residual stream (`WRITE_MODULES`); "all": every linear module
    of the decoder layers; "everything": also those outside of them (the head); a list: full names, or endings such as
    "o_proj" or "mlp.down_proj". Raises `InputError` for a name that no linear module has, with the nearest ones.
    """
    every = linear_modules(model)
    if modules == "everything":
        return list(every)
    if isinstance(modules, str):
        if modules not in ("write", "all"):
            raise InputError(f"modules {modules!r} is not 'write', 'all', 'everything' or a list of module names")
        prefixes = tuple(f"{name}." for name, _ in decoder_layers(model))
        inner = [name for name in every if name.startswith(prefixes)]
        found = [name for name in inner if modules == "all" or _leaf(name) in WRITE_MODULES]
        if not found:
            raise InputError(
                f"{type(model).__name__} has no known module that writes to the residual stream; its linear modules "
                f"are {', '.join(sorted({_leaf(name) for name in inner})) or 'none'}: list the writing ones in "
                "training.modules"
            )
        return found
    chosen: set[str] = set()
    for wanted in modules:
        ending = canonical_name(wanted).removesuffix(".weight")
        hits = [name for name in every if name == ending or name.endswith(f".{ending}")]
        if not hits:
            raise InputError(_unknown(model, wanted, ending, every))
        chosen.update(hits)
    if not chosen:
        raise InputError("the list of modules is empty; name at least one linear module, or use 'write' or 'all'")
    return [name for name in every if name in chosen]


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if is_linear(module):
        yield canonical_name(prefix), module
        return
    wrapped = getattr(module, "base_layer", None)
    children = [("base_layer", wrapped)] if isinstance(wrapped, nn.Module) else module.named_children()
    for name, child in children:
        yield from _walk(child, f"{prefix}.{name}" if prefix else name)


def _unknown(model: nn.Module, wanted: str, ending: str, every: Mapping[str, nn.Module]) -> str:
    others = {canonical_name(name) for name, _ in model.named_modules()} - set(every)
    if any(name == ending or name.endswith(f".{ending}") for name in others):
        return f"module {wanted!r} of {type(model).__name__} is not linear; name linear modules, such as o_proj"
    leaves = sorted({_leaf(name) for name in every})
    near = difflib.get_close_matches(_leaf(ending), leaves, n=3) or difflib.get_close_matches(ending, list(every), n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its linear modules are {', '.join(leaves)}"
    return f"{type(model).__name__} has no linear module {wanted!r}; {hint}"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
