"""Detection from a full fine-tune: the leading singular vectors of what it changed, weight by weight. Ours.

The update is the difference of two models, so a weight is read from both, subtracted, taken apart and dropped before
the next: memory is that of the largest single weight. Singular vectors by subspace iteration from random directions
(`torch.svd_lowrank`; Halko, Martinsson and Tropp, 2009, algorithm 5.1).

Legend: W (out, in), or (experts, out, in) of stacked experts; k the rank, q = k + oversampling.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grasp_dist.architecture import (
    WRITE_MODULES,
    canonical_name,
    decoder_layers,
    is_conv1d,
    linear_modules,
    resolve_modules,
)
from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.sources import TensorSource, base_names, model_skeleton, open_model, open_source
from grasp_dist.detection.svd import NUMERICAL_RANK, numerical_rank
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_reference

__all__ = ["detect_difference"]

_HALF = (torch.bfloat16, torch.float16)
_SAMPLE = 1024


@dataclass(frozen=True)
class _Weight:
    """A weight of the base model. `shape` as stored; `transposed`: it is stored (.., in, out)."""

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def logical(self) -> tuple[int, int]:
        """(out, in)."""
        *_, rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class _Found:
    """Of one weight: U (.., out, k), S (k,), of experts the largest, V (.., in, k); the norm of the whole update."""

    left: Tensor
    values: Tensor
    right: Tensor
    norm: float


def detect_difference(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    rank: int,
    side: Literal["write", "read", "both"] | str = "write",
    modules: str | Sequence[str] = "write",
    oversampling: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
    trust: bool = False,
) -> SpuriousBasis:
    """A basis of the `rank` leading singular vectors of tuned - base, for each weight of the chosen modules.

    tuned: a model directory, or a full fine-tune's checkpoint directory of any kind that `open_source` knows; base: the
    model directory (safetensors) that was trained. modules: "write", "all", "everything" or names, as in training;
    stacked experts among them get directions of their own, (experts, out, k). oversampling, power_iterations: accuracy
    of the randomized decomposition; weights too small for it are decomposed exactly. The same seed gives the same
    basis. Weights that did not change, or by less than rounding next to the others, contribute none.

    Where a 16-bit dtype was trained or saved, the base is rounded to it first, so that its rounding is no update.

    Raises `InputError` for weights that are missing or of another shape, by name; for content that is not finite; and
    for models between which nothing changed.
    """
    if side not in ("write", "read", "both"):
        raise InputError(f"side {side!r} is not one of 'write', 'read', 'both'")
    if rank < 1 or oversampling < 0 or power_iterations < 0:
        raise InputError(
            f"rank {rank}, oversampling {oversampling} and power_iterations {power_iterations} must be at least 1, 0, 0"
        )
    tuned, base = Path(tuned), Path(base)
    reference = model_reference(base)
    if reference["hash"] is None:
        raise InputError(f"there is no model directory {base}; give the one that was fine-tuned, on this machine")
    skeleton = model_skeleton(base)
    chosen = _choose(skeleton, modules)
    before = open_model(base, skeleton)
    after, keys = _open_tuned(tuned, skeleton, trust)
    pairs = [weight for weight in chosen if _check(weight, before, after, keys)]
    largest = max(min(weight.logical) for weight in chosen)
    if rank > largest:
        raise InputError(f"rank {rank} is asked of weights of at most {largest} directions; choose a smaller one")

    found: dict[str, _Found] = {}
    digest = hashlib.sha256()
    with torch.no_grad():
        for weight in _progress(pairs):
            update = _update(weight, before, after, keys[weight.name], digest)
            if update is not None:
                found[weight.name] = _leading(update, rank, oversampling, power_iterations, f"{seed}:{weight.name}")
            del update
    floor = NUMERICAL_RANK * max((entry.values[0].item() for entry in found.values()), default=0.0)
    found = {name: entry for name, entry in found.items() if entry.values[0] > floor}
    if not found:
        raise InputError(
            f"nothing changed between {base} and {tuned} in the {len(chosen)} chosen weights ({chosen[0].name!r}, ..); "
            "give the model as it was before training as the base, or choose the modules that were trained"
        )
    shapes = {weight.name: weight.logical for weight in chosen if weight.name in found}
    sides = [("write", "left")] * (side != "read") + [("read", "right")] * (side != "write")
    return SpuriousBasis.from_tensors(
        {f"{name}.{which}": getattr(entry, vectors) for name, entry in found.items() for which, vectors in sides},
        singular_values={name: entry.values for name, entry in found.items()},
        shapes=shapes,
        provenance={
            "base_model": reference,
            "method": "full_difference",
            "settings": {
                "rank": rank,
                "side": side,
                "modules": modules if isinstance(modules, str) else list(modules),
                "oversampling": oversampling,
                "power_iterations": power_iterations,
            },
            "seeds": [seed],
            "source": after.kind,
            "tuned_hash": digest.hexdigest(),
            "update_norm": {name: entry.norm for name, entry in found.items()},
        },
    )


def _choose(skeleton: nn.Module, modules: str | Sequence[str]) -> list[_Weight]:
    """The weights that a setting means: of linear modules, and stacks of experts."""
    linear = linear_modules(skeleton)
    layers = tuple(f"{name}." for name, _ in decoder_layers(skeleton))
    stacks: dict[str, _Weight] = {}
    for owner, module in skeleton.named_modules():
        for leaf, parameter in module._parameters.items():
            name = canonical_name(f"{owner}.{leaf}")
            if parameter is not None and parameter.ndim == 3 and name.startswith(layers):
                stacks[name] = _Weight(name, tuple(parameter.shape), bool(getattr(module, "is_transposed", False)))
    if isinstance(modules, str):
        names = resolve_modules(skeleton, modules)
        experts = [n for n in stacks if modules != "write" or n.rpartition(".")[2] in WRITE_MODULES]
    else:
        hits = {want: [n for n in stacks if n == want or n.endswith(f".{want}")] for want in modules}
        experts = [name for name in stacks if any(name in found for found in hits.values())]
        rest = [want for want in modules if not hits[want] or any(_ends(n, want) for n in linear)]
        names = resolve_modules(skeleton, rest) if rest or not experts else []
    weights = [_Weight(f"{n}.weight", tuple(linear[n].weight.shape), is_conv1d(linear[n])) for n in names]  # type: ignore[arg-type,union-attr]
    return [*weights, *(stacks[name] for name in experts)]


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _open_tuned(tuned: Path, skeleton: nn.Module, trust: bool) -> tuple[TensorSource, dict[str, str]]:
    """The fine-tune, and {base model's name: its name there}."""
    source = open_source(tuned, trust=trust)
    if any(".lora_" in name for name in source.shapes):
        raise InputError(
            f"{tuned} holds LoRA factors, not a full fine-tune; give it as --adapter (detect_basis in Python)"
        )
    if source.kind == "model directory":
        source = open_model(tuned, skeleton)
        return source, {name: name for name in source.shapes}
    return source, base_names(source, source.shapes, skeleton.state_dict().keys())


def _check(weight: _Weight, before: TensorSource, after: TensorSource, keys: dict[str, str]) -> bool:
    """Whether the weight is in both models, of its shape; False for one that was not trained."""
    if weight.name not in before.shapes:
        raise InputError(f"{before.path} has no weight {weight.name!r}, which its config.json asks for; copy it again")
    if weight.name not in keys:
        if after.trained is not None:
            return False
        near = difflib.get_close_matches(weight.name, sorted(after.shapes), n=1)
        hint = f"; the nearest that it has is {near[0]!r}" if near else ""
        raise InputError(
            f"{after.path} has no weight {weight.name!r}, which {before.path} has{hint}; it is of another model"
        )
    key = keys[weight.name]
    for source, shape in ((before, before.shapes[weight.name]), (after, after.shapes[key])):
        if shape != weight.shape:
            raise InputError(
                f"{weight.name!r} has shape {shape} in {source.path}, but {weight.shape} by {before.path}/config.json; "
                "the two are of different models"
            )
    return True


def _update(weight: _Weight, before: TensorSource, after: TensorSource, key: str, digest: Any) -> Tensor | None:
    """tuned - base, fp32, (.., out, in); None where it is zero. Raises `InputError` unless it is finite."""
    old, new = before.read(weight.name), after.read(key)
    rounded = after.rounded_to or (new.dtype if new.dtype in _HALF else None)
    if rounded is not None and old.dtype not in _HALF:
        old = old.to(rounded)
    head = new.flatten()[: _SAMPLE // new.element_size()]
    digest.update(
        f"{weight.name} {new.dtype} {weight.shape}".encode() + head.contiguous().view(torch.uint8).numpy().tobytes()
    )
    update = new.to(torch.float32, copy=True)
    del new, head
    update.sub_(old)
    del old
    if not update.isfinite().all():
        raise InputError(
            f"{weight.name!r} holds NaN or infinity in {before.path} or {after.path}; give a model whose training did "
            "not diverge"
        )
    if not update.any():
        return None
    return update.mT if weight.transposed else update


def _leading(update: Tensor, rank: int, oversampling: int, power_iterations: int, key: str) -> _Found:
    """The leading singular vectors of (.., out, in). Their signs: the largest entry of each left one is positive.

    Experts share their number: one that changed in fewer directions gets orthogonal ones of no strength beside them.
    """
    sketch, small = rank + oversampling, min(update.shape[-2:])
    if sketch >= small:
        left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
        right = right.mT
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
            left, values, right = torch.svd_lowrank(update, q=sketch, niter=power_iterations)
    strongest = values.reshape(-1, values.shape[-1]).amax(dim=0)
    keep = min(rank, numerical_rank(strongest))
    left, values, right = left[..., :keep], strongest[:keep], right[..., :keep]
    peaks = left.gather(-2, left.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(left)
    norm = torch.linalg.vector_norm(update, dtype=torch.float64).item()
    return _Found((left * signs).contiguous(), values, (right * signs).contiguous(), norm)


def _progress(weights: Sequence[_Weight]) -> Iterator[_Weight]:
    """The weights, with a bar on a terminal."""
    if not sys.stderr.isatty():
        yield from weights
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(weights, "comparing weights", console=Console(stderr=True), transient=True)
