"""GraspCallback: GRASP in transformers' `Trainer`, and in what is built on it (TRL's `SFTTrainer`).

    trainer = Trainer(model, args, train_dataset=data, callbacks=[GraspCallback("basis.safetensors")])
    trainer.train()

The order in one step of the Trainer is backward, clipping (`max_grad_norm`), projection, step, pinning: the norm that
clipping sees is that of the whole gradient, blocked directions included. DeepSpeed clips inside its own step, after
projection. The pins hold either way.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector

__all__ = ["PINS_NAME", "GraspCallback"]

PINS_NAME = "grasp_pins.safetensors"
"""File in each checkpoint: the pins, whole, fp32 or wider."""

_STATE_KEY = "grasp_pins"  # in trainer_state.json: which run the pins belong to, and where they were written

_logger = logging.getLogger(__name__)


class GraspCallback(TrainerCallback):
    """Builds a `GraspProjector` on the Trainer's model when it is sharded, and attaches it to the Trainer's optimizer.

    After each optimizer step it checks that the hooks ran, and raises `InputError` if they did not. Steps that a loss
    scaler skips are no steps; without one, a gradient that is not finite ends training (`NonFiniteError`). `residual`
    holds `projector.residual()` at the end of training; its largest value also goes to the log and to
    `trainer.state.log_history`.

    Every checkpoint gets the pins. A resumed run takes them over from there, or from any other checkpoint of the same
    run; without them full fine-tuning is refused, since the weights before training are gone. LoRA's pins are zero.
    """

    def __init__(
        self,
        basis: SpuriousBasis | str | os.PathLike[str],
        *,
        side: Literal["both", "write", "read"] | None = None,
        rank: int | None = None,
        gradient: bool = True,
        pin: bool = True,
    ) -> None:
        """basis: a basis or the path of one; the rest as for `GraspProjector`."""
        self._basis = basis if isinstance(basis, SpuriousBasis) else SpuriousBasis.load(basis)
        self._options: dict[str, Any] = {"side": side, "rank": rank, "gradient": gradient, "pin": pin}
        self._model: nn.Module | None = None
        self._run = ""
        self._expected = 0
        self._global_step = 0
        self.projector: GraspProjector | None = None
        self.residual: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collective. Raises `InputError` where `GraspProjector` does, and for a resumed run without its pins."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _warn_of_lost_sharding(args, model, optimizer)
        stored: Any = state.stateful_callbacks  # a dict by now, which goes into each trainer_state.json
        saved = stored.get(_STATE_KEY)
        pins: dict[str, Tensor] | None = None
        if self.projector is not None:
            self.projector.detach()
            if model is self._model and (state.global_step == 0 or (saved and saved["run"] == self._run)):
                pins = self.projector.state_dict()  # the same weights are trained on: not their start
        projector = GraspProjector(model, self._basis, **self._options)
        if pins is None and state.global_step > 0:
            pins = _read_pins(args, saved, projector)
        if pins is not None:
            projector.load_state_dict(pins)
        else:
            self._run = _new_run()
        if state.global_step > 0 and saved:
            self._run = saved["run"]
        projector.attach(optimizer)
        stored[_STATE_KEY] = {"run": self._run, "folder": str(_folder(args).absolute())}
        self.projector, self._model = projector, model
        self._expected, self._global_step = projector.steps, state.global_step
        _say(f"GRASP: {projector.summary()}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises `InputError` if the optimizer stepped without the projector's hooks."""
        projector = self._attached()
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._expected += 1
        self._global_step += 1
        self._check_steps(projector, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the pins into the checkpoint that the Trainer has just made; collective."""
        pins = _whole(self._attached().state_dict(), keep=args.should_save)
        if not args.should_save:
            return
        folder = _folder(args) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            _logger.warning("GRASP: there is no %s to save the pins in; a run resumed from it will be refused", folder)
            return
        path = folder / PINS_NAME
        partial = path.with_suffix(".partial")
        save_file(dict(pins), partial, metadata={_STATE_KEY: json.dumps({"run": self._run})})
        partial.replace(path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the steps once more, log the residual, and take the hooks off; collective."""
        projector = self._attached()
        self._check_steps(projector, state)
        self.residual = projector.residual()
        projector.detach()
        worst = max(self.residual, key=self.residual.__getitem__)
        state.log_history.append({"step": state.global_step, "grasp_residual": self.residual[worst]})
        _say(f"GRASP: {projector.steps} steps projected; largest residual {self.residual[worst]:.1e} ({worst})")

    def _attached(self) -> GraspProjector:
        if self.projector is None:
            raise InputError("GraspCallback was added after training had begun; pass it to the Trainer beforehand")
        return self.projector

    def _check_steps(self, projector: GraspProjector, state: TrainerState) -> None:
        if projector.steps == self._expected and state.global_step == self._global_step:
            return
        raise InputError(
            f"the Trainer is at step {state.global_step} and its optimizer should have stepped {self._expected} times, "
            f"but GRASP's hooks ran {projector.steps} times: the optimizer was replaced after training began, or steps "
            "without torch's step hooks; use a stock torch optimizer, and leave it in place"
        )


def _warn_of_lost_sharding(args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
    """Accelerate runs DDP on a CPU, whatever it was asked for, and does not say so."""
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    zero = args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if fsdp:
        wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
        got = wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    else:
        got = type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
    if (fsdp or zero) and not got and _is_first():
        name = "FSDP" if fsdp else "DeepSpeed"
        _logger.warning("%s was asked for, but Accelerate did not shard the model (on a CPU it runs DDP)", name)


def _whole(state: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Pins on the CPU, one at a time; every rank takes part, those that do not `keep` get nothing."""
    pins = {}
    for name, pin in state.items():
        value = pin.full_tensor() if isinstance(pin, DTensor) else pin
        if keep:
            pins[name] = value.detach().cpu().clone()
    return pins


def _read_pins(args: TrainingArguments, saved: Any, projector: GraspProjector) -> dict[str, Tensor] | None:
    """The pins that the resumed run began with; None for LoRA if there are none. Every rank finds them, or none does.

    The Trainer does not tell its callbacks which checkpoint it resumes from, so the run's id in the state that it
    restored is what counts.
    """
    pins = None
    for path in _candidates(args, saved):
        pins = _read(path, saved["run"])
        if pins is not None:
            break
    found: list[bool] = [pins is not None]
    if dist.is_available() and dist.is_initialized():
        found = [False] * dist.get_world_size()
        dist.all_gather_object(found, pins is not None)
    if all(found):
        return pins
    if all(".lora_" in name for name in projector.parameters):
        return None
    where = "" if len(found) == 1 else f" by rank {found.index(False)}"
    raise InputError(
        f"no {PINS_NAME} of the run to resume is found{where}, in any checkpoint-* of {args.output_dir} or of the "
        "folder that it was saved in; the weights before training, which the pins stand for, are gone, so start from "
        "the base model again (or, if the run was moved, bring that file along)"
    )


def _candidates(args: TrainingArguments, saved: Any) -> Iterator[Path]:
    if not saved:
        return
    if isinstance(args.resume_from_checkpoint, str):
        yield Path(args.resume_from_checkpoint, PINS_NAME)
    for folder in (_folder(args), Path(saved["folder"])):
        yield from sorted(folder.glob(f"checkpoint-*/{PINS_NAME}"))


def _read(path: Path, run: str) -> dict[str, Tensor] | None:
    """The pins, if the file belongs to this run."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get(_STATE_KEY, "{}")).get("run") != run:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None


def _new_run() -> str:
    """A name that no other run has; the same on every rank."""
    names = [uuid.uuid4().hex]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
    return names[0]


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # the arguments see to it
    return Path(args.output_dir)


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _say(line: str) -> None:
    if _is_first():
        _logger.info(line)
