"""How far a fine-tune moved the activations along the basis, next to random directions of the same rank (ours).

Per weight and side, with h the module's output (write) or input (read) on the prompts of the drift probes:

    mean over tokens |Q^T (h_model - h_base)|,   Q the basis' columns, and again random columns of the same rank

A ratio of 1 means that the shift is no larger along the basis than anywhere. Of the base its projections
are kept, never whole activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.evaluation.batching import cut_batches, deal, evaluation_mode, forward_logits, pad
from grasp_dist.evaluation.probes import Probe
from grasp_dist.protected import protected_modules

if TYPE_CHECKING:
    from grasp_dist.training.parallel import Parallel

__all__ = ["ShiftMeter"]


class ShiftMeter:
    """Remembers the base's projected activations and measures other models of the same architecture against them.

    model: the base, as it is to be compared with; collective, as `measure` is. The prompts are those of the drift
    probes (of all probes if there is none), `limit` of them evenly spread. seed: of the random directions. A rank keeps
    the projections of its own batches: (tokens, 2 k) in fp32 on the CPU per weight and side. Raises `InputError`
    for a basis that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        basis: SpuriousBasis,
        probes: Sequence[Probe],
        parallel: Parallel,
        *,
        batch_size: int = 64,
        limit: int = 256,
        seed: int = 0,
    ) -> None:
        self._basis, self._parallel = basis, parallel
        self._prompts = _prompts(probes, limit)
        self._columns = _columns(basis, seed)
        spans = [(len(prompt), 0) for prompt in self._prompts]
        self._batches = deal(cut_batches(spans, batch_size=batch_size), parallel)
        self._base = list(self._projected(model))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The shift of `model` against the base, the same on every rank.

        {"prompts", "tokens", "pooled": {"basis", "random", "ratio"}, "sides": {side: as pooled}, "weights":
        {"<weight>.<side>": as pooled}}. Pooled and sides are means over weights, and their ratio is that of the means;
        a ratio is None where nothing moved along the random directions.
        """
        sums = torch.zeros(len(self._columns), 2, dtype=torch.float64)
        num_tokens = 0
        for base, now in zip(self._base, self._projected(model), strict=True):
            num_tokens += len(next(iter(now.values())))
            for place, key in enumerate(self._columns):
                along_basis, along_random = (now[key] - base[key]).double().chunk(2, dim=1)
                sums[place, 0] += along_basis.norm(dim=1).sum()
                sums[place, 1] += along_random.norm(dim=1).sum()
        total = torch.cat([sums.flatten(), torch.tensor([num_tokens], dtype=torch.float64)])
        total = self._parallel.sum_(total.to(self._parallel.device)).cpu()
        means = (total[:-1] / total[-1]).view(-1, 2)
        return _summary(list(self._columns), means, int(total[-1]), len(self._prompts))

    def _projected(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """{"<weight>.<side>": (tokens, 2 k)} for each of this rank's batches; (0, 2 k) for a dummy one."""
        taps: dict[str, Tensor] = {}
        for batch in self._batches:
            ids, mask = pad([self._prompts[i] for i in batch], self._parallel.device)
            with evaluation_mode(model), _tapped(model, self._basis, self._columns, taps):
                forward_logits(model, ids, mask, torch.zeros(1, dtype=torch.long, device=ids.device))
            real = mask.bool() if batch else torch.zeros_like(mask, dtype=torch.bool)
            # Some models run their MLP on (batch * tokens, dim).
            yield {key: taps[key].flatten(end_dim=-2)[real.flatten()].cpu() for key in self._columns}


def _prompts(probes: Sequence[Probe], limit: int) -> list[list[int]]:
    """Distinct token sequences; a row without a prompt gives its first text."""
    chosen = [probe for probe in probes if probe.config.role == "drift"] or probes
    rows = [row.prompt or row.continuations[0] for probe in chosen for row in probe.rows]
    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, rows))]
    return distinct[:: max(1, -(-len(distinct) // limit))]


def _columns(basis: SpuriousBasis, seed: int) -> dict[str, Tensor]:
    """{"<weight>.<side>": (dim, 2 k)}: the basis' columns, then random ones."""
    random = basis.random_like(seed)
    return {
        f"{weight}.{side}": torch.cat([basis.tensor(weight, side), random.tensor(weight, side)], dim=1)
        for weight in basis.weights
        for side in basis.sides(weight)
    }


@contextlib.contextmanager
def _tapped(
    model: nn.Module, basis: SpuriousBasis, columns: dict[str, Tensor], taps: dict[str, Tensor]
) -> Iterator[None]:
    """While open, each forward pass puts {"<weight>.<side>": (batch, tokens, 2 k), fp32} into `taps`."""
    handles = []
    try:
        for weight, module in protected_modules(model, basis).items():
            if (key := f"{weight}.write") in columns:
                handles.append(module.register_forward_hook(_output_tap(key, columns, taps)))
            if (key := f"{weight}.read") in columns:
                handles.append(module.register_forward_pre_hook(_input_tap(key, columns, taps)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_tap(key: str, columns: dict[str, Tensor], taps: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        taps[key] = output.float() @ columns[key].to(output.device)

    return hook


def _input_tap(key: str, columns: dict[str, Tensor], taps: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        taps[key] = args[0].float() @ columns[key].to(args[0].device)

    return hook


def _summary(keys: list[str], means: Tensor, num_tokens: int, num_prompts: int) -> dict[str, Any]:
    def entry(places: list[int]) -> dict[str, float | None]:
        basis, random = (float(value) for value in means[places].mean(0))
        return {"basis": basis, "random": random, "ratio": basis / random if random > 0 else None}

    by_side: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        by_side.setdefault(key.rpartition(".")[2], []).append(place)
    return {
        "prompts": num_prompts,
        "tokens": num_tokens,
        "pooled": entry(list(range(len(keys)))),
        "sides": {side: entry(places) for side, places in by_side.items()},
        "weights": {key: entry([place]) for place, key in enumerate(keys)},
    }
