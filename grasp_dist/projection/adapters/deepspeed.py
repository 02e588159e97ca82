"""DeepSpeed: ZeRO stages 1, 2 and 3, with and without CPU offload, BF16_Optimizer, and an engine without ZeRO in fp32.

Stages 1 and 2 lay the parameters of one optimizer group end to end and cut that evenly over the ranks; stage 3 cuts
every parameter by itself and gathers several into a sub-group. Either way the torch optimizer inside steps one flat
fp32 master after the other: each is a `unit`. Gradients are projected when ZeRO's `step` is called, before it takes
their norm and clips, and weights are pinned in the inner optimizer's post-step hook, before ZeRO copies the master to
the low-precision weights. With CPU offload ZeRO takes the norm during the backward pass, so there gradients are clipped
by the norm that they had before projection.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Groups
from grasp_dist.projection.adapters.zero_layouts import After, Before, Remove, make_layout, whole_shape
from grasp_dist.projection.fragments import Interval, Storage, stack_shape

__all__ = ["Zero", "is_deepspeed"]

_PASS_THE_ENGINE = "pass the engine that deepspeed.initialize returned (the transformers Trainer: trainer.deepspeed)"

_NO_OPTIMIZER = "deepspeed.initialize was given no optimizer; give it one"
_NO_ZERO = 'bf16 or fp16 without ZeRO is not supported; set "zero_optimization": {"stage": 1}'
_ONE_BIT = "1-bit optimizers communicate inside their step; use a plain optimizer, such as AdamW"

# By how the class of an engine's optimizer, or of the one inside, begins.
_REFUSED = {
    "NoneType": _NO_OPTIMIZER,
    "DummyOptim": _NO_OPTIMIZER,
    "DeepSpeedZeRoOffload": _NO_OPTIMIZER,
    "FP16_": _NO_ZERO,
    "Onebit": _ONE_BIT,
    "ZeroOne": _ONE_BIT,
    "MiCS_": "MiCS is not supported; use plain ZeRO-3 (no mics_shard_size)",
    "SuperOffload": 'SuperOffload steps outside of the optimizer\'s hooks; remove "super_offload"',
    "ZenFlow": 'ZenFlow steps outside of the optimizer\'s hooks; remove "zenflow"',
}


def is_deepspeed(model_or_engine: Any) -> bool:
    """Whether this is a DeepSpeed engine, or a module that one trains or has partitioned."""
    if "deepspeed" not in sys.modules:
        return False
    if _is_engine(model_or_engine) or _find_engine(model_or_engine) is not None:
        return True
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model_or_engine.parameters())


class Zero:
    """A model that a DeepSpeed engine trains. Raises `InputError`, by name, for what is not handled: NVMe offload, hpZ,
    MiCS, ZenFlow, SuperOffload, DeepCompile, pipelines, tensor and expert parallelism, 1-bit optimizers, fp16 and bf16
    without ZeRO, and fp16 through torch_autocast."""

    def __init__(self, model_or_engine: Any) -> None:
        """model_or_engine: an engine, or the module that was given to deepspeed.initialize. Collective."""
        engine = model_or_engine if _is_engine(model_or_engine) else _find_engine(model_or_engine)
        self.module: nn.Module = model_or_engine if engine is None else engine.module
        self._optimizer = _find_optimizer(self.module) if engine is None else engine.optimizer
        _check_engine(self.module, engine)
        _check_optimizer(self._optimizer)
        self._layout = make_layout(self._optimizer)
        self._groups = Groups()
        for parameter in self.module.parameters():  # here, not in `fragment`: new groups are collective
            place = self._layout.places.get(id(parameter))
            if place is not None:
                self._groups.reaching(self._layout.master(parameter, place).device, place.group)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's logical shape: in stage 3 its own is empty while it is not gathered."""
        return whole_shape(parameter)

    def fragment(self, name: str, parameter: nn.Parameter) -> Interval:
        """The rank's piece of a parameter. Raises `InputError` for one that the optimizer does not step."""
        layout = self._layout
        place = layout.places.get(id(parameter))
        if place is None:
            raise InputError(
                f"{name!r} is not among the parameters of the optimizer that deepspeed.initialize was given, so "
                "nothing steps it; give the optimizer all trainable parameters, or freeze this one"
            )
        family = getattr(parameter, "ds_zero_placement_family", "replicated")
        if not getattr(parameter, "allreduce", True) or family != "replicated":
            raise InputError(
                f"{name!r} belongs to experts that DeepSpeed spreads over ranks, where one name means another matrix "
                "on each; use expert parallel size 1"
            )
        run, group = place.run, self._groups.reaching(layout.master(parameter, place).device, place.group)

        def weight() -> Tensor:
            return run.narrow(layout.master(parameter, place), place.base)

        def publish() -> None:
            layout.half(parameter, place).copy_(weight())

        return Interval(
            shape=stack_shape(run.shape),
            span=run.span,
            cuts=run.cuts,
            group=group if run.world_size > 1 else None,
            check_group=group if group.size() > 1 else None,
            storage=Storage(
                weight=weight,
                gradient=lambda: layout.gradient(parameter, place),
                like=run.piece,
                publish=publish if layout.has_masters else None,
                copies=lambda: layout.copies(parameter),
            ),
            unit=place.unit,
        )

    def owned(self, optimizer: Any) -> set[int]:
        """Ids of the model's parameters that it steps. optimizer: the engine, its optimizer, or Accelerate's wrapper of
        that. Raises `InputError` for anything else."""
        self._check_own(optimizer)
        return set(self._layout.places)

    def hook(self, optimizer: Any, before: Before, after: After) -> Remove:
        """Call `before` when ZeRO's step begins and `after(unit)` when a master has been stepped; returns what takes
        the hooks off again. Raises `InputError` for an optimizer that is not this model's."""
        self._check_own(optimizer)
        return self._layout.hook(before, after)

    def handles_overflow(self, optimizer: Any) -> bool:
        """Whether DeepSpeed itself leaves out a step whose gradients are not finite, on all ranks."""
        return self._layout.handles_overflow()

    def beside(self, optimizer: Any) -> None:
        """Nothing: schedule-free optimizers are refused."""

    def _check_own(self, optimizer: Any) -> None:
        if all(known is not self._optimizer for known in (optimizer, getattr(optimizer, "optimizer", None))):
            raise InputError(
                f"this {type(optimizer).__name__} is not what steps the model: the {type(self._optimizer).__name__} of "
                f"its DeepSpeed engine does; {_PASS_THE_ENGINE}"
            )


def _is_engine(candidate: Any) -> bool:
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(candidate, deepspeed.DeepSpeedEngine)


def _find_engine(module: nn.Module) -> Any | None:
    """The engine of a module. It keeps no reference there but in the forward hooks that it registers."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for cell in getattr(hook, "__closure__", None) or ():
            if _is_engine(cell.cell_contents) and cell.cell_contents.module is module:
                return cell.cell_contents
    return None


def _find_optimizer(module: nn.Module) -> Any:
    """The ZeRO optimizer that stage 3, and stages 1 and 2 with offload, leave on the parameters."""
    for parameter in module.parameters():
        for mark in ("_z3_optimizer", "_zero_optimizer"):
            if hasattr(parameter, mark):
                return getattr(parameter, mark)
    raise InputError(f"cannot find the DeepSpeed engine of this {type(module).__name__}; {_PASS_THE_ENGINE}")


def _check_engine(module: nn.Module, engine: Any | None) -> None:
    if any(kind.__name__ == "PipelineModule" for kind in type(module).__mro__):
        raise InputError("DeepSpeed pipelines are not supported; use ZeRO without a PipelineModule")
    if engine is not None and engine.is_deepcompile_enabled():
        raise InputError('DeepCompile replaces ZeRO\'s gradient buffers; remove "compile": {"deepcompile": true}')


def _check_optimizer(optimizer: Any) -> None:
    """Raise `InputError` for an engine's optimizer that cannot be hooked, or hides its masters."""
    name = type(optimizer).__name__
    for beginning, why in _REFUSED.items():
        if name.startswith(beginning):
            raise InputError(f"{name}: {why}")
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"):
        _check_hooks(optimizer)
        return
    parallel = getattr(optimizer, "model_parallel_group", None)
    if (parallel is not None and parallel.size() > 1) or getattr(optimizer, "model_parallel_world_size", 1) > 1:
        raise InputError("tensor parallelism with DeepSpeed is not supported; use data parallel ranks only")
    for setting, why in (
        ("zenflow", _REFUSED["ZenFlow"]),
        ("swap_optimizer", 'the optimizer is offloaded to NVMe, where it cannot be pinned; set its "device" to "cpu"'),
        ("params_in_nvme_and_cpu", 'parameters are offloaded to NVMe, which is not supported; set "device" to "cpu"'),
        ("torch_autocast_gradscaler", "torch_autocast in fp16 leaves out steps on single ranks; use bf16"),
    ):
        if getattr(optimizer, setting, None):
            raise InputError(f"{name}: {why}")
    if getattr(optimizer, "zero_hpz_partition_size", 1) > 1:
        raise InputError(f"{name}: hpZ keeps a second copy of the weights, which is not supported; set "
                         '"zero_hpz_partition_size": 1')  # fmt: skip
    _check_hooks(optimizer.optimizer)


def _check_hooks(inner: Any) -> None:
    for beginning, why in _REFUSED.items():
        if type(inner).__name__.startswith(beginning):
            raise InputError(f"{type(inner).__name__}: {why}")
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(type(inner).step, "hooked"):
        raise InputError(
            f"{type(inner).__name__} does not run the step hooks of torch.optim.Optimizer; use an optimizer that "
            "derives from it, such as torch.optim.AdamW or DeepSpeed's Adam"
        )
    if torch_optimizers.swaps_weights(inner):
        raise InputError(
            f"{type(inner).__name__} puts other weights in place for evaluation, which is not supported under "
            "DeepSpeed; use an optimizer without train() and eval()"
        )
