"""The engine for DeepSpeed: ZeRO stages 1, 2 and 3, with or without CPU offload.

ZeRO's torch optimizer steps flat fp32 masters, one `unit` after the other, each rank its partition. Where a parameter's
piece lies in them is what the projection's adapter knows already (`Zero.fragment`), and everything here goes by it.
Gradients are reduced and accumulated in fp32, with bf16 too, as with `fully_shard`. DeepSpeed neither clips nor
schedules.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from grasp_dist.architecture import canonical_name
from grasp_dist.config import TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.projection.adapters.deepspeed import Zero
from grasp_dist.projection.fragments import Interval
from grasp_dist.training.checkpoints.pieces import FlatPiece
from grasp_dist.training.optimizer import build_optimizer
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.zero_parameters import is_partitioned, local_piece, partition, release, shape_of

__all__ = ["ZeroEngine", "load_zero3", "zero_config"]

_OLDEST = (0, 19, 4)
"""Before, ZeRO-1 refused bf16 weights with fp32 gradients, and ZeRO-3 recomputed layers."""
_BUCKET = 2**26
"""Numbers that are reduced at once, for which ZeRO keeps a buffer on the device (256 MiB in fp32)."""
_PERSISTENT = 100_000
"""Parameters with at most so many numbers stay gathered in ZeRO-3 (DeepSpeed's default)."""
_PARAMETER_MARKS = ("_hp_mapping", "_z3_optimizer", "_zero_optimizer", "_hp_grad", "grad_accum")
_MODULE_MARKS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")
"""What an engine leaves behind: those of a module, which belong to it, would be taken over by the model's next one."""


def zero_config(training: TrainingConfig, parallel: Parallel, micro_batches: int) -> dict[str, Any]:
    """What deepspeed.initialize is given. micro_batches: backward passes per optimizer step and rank."""
    zero: dict[str, Any] = {
        "stage": int(parallel.strategy.removeprefix("zero")),
        "reduce_bucket_size": _BUCKET,
        "stage3_param_persistence_threshold": _PERSISTENT,
    }
    host = {"device": "cpu", "pin_memory": parallel.device.type == "cuda"}
    if parallel.offload != "none":
        zero["offload_optimizer"] = host
    if parallel.offload == "all":
        zero["offload_param"] = host
    share = -(-training.batch_size // (parallel.world_size * micro_batches))
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size or share,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def load_zero3(model: nn.Module, training: TrainingConfig, parallel: Parallel) -> None:
    """Partition a model on the meta device, with its adapters and dtypes, over all processes; collective. Its weights
    are then read with `load_weights`, each rank its piece."""
    _import_deepspeed()
    partition(model, zero_config(training, parallel, 1), parallel.device)


class ZeroEngine:
    """See `Engine`."""

    def __init__(self, model: nn.Module, training: TrainingConfig, parallel: Parallel, *, micro_batches: int) -> None:
        """model: on its device, with its adapters, trained weights in fp32: whole on every rank, or as `load_zero3`
        makes it. Collective. Raises `InputError` where DeepSpeed is not installed."""
        deepspeed = _import_deepspeed()
        optimizer = build_optimizer(model, training)
        exact = _round_partitioned(model) | _lost_in_rounding(model) if training.precision == "bf16" else {}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=zero_config(training, parallel, micro_batches),
            dist_init_required=False,
        )
        self._model = model
        self.module: nn.Module = self._engine
        self.projects = self.attach_to = self._engine
        self.optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        zero = Zero(self._engine)
        self._fragments: dict[str, Interval] = {
            canonical_name(name): zero.fragment(name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._shapes = {
            canonical_name(name): shape_of(parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._steps: dict[str, Tensor] = {}
        # DeepSpeed makes the masters from the weights that it has rounded.
        for name, value in exact.items():
            storage = self._fragments[name].storage
            storage.weight().copy_(storage.like(value))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        found = [fragment.storage.gradient() for fragment in self._fragments.values()]
        return [gradient for gradient in found if gradient is not None and gradient.numel()]

    def step(self) -> None:
        """Raises `InputError`, on every rank, if DeepSpeed has left the step out, as it does without a word where a
        gradient is not finite."""
        self._steps = {}
        self._engine.step()
        if not self._engine.was_step_applied():
            raise InputError(
                "DeepSpeed left an optimizer step out because a gradient is not finite; the weights are as before it. "
                "Lower training.learning_rate, add warm-up, or use training.precision: fp32"
            )

    def drop_gradients(self) -> None:
        """What ZeRO itself does where gradients overflow."""
        zero = self._engine.optimizer
        kind = type(zero).__name__
        if kind == "DeepSpeedZeroOptimizer_Stage3":
            zero._pre_step()
            zero._overflow_clean_up(1.0)
        elif kind == "DeepSpeedZeroOptimizer":
            zero.micro_step_id = -1
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)
        zero.zero_grad()

    def pieces(self) -> dict[str, FlatPiece]:
        masters = _masters(self._engine.optimizer)
        pieces = {}
        for name, fragment in self._fragments.items():
            weight, master = fragment.storage.weight(), masters[fragment.unit]
            (_, rows, columns), (start, _) = fragment.shape, fragment.span
            numel = fragment.shape[0] * rows * columns
            pieces[f"model.{name}"] = FlatPiece(weight, start, numel)
            offset = weight.storage_offset() - master.storage_offset() if weight.numel() else 0
            for key, value in self._state(master).items():
                if key == "step":
                    # One number steps a whole unit; a checkpoint has one for each parameter, of its own memory.
                    self._steps[name] = value.detach().clone().view(1)
                    pieces[f"optimizer.{key}.{name}"] = FlatPiece(self._steps[name], 0, 1)
                else:
                    piece = value.detach().narrow(0, offset, weight.numel())
                    pieces[f"optimizer.{key}.{name}"] = FlatPiece(piece, start, numel)
        return pieces

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @torch.no_grad()
    def loaded(self) -> None:
        zero = self._engine.optimizer
        masters = _masters(zero)
        for name, step in self._steps.items():
            self.optimizer.state[masters[self._fragments[name].unit]]["step"].copy_(step[0])
        self._steps = {}
        if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3":
            zero.update_lp_params()
            return
        for fragment in self._fragments.values():
            assert fragment.storage.publish is not None
            fragment.storage.publish()
        # As at the end of ZeRO's step: nothing stays gathered from before.
        zero._partition_all_parameters()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @torch.no_grad()
    def close(self) -> None:
        """Not collective. The model can be trained again: it is partitioned as before, and trained weights are in fp32
        again. With ZeRO-1 and -2 in bf16 they have the values that the forward pass used; what needs the masters is
        done before."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        parameters = dict(self._model.named_parameters())
        trained = {canonical_name(name): p for name, p in parameters.items() if p.requires_grad}
        for parameter in parameters.values():
            parameter.grad = None
            release(parameter)
        for name, parameter in trained.items():
            _to_fp32(parameter, self._fragments[name].storage.weight())
        engine.destroy()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        for owners, marks in ((parameters.values(), _PARAMETER_MARKS), (self._model.modules(), _MODULE_MARKS)):
            for owner in owners:
                for mark in marks:
                    vars(owner).pop(mark, None)
        _forget_module(self._model)
        # DeepSpeed's objects refer to each other in circles, and a projector to them: their tensors go now.
        vars(engine.optimizer).clear()
        engine.optimizer = engine.basic_optimizer = None
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        self.module, self.projects, self.attach_to = self._model, None, None
        self._fragments, self._steps = {}, {}

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat master, made now if it does not exist yet."""
        state = self.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state


def _import_deepspeed() -> Any:
    """It looks for its accelerator when it is imported. Raises `InputError` if it is not installed, or too old."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise InputError(
            "parallel.strategy asks for DeepSpeed, which is not installed; `pip install 'grasp-dist[deepspeed]'`, or "
            "set parallel.strategy: auto"
        ) from None
    if tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3]) < _OLDEST:
        raise InputError(
            f"parallel.strategy needs DeepSpeed {'.'.join(map(str, _OLDEST))} or newer, and {deepspeed.__version__} is "
            "installed; `pip install -U deepspeed`, or set parallel.strategy: auto"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _masters(zero: Any) -> list[Tensor]:
    """The flat fp32 masters by unit."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise AssertionError(f"no masters in {type(zero).__name__}")


def _lost_in_rounding(model: nn.Module) -> dict[str, Tensor]:
    """{name: value} of the trained fp32 weights that bf16 does not hold exactly; they share memory with the model's."""
    return {
        canonical_name(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not is_partitioned(parameter)
        and not torch.equal(parameter.detach().bfloat16().float(), parameter.detach())
    }


def _round_partitioned(model: nn.Module) -> dict[str, Tensor]:
    """Make partitioned trained weights bf16, in place; {name: this rank's piece as it was}."""
    exact = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_partitioned(parameter):
            exact[canonical_name(name)] = local_piece(parameter)
            parameter.ds_tensor.data = parameter.ds_tensor.data.bfloat16()  # type: ignore[attr-defined]
            parameter.data = parameter.data.bfloat16()
    return exact


def _to_fp32(parameter: Any, master: Tensor) -> None:
    """A trained parameter as it was before the engine rounded it. master: this rank's piece."""
    if not is_partitioned(parameter):
        parameter.data = parameter.data.float().clone()
        return
    parameter.ds_tensor.data = parameter.ds_tensor.data.float().clone()
    local_piece(parameter).copy_(master)
    parameter.data = parameter.data.float()


def _forget_module(model: nn.Module) -> None:
    """ZeRO-3 keeps the model in a list of its own, and replaces `torch.nn.functional.linear`."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    parameter_offload.FWD_MODULE_STACK[:] = [
        module for module in parameter_offload.FWD_MODULE_STACK if module is not model
    ]
    original = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original
