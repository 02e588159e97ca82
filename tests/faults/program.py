"""The program that the faults happen to: a tiny Llama, GRASP with a small basis, the real loop, and its checkpoints.

As the pipeline's stages put it together: lock, stop signals, recorder, keeper, projector, `train`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_dist.basis import SpuriousBasis, model_reference
from grasp_dist.config import LoraConfig, ModelConfig, ParallelConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from grasp_dist.run_lock import RunLock
from grasp_dist.training.checkpoints.saving import Keeper
from grasp_dist.training.checkpoints.store import Checkpoints
from grasp_dist.training.engines import Engine, build_engine
from grasp_dist.training.examples import IGNORED, Example
from grasp_dist.training.loop import LoopState, train
from grasp_dist.training.lora import adapter_config
from grasp_dist.training.model import load_model
from grasp_dist.training.parallel import Parallel, init_parallel
from grasp_dist.training.preemption import StopSignals
from grasp_dist.training.recorder import Recorder
from grasp_dist.training.sharding import whole_tensor
from tests.faults.group import progress
from tests.tiny_models import tiny_model

__all__ = [
    "BATCH",
    "STRATEGIES",
    "Outcome",
    "Program",
    "build",
    "digest",
    "example_number",
    "fine_tune",
    "make_model",
    "whole_state",
]

STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")

torch.set_num_threads(1)

BATCH = 12
"""Divided by every world size that is used, so that no rank's share is filled up."""
EXAMPLES = 30
HIDDEN, INTERMEDIATE = 28, 41
"""Sizes that 3 and 4 ranks do not divide."""
_VOCABULARY = 64


@dataclass(frozen=True)
class Program:
    """What is trained, and where."""

    model: Path
    run: Path
    strategy: str = "auto"
    method: Literal["lora", "full"] = "lora"
    steps: int = 18
    every: int | None = 4
    background: bool = False
    max_skipped_steps: int = 0
    keep_last: int = 2
    recorded: bool = True
    """Write metrics.jsonl and TensorBoard's file."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run / "checkpoints", keep_last=self.keep_last)

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            method=self.method, modules="write", lora=LoraConfig(rank=4, alpha=8, dropout=0.1), steps=self.steps,
            batch_size=BATCH, micro_batch_size=2, learning_rate=1e-2 if self.method == "lora" else 1e-3,
            schedule="cosine", warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, log_every=1000,
            max_skipped_steps=self.max_skipped_steps,
        )  # fmt: skip


@dataclass
class Outcome:
    """What a rank can tell of a run that came to its end."""

    started: int = 0
    """The step behind which it went on."""
    losses: list[float] = field(default_factory=list)
    digest: str = ""
    """Of this rank's weights, moments and pins, bit by bit."""
    residual: float = 0.0


def make_model(folder: Path) -> Path:
    """The model directory that all programs start from."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": 2}
    tiny_model("llama", **sizes).save_pretrained(folder)
    return folder


def examples() -> list[Example]:
    """Each begins with two tokens that no other begins with: what reaches the model tells which it was."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(EXAMPLES):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = [
            3 + number // 8,
            3 + number % 8,
            *torch.randint(11, _VOCABULARY, (length,), generator=generator).tolist(),
        ]
        made.append(Example(ids, [IGNORED] * (len(ids) - 3) + ids[-3:]))
    return made


def example_number(first: int, second: int) -> int:
    """Which example begins with these two tokens."""
    return (first - 3) * 8 + second - 3


def basis() -> SpuriousBasis:
    """Two directions a side, on every matrix that writes to the residual stream."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for module, columns in (("self_attn.o_proj", HIDDEN), ("mlp.down_proj", INTERMEDIATE)):
            for side, size in (("write", HIDDEN), ("read", columns)):
                directions = torch.linalg.qr(torch.randn(size, 2, generator=generator))[0]
                tensors[f"model.layers.{layer}.{module}.weight.{side}"] = directions
    return SpuriousBasis.from_tensors(tensors)


def protect(where: Any) -> GraspProjector:
    return GraspProjector(where, basis())


def load(program: Program) -> tuple[torch.nn.Module, Parallel]:
    parallel = init_parallel(ParallelConfig.model_validate({"strategy": program.strategy}))
    config = ModelConfig(path=str(program.model))
    return load_model(config, parallel, precision="fp32", training=program.training, seed=0), parallel


def keep(
    program: Program, model: torch.nn.Module, parallel: Parallel, guard: Callable[[], None] | None = None
) -> Keeper:
    identity = {
        "task": "tests.faults",
        "config": "tests.faults",
        "base_model": model_reference(str(program.model)),
        "method": program.method,
        "adapter_config": adapter_config(model) if program.method == "lora" else None,
    }
    every, background = program.every, program.background
    return Keeper(program.checkpoints, parallel, identity=identity, every=every, background=background, guard=guard)


def build(program: Program) -> tuple[Engine, GraspProjector, Keeper, Parallel]:
    """What a checkpoint is read into, without training."""
    model, parallel = load(program)
    share = -(-BATCH // parallel.world_size)
    engine = build_engine(model, program.training, parallel, micro_batches=-(-share // 2))
    return engine, protect(engine.projects), keep(program, model, parallel), parallel


def fine_tune(
    program: Program,
    *,
    on_start: Callable[[LoopState], None] | None = None,
    on_step: Callable[[int, LoopState], None] | None = None,
    on_end: Callable[[LoopState], None] | None = None,
    data: Sequence[Example] | None = None,
) -> Outcome:
    """Train, or go on, to the end; collective. Raises what `train` raises."""
    outcome = Outcome()

    def start(state: LoopState) -> None:
        outcome.started = state.step
        progress(state.step)
        if on_start is not None:
            on_start(state)

    def step(number: int, state: LoopState) -> None:
        progress(number)
        if on_step is not None:
            on_step(number, state)

    def end(state: LoopState) -> None:
        outcome.digest = digest(state.engine, state.projector)
        outcome.residual = max(state.projector.residual().values()) if state.projector else 0.0
        if on_end is not None:
            on_end(state)

    with ExitStack() as stack:
        stack.enter_context(StopSignals())
        model, parallel = load(program)
        lock = RunLock(program.run, what="training", heartbeat=0.5, patience=2.0)
        error = None
        try:
            if parallel.is_main:
                stack.enter_context(lock)
        except InputError as caught:
            error = caught
        parallel.share_error(error)
        recorder = stack.enter_context(Recorder(program.run, parallel, "train")) if program.recorded else None
        result = train(
            model,
            data or examples(),
            program.training,
            parallel,
            seed=7,
            recorder=recorder,
            protect=protect,
            keeper=keep(program, model, parallel, lock.check),
            on_start=start,
            on_step=step,
            on_end=end,
        )
    outcome.losses = result.losses
    return outcome


def digest(engine: Engine, projector: GraspProjector | None) -> str:
    """Of this rank's part of the state."""
    sha = hashlib.sha256()
    pins = {} if projector is None else projector.state_dict()
    for name, piece in sorted(engine.pieces().items()):
        sha.update(f"{name} {piece.start} {piece.shape[0]}".encode())
        sha.update(piece.local.contiguous().view(torch.uint8).numpy().tobytes())
    for name, pin in sorted(pins.items()):
        sha.update(name.encode())
        sha.update(whole_tensor(pin).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def whole_state(engine: Engine, projector: GraspProjector | None) -> dict[str, Tensor]:
    """Weights, moments and pins, whole, on every rank; collective."""
    state = {}
    if projector is not None:
        state = {f"pins.{name}": whole_tensor(pin).clone() for name, pin in projector.state_dict().items()}
    for name, piece in engine.pieces().items():
        whole = torch.zeros(piece.shape)
        whole[piece.start : piece.start + piece.local.numel()] = piece.local
        if dist.is_initialized() and dist.get_world_size() > 1:
            # A step count is one number, which several ranks have.
            dist.all_reduce(whole, dist.ReduceOp.MAX if whole.numel() == 1 else dist.ReduceOp.SUM)
        state[name] = whole
    return state
