"""How each kind of DeepSpeed optimizer stores what it steps: its masters, gradients, low-precision copies and hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.adapters.flat import Run

__all__ = ["After", "Before", "Layout", "Place", "Remove", "make_layout", "whole_shape"]

Before = Callable[[], None]
After = Callable[[int], None]
Remove = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """Where a parameter's piece is."""

    unit: int
    run: Run
    group: dist.ProcessGroup
    """Its ranks hold the other pieces, or copies."""
    base: int = 0
    """Where in the unit's flat tensors the partition begins that the run speaks of."""


class Layout(Protocol):
    """How one kind of optimizer stores what it steps."""

    places: dict[int, Place]
    """By id of the parameter."""
    has_masters: bool

    def master(self, parameter: nn.Parameter, place: Place) -> Tensor: ...
    def gradient(self, parameter: nn.Parameter, place: Place) -> Tensor | None: ...
    def half(self, parameter: nn.Parameter, place: Place) -> Tensor: ...
    def copies(self, parameter: nn.Parameter) -> list[Tensor]: ...
    def hook(self, before: Before, after: After) -> Remove: ...
    def handles_overflow(self) -> bool: ...


class _Stage12:
    """DeepSpeedZeroOptimizer: one unit for each group of the optimizer."""

    has_masters = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.places: dict[int, Place] = {}
        for unit, parameters in enumerate(zero.round_robin_bit16_groups):  # in the order of the buffer
            offsets = getattr(zero, "round_robin_bit16_offsets", None)  # spaced by zero_parameter_alignment
            self.places |= _end_to_end(
                unit, parameters, int(zero.partition_size[unit]), zero.real_dp_process_group[unit],
                None if offsets is None else offsets[unit],
            )  # fmt: skip

    def master(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return self._zero.single_partition_of_fp32_groups[place.unit]

    def gradient(self, parameter: nn.Parameter, place: Place) -> Tensor | None:
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

    def half(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return place.run.narrow(self._zero.parallel_partitioned_bit16_groups[place.unit][place.run.rank])

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.detach()]

    def hook(self, before: Before, after: After) -> Remove:
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
        self.places: dict[int, Place] = {}
        for unit, parameters in enumerate(zero.fp16_groups):
            base = 0
            for parameter in parameters:
                group = getattr(parameter, "ds_process_group", zero.dp_process_group)
                partition = parameter.partition_numel()
                run = Run(whole_shape(parameter), 0, partition, dist.get_rank(group), group.size())
                self.places[id(parameter)] = Place(unit, run, group, base)
                base += partition

    def master(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return self._zero.fp32_partitioned_groups_flat[place.unit]

    def gradient(self, parameter: nn.Parameter, place: Place) -> Tensor | None:
        zero = self._zero
        if zero.offload_optimizer:
            found = self.master(parameter, place).grad
            return None if found is None else place.run.narrow(found, place.base)
        pieces = zero.averaged_gradients.get(place.unit)
        if pieces is None:
            return None
        return place.run.narrow(pieces[_index(parameter, zero.fp16_groups[place.unit])])

    def half(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return place.run.narrow(parameter.ds_tensor)  # type: ignore[attr-defined]

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        gathered = parameter.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined]
        return [parameter.detach()] if gathered else []

    def hook(self, before: Before, after: After) -> Remove:
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
        self.places: dict[int, Place] = {}
        for unit, parameters in enumerate(zero.bf16_groups):
            partition = zero.fp32_groups_flat_partition[unit].numel()
            self.places |= _end_to_end(unit, parameters, partition, zero.real_dp_process_group[unit], None)

    def master(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return self._zero.fp32_groups_flat_partition[place.unit]

    def gradient(self, parameter: nn.Parameter, place: Place) -> Tensor | None:
        if self._zero.clip_grad > 0 and not self._stepping:
            raise InputError(
                "with gradient_clipping, bf16 and fp32 gradients, ZeRO-1 clips by a norm that each rank takes for "
                "itself, so the projection cannot come before; leave it to the hooks (do not call project_gradients), "
                "or use ZeRO-2"
            )
        return place.run.narrow(self._zero.fp32_groups_gradient_flat_partition[place.unit])

    def half(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return place.run.narrow(self._zero.bf16_partitioned_groups[place.unit][place.run.rank])

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return [parameter.detach()]

    def hook(self, before: Before, after: After) -> Remove:
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
        self.places: dict[int, Place] = {}
        world = dist.group.WORLD
        assert world is not None  # deepspeed.initialize makes it
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                run = Run(tuple(parameter.shape), 0, parameter.numel(), 0, 1)
                self.places[id(parameter)] = Place(0, run, world)

    def master(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return parameter.detach().view(-1)

    def gradient(self, parameter: nn.Parameter, place: Place) -> Tensor | None:
        if parameter.grad is None:
            return None
        parameter.grad = parameter.grad.contiguous()
        return parameter.grad.detach().view(-1)

    def half(self, parameter: nn.Parameter, place: Place) -> Tensor:
        return self.master(parameter, place)

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        return []

    def hook(self, before: Before, after: After) -> Remove:
        return torch_optimizers.hook(self._optimizer, before, after)

    def handles_overflow(self) -> bool:
        return False


def make_layout(optimizer: Any) -> Layout:
    kinds: dict[str, Callable[[Any], Layout]] = {
        "DeepSpeedZeroOptimizer": _Stage12,
        "DeepSpeedZeroOptimizer_Stage3": _Stage3,
        "BF16_Optimizer": _Bf16,
    }
    return kinds.get(type(optimizer).__name__, _Plain)(optimizer)


def _end_to_end(
    unit: int, parameters: list[nn.Parameter], partition: int, group: dist.ProcessGroup, offsets: list[int] | None
) -> dict[int, Place]:
    """Places of parameters that lie end to end in this order, or at `offsets`, in one buffer."""
    places, end = {}, 0
    for index, parameter in enumerate(parameters):
        offset = end if offsets is None else offsets[index]
        run = Run(tuple(parameter.shape), offset, partition, dist.get_rank(group), group.size())
        places[id(parameter)] = Place(unit, run, group)
        end = offset + run.numel
    return places


def _wrap_step(zero: Any, before: Before) -> Remove:
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


def _after_steps(optimizers: list[torch.optim.Optimizer], masters: Callable[[], list[Tensor]], after: After) -> Remove:
    """Call `after(unit)` when the inner optimizer has stepped the unit's master, which it holds just then."""

    def post_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = {id(master) for group in optimizer.param_groups for master in group["params"]}
        for unit, master in enumerate(masters()):
            if id(master) in held:
                after(unit)

    return _both(*(optimizer.register_step_post_hook(post_step).remove for optimizer in optimizers))


def _both(*removes: Remove) -> Remove:
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


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
