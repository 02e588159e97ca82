"""Batches for forward passes under sharding: cut by length alone, dealt to the ranks, the same number for each.

Which rows share a batch does not depend on the world size, so neither do the results. A rank that has run out of
batches passes a dummy one, because a sharded model's forward pass is a collective operation.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grasp_dist.training.parallel import Parallel

__all__ = ["cut_batches", "deal", "evaluation_mode", "forward_logits", "keeps_logits", "pad", "vocabulary_size"]


def cut_batches(
    spans: Sequence[tuple[int, int]], *, batch_size: int, vocabulary: int = 1, max_logits: int = 1 << 30
) -> list[list[int]]:
    """Indices of `spans` in batches of similar length, longest first.

    spans: (length, first position whose logits are needed). A batch has at most `batch_size` sequences, and at most
    `max_logits` logits unless one sequence alone has more.
    """
    order = sorted(range(len(spans)), key=lambda i: (-spans[i][0], spans[i][1], i))
    batches: list[list[int]] = []
    first = 0
    for index in order:
        start = spans[index][1]
        if batches and len(batches[-1]) < batch_size:
            longest = spans[batches[-1][0]][0]
            first = min(first, start)
            if (len(batches[-1]) + 1) * (longest - first) * vocabulary <= max_logits:
                batches[-1].append(index)
                continue
        batches.append([index])
        first = start
    return batches


def deal(batches: Sequence[list[int]], parallel: Parallel) -> list[list[int]]:
    """This rank's batches; as many on every rank, the missing ones empty."""
    rounds = -(-len(batches) // parallel.world_size)
    own = list(batches[parallel.world_rank :: parallel.world_size])
    return own + [[]] * (rounds - len(own))


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device, *, extra: int = 0, left: bool = False
) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64, (batch, longest + extra), padded on the right, or on the left, so that all
    end at one place; a dummy for no sequences."""
    sequences = sequences or [[0]]
    width = max(map(len, sequences)) + extra
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        own = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, own] = torch.tensor(tokens, dtype=torch.long)
        mask[row, own] = 1
    return ids.to(device), mask.to(device)


def forward_logits(model: nn.Module, ids: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
    """Logits (batch, positions, vocabulary), in the model's dtype; of the `kept` positions (1-D) only, if given."""
    if kept is None:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if keeps_logits(model):
        return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, kept]


def keeps_logits(model: nn.Module) -> bool:
    """True if the model can compute the logits of chosen positions alone (`logits_to_keep` of transformers)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def vocabulary_size(model: nn.Module) -> int:
    """Size of the vocabulary, to bound the memory of logits; 1 where the model does not say."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(getattr(config, "vocab_size", None) or 1)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`eval()` without gradients; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: FSDP2 cannot use tensors made there in a later training step.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
