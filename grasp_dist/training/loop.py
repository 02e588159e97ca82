"""The training loop, for every fine-tune: naive, deflation's probes, GRASP; LoRA and full; one process and many.

One step: forward and backward over the rank's micro-batches, projection of the gradients (if there is a projector),
one small all-reduce of loss and gradient norm, clipping, AdamW, learning rate. The loss is the sum over the global
batch's target tokens divided by their global number, so it does not depend on how the batch is cut over ranks and
micro-batches.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.training.batches import Batch, GlobalOrder, micro_batches
from grasp_dist.training.examples import Example
from grasp_dist.training.optimizer import build_optimizer, build_scheduler, scale_gradients, squared_norm
from grasp_dist.training.packing import check_isolation
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.seeds import derived_seed

if TYPE_CHECKING:
    from grasp_dist.projection import GraspProjector

__all__ = ["LoopState", "TrainResult", "num_steps", "token_losses", "train"]


@dataclass
class LoopState:
    """What changes during a run. Callbacks may read all of it, and set `projector` (attached to `optimizer`)."""

    optimizer: Optimizer
    scheduler: LambdaLR
    projector: GraspProjector | None
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    """Mean token loss of each step, before its update; the same on every rank."""

    def extra(self) -> dict[str, Any]:
        """What a checkpoint needs beside tensors, as JSON values. Data order and dropout follow from seed and step."""
        scheduler = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        return {"step": self.step, "tokens": self.tokens, "losses": self.losses, "scheduler": scheduler}

    def restore(self, extra: dict[str, Any]) -> None:
        """Continue behind the step at which `extra` was taken; the tensors are `load_checkpoint`'s."""
        self.step, self.tokens, self.losses = extra["step"], extra["tokens"], list(extra["losses"])
        self.scheduler.load_state_dict({**extra["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    losses: list[float]
    final_loss: float
    seconds: float
    """Wall time of this process' steps (a continued run: since it was continued)."""
    tokens: int
    """Tokens that went through the model, padding and fillers left out."""


def num_steps(training: TrainingConfig, num_examples: int) -> int:
    """Optimizer steps that the settings ask for, over `num_examples` sequences."""
    if training.steps is not None:
        return training.steps
    return max(1, math.ceil((training.epochs or 1.0) * num_examples / training.batch_size))


def train(
    model: nn.Module,
    examples: Sequence[Example],
    training: TrainingConfig,
    parallel: Parallel,
    *,
    seed: int,
    steps: int | None = None,
    recorder: Recorder | None = None,
    projector: GraspProjector | None = None,
    on_start: Callable[[LoopState], None] | None = None,
    on_step: Callable[[int, LoopState], None] | None = None,
) -> TrainResult:
    """Train what is trainable in `model`, in place; collective.

    model: as `load_model` makes it. seed: order of the examples, and dropout. steps: instead of `num_steps`.
    projector: is attached for the run, and detached at its end, as is one that a callback puts into the state.
    on_start(state): before the first step; may `restore`. on_step(step, state): after each step, counted from 1.
    Raises `InputError` on every rank, and leaves the weights as they were before that step, when the loss or a
    gradient is not finite; and for sequences that are too long for the model.
    """
    _check(model, examples, parallel)
    check_isolation(model, examples, parallel.device)
    total = steps or num_steps(training, len(examples))
    optimizer = build_optimizer(model, training)
    state = LoopState(optimizer, build_scheduler(optimizer, training, total), projector)
    if projector is not None:
        projector.attach(optimizer)
    was_training = model.training
    model.train()
    try:
        if on_start is not None:
            on_start(state)
        if recorder is not None:
            recorder.begin(first_step=state.step, steps=total, log_every=training.log_every)
        order = GlobalOrder(len(examples), training.batch_size, seed)
        sizes = [(example.num_targets, len(example.input_ids)) for example in examples]
        started = time.monotonic()
        while state.step < total:
            indices = order.batch(state.step)
            _seed_dropout(seed, state.step, parallel)
            metrics = _step(
                model, examples, indices, sum(sizes[index][0] for index in indices), training, parallel, state
            )
            state.step += 1
            state.tokens += sum(sizes[index][1] for index in indices)
            state.losses.append(metrics["loss"])
            if recorder is not None:
                recorder.log(state.step, **metrics)
            if on_step is not None:
                on_step(state.step, state)
        seconds = time.monotonic() - started
    finally:
        if state.projector is not None:
            state.projector.detach()
        optimizer.zero_grad()
        model.train(was_training)
    return TrainResult(state.losses, state.losses[-1], seconds, state.tokens)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each target token in nats, (targets,) fp32; the logits are upcast at these positions only."""
    arguments = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits = model(input_ids=batch.input_ids, use_cache=False, **arguments).logits
    return F.cross_entropy(logits.flatten(0, 1)[batch.positions].float(), batch.targets, reduction="none")


def _step(
    model: nn.Module,
    examples: Sequence[Example],
    indices: list[int],
    num_targets: int,
    training: TrainingConfig,
    parallel: Parallel,
    state: LoopState,
) -> dict[str, float]:
    batches = micro_batches(
        examples,
        indices,
        world_rank=parallel.world_rank,
        world_size=parallel.world_size,
        size=training.micro_batch_size,
    )
    loss_sum = torch.zeros((), device=parallel.device)
    for number, batch in enumerate(batches, start=1):
        if len(batches) > 1 and training.method == "lora" and isinstance(model, FSDPModule):
            # LoRA's small gradients stay whole until the last micro-batch and are reduced once. Those of full weights
            # are reduced and sharded each time, so that no rank ever holds a whole gradient of the model.
            model.set_requires_gradient_sync(number == len(batches))
        with _autocast(training, parallel):
            loss = token_losses(model, batch.to(parallel.device)).sum() / num_targets
        # fully_shard averages gradients over the ranks; their sum is wanted.
        (loss * parallel.world_size).backward()
        loss_sum += loss.detach()
    if state.projector is not None:
        state.projector.project_gradients()
    totals = parallel.sum_(torch.stack([loss_sum, squared_norm(state.optimizer, parallel.device)]))
    loss_value, squared = totals.tolist()
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    if not math.isfinite(loss_value) or not math.isfinite(norm):
        raise InputError(
            f"step {state.step + 1}: the loss is {loss_value} and the gradient norm {norm}; the weights are as before "
            "this step. Lower training.learning_rate, add warm-up, or use training.precision: fp32"
        )
    if training.max_grad_norm is not None and norm > training.max_grad_norm:
        scale_gradients(state.optimizer, training.max_grad_norm / (norm + 1e-6))
    rate = float(state.scheduler.get_last_lr()[0])
    state.optimizer.step()
    state.scheduler.step()
    state.optimizer.zero_grad()
    return {"loss": loss_value, "grad_norm": norm, "learning_rate": rate}


def _autocast(training: TrainingConfig, parallel: Parallel) -> AbstractContextManager[Any]:
    """bf16 compute without `fully_shard`, whose mixed-precision policy does it otherwise."""
    if training.precision == "bf16" and parallel.strategy == "none":
        return torch.autocast(parallel.device.type, dtype=torch.bfloat16)
    return nullcontext()


def _seed_dropout(seed: int, step: int, parallel: Parallel) -> None:
    """Random numbers that depend on the step alone, so that a continued run needs no saved generator."""
    number = derived_seed("dropout", seed, step, parallel.world_rank)
    # Not torch.manual_seed, which costs more than all the rest here: it goes through every kind of accelerator.
    torch.default_generator.manual_seed(number)
    if parallel.device.type == "cuda":
        torch.cuda.manual_seed(number)


def _check(model: nn.Module, examples: Sequence[Example], parallel: Parallel) -> None:
    longest = max((max(example.lengths or (len(example.input_ids),)) for example in examples), default=0)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not longest:
        raise InputError("there are no training examples; give a data set with at least one row")
    if limit is not None and longest > limit:
        raise InputError(
            f"an example has {longest} tokens, and the model takes {limit}; lower data.max_length to {limit}"
        )
    if parallel.world_size > 1:
        digest = hashlib.sha256()
        for example in examples:
            digest.update(repr((example.input_ids, example.labels)).encode())
        if len(set(parallel.gather_objects(digest.hexdigest()))) > 1:
            raise InputError("the processes read different training data; put the same files on every machine")
