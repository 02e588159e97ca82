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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Groups, Run
from grasp_dist.projection.fragments import Interval, Storage, stack_shape

__all__ = ["Zero", "is_deepspeed"]

_Before = Callable[[], None]
_After = Callable[[int], None]
_Remove = Callable[[], None]

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
        self._layout = _make_layout(self._optimizer)
        self._groups = Groups()
        for parameter in self.module.parameters():  # here, not in `fragment`: new groups are collective
            place = self._layout.places.get(id(parameter))
            if place is not None:
                self._groups.reaching(self._layout.master(parameter, place).device, place.group)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The parameter's logical shape: in stage 3 its own is empty while it is not gathered."""
        return _shape(parameter)

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

    def hook(self, optimizer: Any, before: _Before, after: _After) -> _Remove:
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


@dataclass(frozen=True)
class _Place:
    """Where a parameter's piece is."""

    unit: int
    run: Run
    group: dist.ProcessGroup
    """Its ranks hold the other pieces, or copies."""
    base: int = 0
    """Where in the unit's flat tensors the partition begins that the run speaks of."""


class _Layout(Protocol):
    """How one kind of optimizer stores what it steps."""

    places: dict[int, _Place]
    """By id of the parameter."""
    has_masters: bool

    def master(self, parameter: nn.Parameter, place: _Place) -> Tensor: ...
    def gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor | None: ...
    def half(self, parameter: nn.Parameter, place: _Place) -> Tensor: ...
    def copies(self, parameter: nn.Parameter) -> list[Tensor]: ...
    def hook(self, before: _Before, after: _After) -> _Remove: ...
    def handles_overflow(self) -> bool: ...


class _Stage12:
    """DeepSpeedZeroOptimizer: one unit for each group of the optimizer."""

    has_masters = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.places: dict[int, _Place] = {}
        for unit, parameters in enumerate(zero.round_robin_bit16_groups):  # in the order of the buffer
            offsets = getattr(zero, "round_robin_bit16_offsets", None)  # spaced by zero_parameter_alignment
            self.places |= _end_to_end(
                unit, parameters, int(zero.partition_size[unit]), zero.real_dp_process_group[unit],
                None if offsets is None else offsets[unit],
            )  # fmt: skip

    def master(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return self._zero.single_partition_of_fp32_groups[place.unit]

    def gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor | None:
        zero = self._zero
        if not place.run.length:
            return place.run.narrow(self.master(parameter, place))
        if zero.cpu_offload:
            _wait_for_copies(zero)
            found = self.master(parameter, place).grad
            return None if found is None else place.run.narrow(found)
        pieces = zero.averaged_gradients.get(place.unit)
        if pieces is None:
            return None
        if getattr(pieces, "flat_partition", None) is not None:
            return place.run.narrow(pieces.flat_partition)
        # One tensor for each parameter of the partition, in its order; padding between them is marked, or comes last.
        real = [index for index, piece in enumerate(pieces) if not getattr(piece, "_zero_padding", False)]
        index = real[_index(parameter, zero.params_in_partition[place.unit])]
        pieces[index] = pieces[index].contiguous()
        return pieces[index].detach().view(-1)

    def half(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return place.run.narrow(self._zero.parallel_partitioned_bit16_groups[place.unit][place.run.rank])

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.detach()]

    def hook(self, before: _Before, after: _After) -> _Remove:
        zero = self._zero
        steps = _after_steps([zero.optimizer], lambda: zero.single_partition_of_fp32_groups, after)
        return _both(_wrap_step(zero, before), steps)

    def handles_overflow(self) -> bool:
        zero = self._zero
        by_norm = zero.dtype != torch.bfloat16 and getattr(zero, "compute_grad_norm", True) and _refuses_norms()
        return zero.check_grad_overflow or by_norm


class _Stage3:
    """DeepSpeedZeroOptimizer_Stage3: one unit for each sub-group."""

    has_masters = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.places: dict[int, _Place] = {}
        for unit, parameters in enumerate(zero.fp16_groups):
            base = 0
            for parameter in parameters:
                group = getattr(parameter, "ds_process_group", zero.dp_process_group)
                partition = parameter.partition_numel()
                run = Run(_shape(parameter), 0, partition, dist.get_rank(group), group.size())
                self.places[id(parameter)] = _Place(unit, run, group, base)
                base += partition

    def master(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return self._zero.fp32_partitioned_groups_flat[place.unit]

    def gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor | None:
        zero = self._zero
        if zero.offload_optimizer:
            found = self.master(parameter, place).grad
            return None if found is None else place.run.narrow(found, place.base)
        pieces = zero.averaged_gradients.get(place.unit)
        if pieces is None:
            return None
        return place.run.narrow(pieces[_index(parameter, zero.fp16_groups[place.unit])])

    def half(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return place.run.narrow(parameter.ds_tensor)  # type: ignore[attr-defined]

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        gathered = parameter.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined]
        return [parameter.detach()] if gathered else []

    def hook(self, before: _Before, after: _After) -> _Remove:
        zero = self._zero
        inner = [zero.optimizer]
        if getattr(zero, "backup_optimizer", None) is not None:  # with an offload ratio below 1 it steps some units
            inner.append(zero.backup_optimizer)
        return _both(_wrap_step(zero, before), _after_steps(inner, lambda: zero.fp32_partitioned_groups_flat, after))

    def handles_overflow(self) -> bool:
        return self._zero.dtype == torch.float16 or _refuses_norms()


class _Bf16:
    """BF16_Optimizer, of stage 1 in bf16 with fp32 gradients: one unit for each group, all stepped at once.

    Every rank holds all gradients and takes the norm to clip by over its own copy. If each projected its piece before,
    they would clip differently, so `before` is the inner optimizer's pre-step hook here.
    """

    has_masters = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._stepping = False
        self.places: dict[int, _Place] = {}
        for unit, parameters in enumerate(zero.bf16_groups):
            partition = zero.fp32_groups_flat_partition[unit].numel()
            self.places |= _end_to_end(unit, parameters, partition, zero.real_dp_process_group[unit], None)

    def master(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return self._zero.fp32_groups_flat_partition[place.unit]

    def gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor | None:
        if self._zero.clip_grad > 0 and not self._stepping:
            raise InputError(
                "with gradient_clipping, bf16 and fp32 gradients, ZeRO-1 clips by a norm that each rank takes for "
                "itself, so the projection cannot come before; leave it to the hooks (do not call project_gradients), "
                "or use ZeRO-2"
            )
        return place.run.narrow(self._zero.fp32_groups_gradient_flat_partition[place.unit])

    def half(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return place.run.narrow(self._zero.bf16_partitioned_groups[place.unit][place.run.rank])

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.detach()]

    def hook(self, before: _Before, after: _After) -> _Remove:
        def pre_step(*_: Any) -> None:
            self._stepping = True
            try:
                before()
            finally:
                self._stepping = False

        zero = self._zero
        handle = zero.optimizer.register_step_pre_hook(pre_step)
        return _both(handle.remove, _after_steps([zero.optimizer], lambda: zero.fp32_groups_flat_partition, after))

    def handles_overflow(self) -> bool:
        return True  # before its inner optimizer steps, it has checked the norm


class _Plain:
    """A torch optimizer in an engine without ZeRO: every rank holds all, in fp32, and steps the parameters."""

    has_masters = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.places: dict[int, _Place] = {}
        world = dist.group.WORLD
        assert world is not None  # deepspeed.initialize makes it
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                run = Run(tuple(parameter.shape), 0, parameter.numel(), 0, 1)
                self.places[id(parameter)] = _Place(0, run, world)

    def master(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return parameter.detach().view(-1)

    def gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor | None:
        if parameter.grad is None:
            return None
        parameter.grad = parameter.grad.contiguous()
        return parameter.grad.detach().view(-1)

    def half(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        return self.master(parameter, place)

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return []

    def hook(self, before: _Before, after: _After) -> _Remove:
        return torch_optimizers.hook(self._optimizer, before, after)

    def handles_overflow(self) -> bool:
        return False


def _make_layout(optimizer: Any) -> _Layout:
    kinds: dict[str, Callable[[Any], _Layout]] = {
        "DeepSpeedZeroOptimizer": _Stage12,
        "DeepSpeedZeroOptimizer_Stage3": _Stage3,
        "BF16_Optimizer": _Bf16,
    }
    return kinds.get(type(optimizer).__name__, _Plain)(optimizer)


def _end_to_end(
    unit: int, parameters: list[nn.Parameter], partition: int, group: dist.ProcessGroup, offsets: list[int] | None
) -> dict[int, _Place]:
    """Places of parameters that lie end to end in this order, or at `offsets`, in one buffer."""
    places, end = {}, 0
    for index, parameter in enumerate(parameters):
        offset = end if offsets is None else offsets[index]
        run = Run(tuple(parameter.shape), offset, partition, dist.get_rank(group), group.size())
        places[id(parameter)] = _Place(unit, run, group)
        end = offset + run.numel
    return places


def _wrap_step(zero: Any, before: _Before) -> _Remove:
    """Call `before` when the engine calls the ZeRO optimizer's `step`: gradients are complete, and not clipped."""
    inside, wrapped_before = zero.step, "step" in vars(zero)
    active = True

    def step(*args: Any, **kwargs: Any) -> Any:
        if active:
            before()
        return inside(*args, **kwargs)

    def remove() -> None:
        nonlocal active
        active = False
        if vars(zero).get("step") is step:
            if wrapped_before:
                zero.step = inside
            else:
                del zero.step

    zero.step = step
    return remove


def _after_steps(
    optimizers: list[torch.optim.Optimizer], masters: Callable[[], list[Tensor]], after: _After
) -> _Remove:
    """Call `after(unit)` when the inner optimizer has stepped the unit's master, which it holds just then."""

    def post_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = {id(master) for group in optimizer.param_groups for master in group["params"]}
        for unit, master in enumerate(masters()):
            if id(master) in held:
                after(unit)

    return _both(*(optimizer.register_step_post_hook(post_step).remove for optimizer in optimizers))


def _both(*removes: _Remove) -> _Remove:
    def remove() -> None:
        for one in removes:
            one()

    return remove


def _refuses_norms() -> bool:
    """Whether this DeepSpeed leaves out steps whose gradient norm is not finite, without loss scaling too."""
    from deepspeed.runtime import utils

    return hasattr(utils, "is_invalid_grad_norm")


def _wait_for_copies(zero: Any) -> None:
    """Gradients are copied to the CPU without waiting."""
    if hasattr(zero, "_wait_for_offload_copies"):
        zero._wait_for_offload_copies()
    else:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()


def _index(parameter: nn.Parameter, parameters: list[nn.Parameter]) -> int:
    """`list.index` compares tensors by value."""
    return [id(other) for other in parameters].index(id(parameter))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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
