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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError, Preempted
from grasp_dist.training.batches import Batch, GlobalOrder, micro_batches
from grasp_dist.training.engines import Engine, build_engine
from grasp_dist.training.examples import Example
from grasp_dist.training.optimizer import build_scheduler, scale_gradients, squared_norm
from grasp_dist.training.packing import check_isolation
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.preemption import stop_requested
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.seeds import derived_seed

if TYPE_CHECKING:
    from grasp_dist.projection import GraspProjector
    from grasp_dist.training.checkpoints.saving import Keeper

__all__ = [
    "Alternative",
    "LoopState",
    "Objective",
    "TrainResult",
    "num_steps",
    "plain_objective",
    "target_logits",
    "token_losses",
    "train",
]


Objective = Callable[[nn.Module, Batch], Tensor]
"""objective(model, batch) -> what is minimised, summed over the batch's trained tokens; fp32 scalar with a gradient."""
Alternative = Callable[[nn.Module], AbstractContextManager[Objective]]
"""alternative(model): while open, what the model is trained with instead of `plain_objective`."""


@dataclass
class LoopState:
    """What changes during a run. Callbacks may read all of it, and set `projector` (attached to `engine.attach_to`) and
    `ended`, the same on every rank."""

    engine: Engine
    scheduler: LambdaLR
    projector: GraspProjector | None
    step: int = 0
    """Batches done; of these the optimizer has left out `skipped`."""
    cursor: int = 0
    """Samples seen, over all ranks and epochs: where in the global order the next batch begins."""
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    """Mean token loss of each step, before its update; the same on every rank. NaN for one left out."""
    best: dict[str, float] | None = None
    """The step with the smallest loss so far: {"step", "loss"}."""
    skipped: list[int] = field(default_factory=list)
    """Steps that were left out because a loss or gradient was not finite."""
    ended: bool = False
    """The run is to end behind this step, before its last."""

    def extra(self) -> dict[str, Any]:
        """What a checkpoint needs beside tensors, as JSON values. Data order and dropout follow from seed, cursor and
        step, so no random state is among them."""
        scheduler = {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {
            "step": self.step,
            "cursor": self.cursor,
            "tokens": self.tokens,
            "losses": losses,
            "best": self.best,
            "skipped": self.skipped,
            "scheduler": scheduler,
        }

    def restore(self, extra: dict[str, Any]) -> None:
        """Continue behind the step at which `extra` was taken; the tensors are the checkpoint's."""
        self.step, self.cursor, self.tokens = extra["step"], extra["cursor"], extra["tokens"]
        self.losses = [math.nan if loss is None else loss for loss in extra["losses"]]
        self.best, self.skipped = extra["best"], list(extra["skipped"])
        groups = self.engine.optimizer.param_groups
        self.scheduler.load_state_dict({**extra["scheduler"], "lr_lambdas": [None] * len(groups)})
        for group, rate in zip(groups, self.scheduler.get_last_lr(), strict=True):
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
    skipped: list[int] = field(default_factory=list)
    """Steps that were left out because a loss or gradient was not finite."""


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
    protect: Callable[[Any], GraspProjector | None] | None = None,
    keeper: Keeper | None = None,
    usable: Callable[[dict[str, Any]], bool] = lambda record: True,
    on_start: Callable[[LoopState], None] | None = None,
    on_step: Callable[[int, LoopState], None] | None = None,
    on_end: Callable[[LoopState], None] | None = None,
    alternative: Alternative | None = None,
) -> TrainResult:
    """Train what is trainable in `model`, in place; collective.

    model: as `load_model` makes it. seed: order of the examples, and dropout. steps: instead of `num_steps`.
    protect(what a projector is built from): a projector, which is attached for the run and detached at its end.
    keeper: continues from its newest checkpoint that is `usable`, if there is one, and saves when one is due, and when
    this or another process was asked to stop: then `Preempted` is raised, on every rank behind the same step.
    on_start(state): before the first step. on_step(step, state): after each step, counted from 1, before it is saved.
    on_end(state): behind the last step, while the engine still holds the state.
    alternative: None: `plain_objective`.
    Raises `InputError` on every rank, and leaves the weights as they were before that step, when the loss or a
    gradient is not finite more often in a row than `training.max_skipped_steps`; and for sequences that are too long
    for the model.
    """
    _check(model, examples, parallel)
    total = steps or num_steps(training, len(examples))
    engine = build_engine(model, training, parallel, micro_batches=_micro_batches(training, parallel))
    scheduler = build_scheduler(engine.optimizer, training, total)
    state = LoopState(engine, scheduler, None if protect is None else protect(engine.projects))
    if state.projector is not None:
        engine.loaded()  # LoRA's factors may have been moved
        state.projector.attach(engine.attach_to)
    was_training = model.training
    model.train()
    held = ExitStack()
    try:
        check_isolation(engine.module, examples, parallel.device)  # with ZeRO-3 a model runs in its engine only
        if keeper is not None:
            say = print if recorder is None else recorder.event
            extra = keeper.resume(engine, state.projector, usable=usable, say=say)
            if extra is not None:
                state.restore(extra)
                say(f"continued behind step {state.step}")
        if on_start is not None:
            on_start(state)
        if recorder is not None:
            recorder.begin(first_step=state.step, steps=total, log_every=training.log_every)
        order = GlobalOrder(len(examples), seed)
        sizes = [(example.num_targets, len(example.input_ids)) for example in examples]
        started = time.monotonic()
        stop = False
        objective = plain_objective if alternative is None else held.enter_context(alternative(engine.module))
        while state.step < total and not stop and not state.ended:
            indices = order.samples(state.cursor, training.batch_size)
            _seed_dropout(seed, state.step, parallel)
            num_targets = sum(sizes[index][0] for index in indices)
            metrics, stop = _step(examples, indices, num_targets, training, parallel, state, keeper, objective)
            state.step += 1
            state.cursor += len(indices)
            state.tokens += sum(sizes[index][1] for index in indices)
            state.losses.append(metrics["loss"])
            if state.best is None or metrics["loss"] < state.best["loss"]:
                state.best = {"step": state.step, "loss": metrics["loss"]} if math.isfinite(metrics["loss"]) else None
            if recorder is not None:
                recorder.log(state.step, **metrics)
            if on_step is not None:
                on_step(state.step, state)
            if keeper is not None and state.step < total and (stop or keeper.due(state.step)):
                keeper.save(state.step, engine, state.projector, state.extra(), finish=stop)
        if keeper is not None:
            keeper.wait()
        if stop and state.step < total and not state.ended:
            saved = (
                f"saved behind step {state.step}" if keeper is not None else "not saved: there is no checkpoint folder"
            )
            raise Preempted(f"asked to stop; {saved}. The same command goes on from there")
        if on_end is not None:
            on_end(state)
        seconds = time.monotonic() - started
    finally:
        held.close()
        if keeper is not None:
            keeper.close()
        if state.projector is not None:
            state.projector.detach()
        engine.close()
        model.train(was_training)
    return TrainResult(state.losses, state.losses[-1], seconds, state.tokens, state.skipped)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each target token in nats, (targets,) fp32."""
    return F.cross_entropy(target_logits(model, batch), batch.targets, reduction="none")


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(targets, vocabulary): the logits of each target token; upcast to fp32 at these positions only."""
    arguments = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits = model(input_ids=batch.input_ids, use_cache=False, **arguments).logits
    return logits.flatten(0, 1)[batch.positions].float()


def plain_objective(model: nn.Module, batch: Batch) -> Tensor:
    """What is minimised as a rule: the cross entropies' sum."""
    return token_losses(model, batch).sum()


def _micro_batches(training: TrainingConfig, parallel: Parallel) -> int:
    """Backward passes per step and rank."""
    share = -(-training.batch_size // parallel.world_size)
    return -(-share // (training.micro_batch_size or share))


def _step(
    examples: Sequence[Example],
    indices: list[int],
    num_targets: int,
    training: TrainingConfig,
    parallel: Parallel,
    state: LoopState,
    keeper: Keeper | None,
    objective: Objective,
) -> tuple[dict[str, float], bool]:
    """Metrics, and whether any rank was asked to stop."""
    engine = state.engine
    batches = micro_batches(
        examples,
        indices,
        world_rank=parallel.world_rank,
        world_size=parallel.world_size,
        size=training.micro_batch_size,
    )
    loss_sum = torch.zeros((), device=parallel.device)
    for number, batch in enumerate(batches, start=1):
        with _autocast(training, parallel):
            loss = objective(engine.module, batch.to(parallel.device)) / num_targets
        # Engines average gradients over the ranks; their sum is wanted.
        engine.backward(loss * parallel.world_size, last=number == len(batches))
        loss_sum += loss.detach()
    finite = state.projector is None or state.projector.project_gradients()
    gradients = engine.gradients()
    stop = torch.tensor(float(stop_requested()), device=parallel.device)
    totals = parallel.sum_(torch.stack([loss_sum, squared_norm(gradients, parallel.device), stop]))
    loss_value, squared, asked = totals.tolist()
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    rate = float(state.scheduler.get_last_lr()[0])
    if not finite or not math.isfinite(loss_value) or not math.isfinite(norm):
        engine.drop_gradients()
        _leave_out(state, indices, loss_value, norm, training, keeper)
        loss_value = math.nan
    else:
        if training.max_grad_norm is not None and norm > training.max_grad_norm:
            scale_gradients(gradients, training.max_grad_norm / (norm + 1e-6))
        engine.step()
    state.scheduler.step()
    return {"loss": loss_value, "grad_norm": norm, "learning_rate": rate}, asked > 0


def _leave_out(
    state: LoopState,
    indices: list[int],
    loss: float,
    norm: float,
    training: TrainingConfig,
    keeper: Keeper | None,
) -> None:
    """Note a step that is left out. Raises `InputError`, on every rank, if there are too many in a row."""
    step = state.step + 1
    state.skipped.append(step)
    in_a_row = 0
    while step - in_a_row in state.skipped:
        in_a_row += 1
    if in_a_row <= training.max_skipped_steps:
        return
    if keeper is not None:
        keeper.wait()
    last = None if keeper is None else keeper.find(say=lambda _: None)
    good = "there is no checkpoint" if last is None else f"the last good checkpoint is {last[0]}"
    shown = ", ".join(map(str, indices[:16])) + (f", ... ({len(indices)} in all)" if len(indices) > 16 else "")
    raise InputError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}, {in_a_row} time(s) in a row; the weights are "
        f"as before this step, and {good}. The batch is made of the examples {shown} (counted from 0, in the order "
        "of the data). Look at them, lower training.learning_rate, add warm-up, use training.precision: fp32, or let "
        "training.max_skipped_steps leave more steps out"
    )


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
