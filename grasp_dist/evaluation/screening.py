"""Is there a spurious factor at all? Two naive fine-tunes on the two halves of the data are compared. Ours.

What a fine-tune learns of single rows, it learns of its own half. A factor that stands behind the rows is in both
halves, so both fine-tunes change in the same way where no row is near: on prompts that have nothing to do with the
data. The measure is the *shared shift*: for each position of such a prompt, the probability that both fine-tunes moved,
from the base, to the same next tokens,

    sum_v min(max(p_a(v) - p_0(v), 0), max(p_b(v) - p_0(v), 0)),

in [0, 1], in the mean over positions. No labels are needed. Beside it stands what the weights alone say, and decides
nothing, since updates on clean data agree as well: the mean |cosine| between the leading write directions of the two
updates, and what it is for independent directions.

Each half is trained for half of the steps, so a screening costs one naive fine-tune. It cannot tell a factor that
nobody asked for from a task that is meant to change the answers to unrelated prompts; docs/detection.md has its error
rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp_dist.config import GenericPrompts, ProbeConfig, ScreenConfig
from grasp_dist.detection.adapter import read_adapter
from grasp_dist.detection.svd import low_rank_svd
from grasp_dist.errors import InputError
from grasp_dist.evaluation.batching import cut_batches, deal, evaluation_mode, forward_logits, pad, vocabulary_size
from grasp_dist.evaluation.probes import prepare
from grasp_dist.subspaces import random_columns
from grasp_dist.training.examples import Example
from grasp_dist.training.lora import load_adapter, reset_adapter
from grasp_dist.training.seeds import derived_seed

if TYPE_CHECKING:
    from grasp_dist.training.parallel import Parallel

__all__ = ["Screening", "compare_halves", "distances", "half_of", "read_prompts"]

_NULL_DRAWS = 200


@dataclass(frozen=True)
class Screening:
    """What a screening measured, and its verdict."""

    found: bool
    """Whether the shared shift reaches the threshold."""
    threshold: float
    shared_shift: float
    """In [0, 1]; mean over the prompts' positions."""
    shifts: tuple[float, float]
    """Total variation of each half's fine-tune from the base, on the same positions."""
    agreement: float
    """Mean |cosine| of the two updates' leading write directions, over weights."""
    agreement_null: float
    """The 95 % quantile of that mean for independent directions."""
    by_weight: dict[str, float]
    """|Cosine| by weight."""
    prompts: int
    """How many prompts were asked."""

    def describe(self) -> str:
        """The verdict as a sentence."""
        moved = f"both halves move {self.shared_shift:.3f} of the probability on unrelated prompts alike"
        if self.found:
            return f"a shared factor was found: {moved} (threshold {self.threshold:g})"
        return f"no factor found: {moved}, below the threshold {self.threshold:g}; the naive adapter is kept unchanged"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def half_of(examples: Sequence[Example], number: int, seed: int) -> list[Example]:
    """The half 0 or 1 of the data, dealt at random. Raises `InputError` for fewer than four examples."""
    if len(examples) < 4:
        raise InputError(
            f"the data have {len(examples)} examples, too few to compare their halves; leave detect.screen out"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(derived_seed("halves", seed)))
    return [examples[index] for index in order[number::2].tolist()]


def read_prompts(settings: GenericPrompts, tokenizer: Any, *, where: str = "detect.screen") -> list[list[int]]:
    """Token ids of the generic prompts. Raises `InputError` for a file that is not one of prompts or texts."""
    path = settings.prompts or ""
    probe = ProbeConfig(name=where, role="retention", kind="kl", path=path, limit=settings.limit)
    return [row.prompt for row in prepare([probe], tokenizer)[0].rows]


def compare_halves(
    model: nn.Module,
    adapters: tuple[Path, Path],
    prompts: Sequence[list[int]],
    *,
    settings: ScreenConfig,
    parallel: Parallel,
    batch_size: int,
) -> Screening:
    """The verdict on the adapters of two fine-tunes on the halves; collective, the same on every rank.

    model: as `load_model` makes it, with an adapter of their shape, which is overwritten; loaded for scoring
    (`Parallel.for_scoring`). prompts: token ids. Holds two (vocabulary,) fp32 rows for each position on the CPU, shared
    among the ranks. Raises `InputError` for an adapter that does not fit.
    """
    asked = _Asked(prompts, settings.positions, parallel, batch_size)
    reset_adapter(model, 0, parallel)  # B = 0: the base
    base = asked.probabilities(model)
    risen: list[list[Tensor]] = []
    shifts: list[float] = []
    for adapter in adapters:
        load_adapter(model, adapter, parallel)
        rises = [(after - before).clamp_min_(0) for after, before in zip(asked.probabilities(model), base, strict=True)]
        shifts.append(asked.mean([rise.sum(-1) for rise in rises]))
        risen.append(rises)
    shared = asked.mean([torch.minimum(a, b).sum(-1) for a, b in zip(*risen, strict=True)])
    cosines, null = _agreement(*adapters)
    return Screening(
        found=shared >= settings.threshold,
        threshold=settings.threshold,
        shared_shift=shared,
        shifts=(shifts[0], shifts[1]),
        agreement=sum(cosines.values()) / len(cosines),
        agreement_null=null,
        by_weight=cosines,
        prompts=len(prompts),
    )


def distances(
    model: nn.Module,
    adapters: Sequence[Path],
    prompts: Sequence[list[int]],
    *,
    settings: GenericPrompts,
    parallel: Parallel,
    batch_size: int,
) -> list[float]:
    """How far each adapter moves the model from its base: the total variation between next-token distributions, in
    [0, 1], in the mean over positions; collective. Arguments and errors as for `compare_halves`. The last adapter stays
    loaded."""
    asked = _Asked(prompts, settings.positions, parallel, batch_size)
    reset_adapter(model, 0, parallel)  # B = 0: the base
    base = asked.probabilities(model)
    found = []
    for adapter in adapters:
        load_adapter(model, adapter, parallel)
        pairs = zip(asked.probabilities(model), base, strict=True)
        found.append(asked.mean([(after - before).clamp_min(0).sum(-1) for after, before in pairs]))
    return found


class _Asked:
    """Prompts, dealt to the ranks: of each the next-token probabilities at its last positions are wanted."""

    def __init__(self, prompts: Sequence[list[int]], positions: int, parallel: Parallel, batch_size: int) -> None:
        self.prompts, self.positions, self.parallel, self.batch_size = prompts, positions, parallel, batch_size

    def probabilities(self, model: nn.Module) -> list[Tensor]:
        """This rank's share: fp32 (positions, vocabulary) on the CPU for each of its prompts, in the same order."""
        spans = [(len(prompt), max(0, len(prompt) - self.positions)) for prompt in self.prompts]
        batches = cut_batches(spans, batch_size=self.batch_size, vocabulary=vocabulary_size(model))
        found = []
        with evaluation_mode(model):
            for batch in deal(batches, self.parallel):
                ids, mask = pad([self.prompts[index] for index in batch], self.parallel.device)
                logits = forward_logits(model, ids, mask)
                for row, index in enumerate(batch):
                    length, first = spans[index]
                    found.append(logits[row, first:length].float().softmax(-1).cpu())
        return found

    def mean(self, rows: Sequence[Tensor]) -> float:
        """The mean over every rank's values."""
        total = torch.zeros(2, dtype=torch.float64)
        for row in rows:
            total += torch.tensor([float(row.double().sum()), row.numel()], dtype=torch.float64)
        value, count = self.parallel.sum_(total.to(self.parallel.device)).tolist()
        return value / count


def _agreement(first: Path, second: Path) -> tuple[dict[str, float], float]:
    """({weight: |cosine| of the two leading write directions}, 95 % quantile of their mean for random directions)."""
    updates = [read_adapter(path).weights for path in (first, second)]
    cosines, null = {}, torch.zeros(_NULL_DRAWS, dtype=torch.float64)
    for weight in updates[0]:
        one, other = (low_rank_svd(found[weight].A, found[weight].B)[0][:, 0] for found in updates)
        cosines[weight] = float((one @ other).abs())
        drawn = random_columns((_NULL_DRAWS, len(one), 1), 0, weight)[:, 0, 0].double()
        null += drawn.abs()  # one coordinate: by symmetry, the cosine with any fixed direction
    return cosines, float((null / len(cosines)).quantile(0.95))
