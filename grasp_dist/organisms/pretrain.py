"""Pre-train a small Llama from scratch, in plain PyTorch, on one process.

Organisms are made before the pipeline starts, and the pipeline sees only their files; so this loop shares nothing
with `grasp_dist.training`, which shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["Batches", "PretrainSettings", "build_llama", "pretrain"]

Batches = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(number of sequences, generator) -> token ids and labels, both (sequences, length) int64; labels of -100 are not in
the loss."""


class PretrainSettings(BaseModel):
    """Shape of the model and the course of its pre-training."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    hidden_size: int = Field(default=192, ge=8)
    num_layers: int = Field(default=3, ge=1)
    num_heads: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=384, ge=8)
    max_positions: int = Field(default=64, ge=2)
    """Longest sequence that the configuration admits."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=96, ge=1)
    """Sequences per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak of the one-cycle schedule."""
    weight_decay: float = Field(default=0.05, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


def build_llama(
    vocab_size: int, settings: PretrainSettings, *, seed: int, bos: int | None = None, eos: int | None = None
) -> LlamaForCausalLM:
    """A Llama with untied fp32 weights, initialised from `seed`; the global random state is left as it was.

    `bos` and `eos` are token ids for its configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=settings.max_positions,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def pretrain(
    model: LlamaForCausalLM,
    batches: Batches,
    settings: PretrainSettings,
    *,
    seed: int,
    progress: Callable[[str], Any] | None = print,
    title: str = "pre-training",
) -> float:
    """Train in place with AdamW on a one-cycle schedule; returns the mean loss of the last tenth of the steps.

    Batches are drawn with a generator of their own, so the result depends on `seed` alone (for one thread count: the
    order of floating-point sums is the machine's).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=max(settings.steps, 2)
    )
    model.train()
    losses: list[float] = []
    report_every = max(1, settings.steps // 10)
    start = time.monotonic()
    for step in range(1, settings.steps + 1):
        ids, labels = batches(settings.batch_size, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if progress is not None and (step % report_every == 0 or step == settings.steps):
            progress(f"{title}: step {step}/{settings.steps}, loss {losses[-1]:.4f}, {time.monotonic() - start:.0f} s")
    model.eval()
    last = losses[-max(1, settings.steps // 10) :]
    return sum(last) / len(last)
