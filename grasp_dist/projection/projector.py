"""GraspProjector: attach a basis to an optimizer, and training leaves the protected weights unchanged along it.

    projector = GraspProjector(model, basis, side="write", rank=4)
    projector.attach(optimizer)                 # nothing else in the loop changes

Two operations, each of which can be switched off: the gradient is projected before the optimizer's step, and the
weights are pinned after it (`reference.py` has the mathematics). Build the projector after the model is on its device,
sharded, and has its adapters, and before training.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError, NonFiniteError
from grasp_dist.projection.adapters import recognise
from grasp_dist.projection.adapters.tensors import Tensors
from grasp_dist.projection.overlap import BackwardOverlap
from grasp_dist.projection.pins import Pins, before_training
from grasp_dist.projection.plan import Plan, build_plan
from grasp_dist.projection.reference import project_gradient
from grasp_dist.projection.residual import check_start, relative_residuals
from grasp_dist.projection.runtime import Runtime
from grasp_dist.projection.targets import Target, check_shapes, find_targets, find_unprotected, no_such_weight

__all__ = ["GraspProjector"]

_logger = logging.getLogger(__name__)

_attached: weakref.WeakSet[GraspProjector] = weakref.WeakSet()


class GraspProjector:
    """Keeps `U^T W` and `W V` of every protected weight as they were before training.

    A `torch.distributed.checkpoint` Stateful. What is marked "collective" must be called by every rank. Weights are
    named as in the base model.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module | Any,
        basis: SpuriousBasis | None,
        *,
        side: Literal["both", "write", "read"] | None = None,
        rank: int | None = None,
        gradient: bool = True,
        pin: bool = True,
        overlap: bool = False,
    ) -> None:
        """Plan the passes, record the pins, and project LoRA's A off the read side; collective.

        model: on its device, with its adapters: plain, DDP, FSDP2 (`fully_shard`), HSDP, FSDP on top of tensor
            parallelism, FSDP1, or a DeepSpeed engine or the module that it trains.
        basis: None protects nothing until `extend`.
        side: use this side of every weight; "both" demands both; None takes what the basis has.
        rank: the first `rank` directions of each weight (all, where it has fewer); None: all.
        gradient, pin: the two parts of the method.
        overlap: project gradients during the backward pass, chunk by chunk, on process groups of their own (plain, DDP
            and DTensor models). Each micro-batch that accumulates is then projected, unless the framework itself puts
            off its gradients (fully_shard's `set_requires_gradient_sync`).

        Raises `InputError` for a basis that does not fit the model, a model in which nothing can move the protected
        weights, adapters that do not start from zero, and shardings that are not handled.
        """
        if not gradient and not pin:
            raise InputError("gradient=False and pin=False leave nothing to do; switch one of them on")
        self._framework = recognise(model)
        self._side, self._gradient, self._pin = side, gradient, pin
        if overlap and (not gradient or not isinstance(self._framework, Tensors)):
            raise InputError(
                "overlap=True projects gradients in torch's own gradient hooks, which needs gradient=True and a model "
                "that is neither DeepSpeed's nor in FSDP1; leave overlap out"
            )
        self._overlaps, self._fresh = overlap, True
        self._overlap: BackwardOverlap | None = None
        self._optimizer: Any = None
        self._unhook: Callable[[], None] = _nothing
        self._unhook_backward: Callable[[], None] = _nothing
        self._looked_at: _Look | None = None
        self._watches: list[Any] = []
        self._begun = False
        self.steps = 0
        """Optimizer steps that the hooks have seen."""
        if basis is not None:
            basis = _select(basis, side)
            basis = basis if rank is None else basis.truncate(rank)
        self.basis = basis
        self._plan = self._make_plan(basis)
        self._runtime = Runtime(self._plan)
        self._units = {entry.fragment.unit for entry in self._plan.entries}
        self._stepped: set[int] = set()
        check_start(self._plan, self._runtime, _weights(self._plan), self._framework)
        self._pins = Pins(self._plan, self._runtime, _weights(self._plan))
        self._clear_factors()
        if self.unprotected and basis is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            count, name = len(self.unprotected), self.unprotected[0]
            _logger.warning("%d linear weights train without a direction in the basis, such as %s", count, name)

    # -- in the training loop

    def attach(self, optimizer: Any) -> None:
        """Project before and pin after every step, through the optimizer's own hooks.

        optimizer: a torch optimizer, Accelerate's or Lightning's wrapper of one, or a DeepSpeed engine or its
        optimizer, that holds every protected parameter. Raises `InputError` for anything else, when already attached,
        and when another projector is attached to the same optimizer. Collective with overlap=True.
        """
        if self._optimizer is not None:
            raise InputError("this projector is attached already; call detach() first")
        self._check_owned(optimizer, self._plan)
        if any(_innermost(other._optimizer) is _innermost(optimizer) for other in _attached):
            raise InputError(
                "another projector is attached to this optimizer; call its detach() first, or join the two bases "
                "(SpuriousBasis.union)"
            )
        self._unhook = self._framework.hook(optimizer, self._before_step, self._after_step)
        self._optimizer = optimizer
        self._hook_backward()
        _attached.add(self)

    @torch.no_grad()
    def project_gradients(self) -> bool:
        """Project the gradients now; collective. Call it before gradient clipping: the next step does not do it again.

        Without this call the hook projects: before clipping with DeepSpeed, after it elsewhere. With fp16, call it
        after `scaler.unscale_(optimizer)`, or not at all. Returns whether the gradients are finite on all ranks; if
        not, none of them was changed, and a step that nobody else leaves out raises `NonFiniteError`. With
        gradient=False it only looks.
        """
        self._watch()
        finite = self._overlap is None or self._overlap.finish()
        if self._overlap is None or self._fresh:  # gradients may be older than the hooks
            gradients = [entry.fragment.storage.gradient() for entry in self._plan.entries]
            finite = self._runtime.project(gradients, apply=self._gradient) and finite
        self._fresh = not finite
        self._looked_at = _Look(self._plan, finite)
        return finite

    def detach(self) -> None:
        """Take the hooks off the optimizer; the weights stay as they are."""
        self._unhook()
        self._unhook, self._optimizer = _nothing, None
        self._hook_backward()
        _attached.discard(self)

    @torch.no_grad()
    def extend(self, more: SpuriousBasis, *, initial: Mapping[str, Tensor] | None = None) -> None:
        """Add directions, in mid-run if need be; collective. Hooks stay attached.

        What `more` adds to the span of each weight joins its basis (`SpuriousBasis.union`). LoRA factors are projected
        off the new directions at once. Full weights are pinned to their state before training: before the first step
        that is the present one, afterwards `initial` must hold it, {parameter name: W0, whole or sharded like the
        parameter}, for each weight (and bias) that gains directions; with ZeRO-1 and -2 the low-precision copies of
        full weights follow at the next step. Raises `InputError`, and changes nothing, where that is missing or `more`
        does not fit.
        """
        more = _select(more, self._side)
        basis = more if self.basis is None else self.basis.union(more)
        plan = self._make_plan(basis)
        if self._optimizer is not None:
            self._check_owned(self._optimizer, plan)
        sources: list[Tensor | None] = list(_weights(plan))
        if self._begun:
            grown = [self._pins.gains(entry) for entry in plan.entries]
            sources = [
                before_training(entry, initial or {}) if gains else None
                for entry, gains in zip(plan.entries, grown, strict=True)
            ]
        runtime = Runtime(plan)
        if not self._begun:
            check_start(plan, runtime, _weights(plan), self._framework)
        pins = Pins(plan, runtime, sources)
        pins.carry_over(self._pins)
        self.basis, self._plan, self._runtime, self._pins = basis, plan, runtime, pins
        self._units, self._looked_at = {entry.fragment.unit for entry in plan.entries}, None
        self._hook_backward()
        self._clear_factors()
        if self._pin and self._begun:
            self._restore()
            for entry in self._plan.entries:
                storage = entry.fragment.storage
                if storage.publish is not None and not storage.copies():  # else ranks would differ until the next step
                    storage.publish()

    # -- looking

    @torch.no_grad()
    def residual(self) -> dict[str, float]:
        """{weight name: how far it is off its pins, max(|U^T W - C0|, |W V - D0|) / |W|, Frobenius}; collective.

        The same on every rank. With LoRA it is that of the factors (pins 0; 0 for a factor that is 0); of several
        parameters of one weight, the largest.
        """
        values = relative_residuals(self._plan, self._runtime, _weights(self._plan), self._pins)
        result: dict[str, float] = {}
        for entry, value in zip(self._plan.entries, values, strict=True):
            result[entry.target.weight] = max(value, result.get(entry.target.weight, 0.0))
        return result

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the protected parameters, as in the base model."""
        return tuple(target.name for target in _targets(self._plan))

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Linear weights that train, themselves or by LoRA, without any direction in the basis."""
        return find_unprotected(self._framework.module, self.basis, self._framework.shape)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one pass hands to all-reduce on each rank; 0 where every contraction is local."""
        return self._plan.bytes_reduced()

    def summary(self) -> str:
        """One line for a log."""
        parts = [name for name, on in (("gradient projection", self._gradient), ("pinning", self._pin)) if on]
        weights = len({target.weight for target in _targets(self._plan)})
        return (
            f"{weights} weights protected through {len(self.parameters)} parameters by {' and '.join(parts)}; "
            f"{self.bytes_per_pass} bytes all-reduced per pass"
        )

    # -- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """The pins: {"<parameter>.<side>": (k, length)}, directions first, fp32 or wider; zero for LoRA factors.

        The length is that of the parameter's other side. DTensors where a rank holds a piece, plain tensors where it
        holds all, which share memory with the projector's own; summed copies where partitions are flat. Collective.
        """
        return self._pins.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the pins of a projector with the same basis, saved at any world size.

        Training counts as begun from here on. Raises `InputError` for names or shapes that differ.
        """
        self._pins.load_state_dict(state_dict)
        self._begun = True

    # -- inside

    def _make_plan(self, basis: SpuriousBasis | None) -> Plan:
        module, shape = self._framework.module, self._framework.shape
        if basis is None:
            return build_plan([], [], None)
        targets, missing = find_targets(module, basis, shape)
        elsewhere = _missing_on_some_rank(missing)
        if nowhere := [weight for weight in missing if weight not in elsewhere]:
            raise no_such_weight(module, nowhere[0], shape)
        if not targets and not elsewhere:
            raise InputError(
                f"none of the {len(basis)} weights of the basis is trained, by itself or by LoRA (the first is "
                f"{basis.weights[0]!r}); train modules that the basis covers, or detect a basis for those that are"
            )
        if elsewhere and self._overlaps:
            raise InputError("overlap=True needs every weight of the basis on every rank (no pipeline); leave it out")
        fragments = [self._framework.fragment(target.name, target.parameter) for target in targets]
        for target, fragment in zip(targets, fragments, strict=True):
            check_shapes(target, fragment.shape)
        return build_plan(targets, fragments, basis, spread=bool(elsewhere))

    def _hook_backward(self) -> None:
        """While attached, a backward pass undoes what a look at the gradients has found: a scaler may have left out the
        step that it was for, and gradients may be accumulated in place. With `overlap` it projects as well; collective.
        """
        for handle in self._watches:
            handle.remove()
        self._unhook_backward()
        self._looked_at, self._stepped, self._fresh = None, set(), True
        self._watches, self._unhook_backward, self._overlap = [], _nothing, None
        if self._optimizer is not None and self._overlaps and self.basis is not None:
            self._overlap = BackwardOverlap(self._plan, self.basis)
            self._unhook_backward = self._overlap.hook()

    def _watch(self) -> None:
        """Only for loops that call `project_gradients` themselves: such hooks cost fully_shard's CPU offload a wait."""
        if self._optimizer is not None and not self._watches:
            for target in _targets(self._plan):
                self._watches.append(target.parameter.register_post_accumulate_grad_hook(self._forget))

    def _check_owned(self, optimizer: Any, plan: Plan) -> None:
        owned = self._framework.owned(optimizer)
        missing = [target.name for target in _targets(plan) if id(target.parameter) not in owned]
        if missing:
            raise InputError(
                f"the optimizer does not hold {missing[0]!r} ({len(missing)} of {len(plan.entries)} protected "
                "parameters are missing); build the projector and the optimizer from the same model, after sharding it"
            )

    def _restore(self, unit: int | None = None) -> None:
        """The pins, in the weights and in what the optimizer steps beside them; of one unit or of all."""
        self._runtime.restore(_weights(self._plan), self._pins.flats, unit)
        beside = self._framework.beside(self._optimizer) if self._optimizer is not None else None
        if beside is not None:
            others = [beside(target.parameter) for target in _targets(self._plan)]
            pieces = [
                None if other is None else entry.fragment.storage.like(other)
                for entry, other in zip(self._plan.entries, others, strict=True)
            ]
            self._runtime.restore(pieces, self._pins.flats, unit)

    def _clear_factors(self) -> None:
        """A V = 0 and U^T B = 0; full weights are not touched."""
        entries = [entry for entry in self._plan.entries if entry.target.is_factor]
        weights = zip(self._plan.entries, _weights(self._plan), strict=True)
        self._runtime.restore([weight if entry.target.is_factor else None for entry, weight in weights])
        for entry in entries:
            storage, target = entry.fragment.storage, entry.target
            for copy in storage.copies():  # before the piece is published, which may be part of them
                assert self.basis is not None
                left, right = (
                    None if side is None else self.basis.tensor(target.weight, side).to(copy.device)
                    for side in (target.left, target.right)
                )
                copy.copy_(project_gradient(copy.float(), left, right))
            if storage.publish is not None:
                storage.publish()

    def _forget(self, _: Tensor) -> None:
        self._looked_at = None

    def _before_step(self) -> None:
        look = self._looked_at
        # In a pipeline a rank may have no gradient to tell by; then all of them look again.
        if look is None or self._plan.spread or not look.holds(self._plan):
            finite = self.project_gradients()
        else:
            finite = look.finite
        self._looked_at = None
        if not finite and not self._framework.handles_overflow(self._optimizer):
            raise NonFiniteError(
                f"a gradient is NaN or infinite on some rank at step {self.steps + 1}; nothing was changed: zero the "
                "gradients and go on with the next batch, or look for the cause (learning rate, loss, data)"
            )

    @torch.no_grad()
    def _after_step(self, unit: int) -> None:
        self._begun = True
        if self._units and unit not in self._units:
            return  # holds nothing that is protected
        if self._pin:
            self._restore(unit if len(self._units) > 1 else None)
        self._stepped.add(unit)
        if self._stepped >= self._units:
            self.steps += 1
            self._stepped = set()


class _Look:
    """What a pass over the gradients found, and for which gradients."""

    def __init__(self, plan: Plan, finite: bool) -> None:
        self.finite = finite
        # One of them stands for all: a loop that has left a step out (GradScaler) comes with new ones. ZeRO's
        # parameters have none.
        self._sample = next((gradient for gradient in _gradients(plan) if gradient is not None), None)

    def holds(self, plan: Plan) -> bool:
        return any(gradient is self._sample for gradient in _gradients(plan))


def _gradients(plan: Plan) -> Iterator[Tensor | None]:
    return (entry.target.parameter.grad for entry in plan.entries)


def _nothing() -> None:
    pass


def _innermost(optimizer: Any) -> Any:
    """The torch optimizer inside an engine or wrappers."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def _missing_on_some_rank(missing: list[str]) -> set[str]:
    """Weights that some rank lacks and another holds, as in a pipeline; collective."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return set()
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, missing)
    counts = Counter(weight for names in everywhere for weight in set(names))
    return {weight for weight, count in counts.items() if count < len(everywhere)}


def _targets(plan: Plan) -> list[Target]:
    return [entry.target for entry in plan.entries]


def _weights(plan: Plan) -> list[Tensor]:
    """This rank's pieces, resolved anew at each pass: frameworks may replace the storage of a parameter."""
    return [entry.fragment.storage.weight() for entry in plan.entries]


def _select(basis: SpuriousBasis, side: str | None) -> SpuriousBasis:
    """The sides asked for. Raises `InputError` if a weight lacks one."""
    if side is None:
        return basis
    wanted = ("write", "read") if side == "both" else (side,)
    for weight in basis.weights:
        lacking = [name for name in wanted if name in ("write", "read") and name not in basis.sides(weight)]
        if lacking:
            raise InputError(
                f"the basis has no {lacking[0]} side for {weight!r}, only {basis.sides(weight)[0]}; leave `side` unset "
                "to use what it has, or detect again with both sides"
            )
    return basis.select(side)
