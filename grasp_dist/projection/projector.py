"""GraspProjector: attach a basis to an optimizer, and training leaves the protected weights unchanged along it.

    projector = GraspProjector(model, basis, side="write", rank=4)
    projector.attach(optimizer)                 # nothing else in the loop changes

Two operations, each of which can be switched off: the gradient is projected before the optimizer's step, and the
weights are pinned after it (`reference.py` has the mathematics). Build the projector after the model is on its device,
sharded, and has its adapters, and before training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection.adapters import refuse_unsupported
from grasp_dist.projection.attachment import check_ownership, unwrap_optimizer
from grasp_dist.projection.pins import Pins, before_training
from grasp_dist.projection.plan import Plan, build_plan
from grasp_dist.projection.residual import check_start, relative_residuals
from grasp_dist.projection.runtime import Runtime
from grasp_dist.projection.targets import Target, find_targets, find_unprotected

__all__ = ["GraspProjector"]

_logger = logging.getLogger(__name__)


class GraspProjector:
    """Keeps `U^T W` and `W V` of every protected weight as they were before training.

    A `torch.distributed.checkpoint` Stateful. What is marked "collective" must be called by every rank. Weights are
    named as in the base model.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        basis: SpuriousBasis | None,
        *,
        side: Literal["both", "write", "read"] | None = None,
        rank: int | None = None,
        gradient: bool = True,
        pin: bool = True,
    ) -> None:
        """Plan the passes, record the pins, and project LoRA's A off the read side; collective.

        model: plain, DDP, or FSDP2 (`fully_shard`), on its device, with its adapters.
        basis: None protects nothing until `extend`.
        side: use this side of every weight; "both" demands both; None takes what the basis has.
        rank: the first `rank` directions of each weight (all, where it has fewer); None: all.
        gradient, pin: the two parts of the method.

        Raises `InputError` for a basis that does not fit the model, a model in which nothing can move the protected
        weights, adapters that do not start from zero, and shardings that are not handled.
        """
        if not gradient and not pin:
            raise InputError("gradient=False and pin=False leave nothing to do; switch one of them on")
        refuse_unsupported(model)
        self._model, self._side = model, side
        self._gradient, self._pin = gradient, pin
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._gradient_done = False
        self._begun = False
        if basis is not None:
            basis = _select(basis, side)
            basis = basis if rank is None else basis.truncate(rank)
        self.basis = basis
        self._plan = self._make_plan(basis)
        self._runtime = Runtime(self._plan)
        check_start(self._plan, self._runtime, _weights(self._plan))
        self._pins = Pins(self._plan, self._runtime, _weights(self._plan))
        self._clear_factors()
        if self.unprotected and basis is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            count, name = len(self.unprotected), self.unprotected[0]
            _logger.warning("%d linear weights train without a direction in the basis, such as %s", count, name)

    # -- in the training loop

    def attach(self, optimizer: Optimizer) -> None:
        """Project before and pin after every `optimizer.step()`, through the optimizer's own hooks.

        optimizer: a torch optimizer, or Accelerate's wrapper of one, that holds every protected parameter. Raises
        `InputError` for anything else, and when already attached.
        """
        if self._optimizer is not None:
            raise InputError("this projector is attached already; call detach() first")
        optimizer = unwrap_optimizer(optimizer)
        check_ownership(optimizer, _targets(self._plan))
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project the gradients now; collective. Call it before gradient clipping: the next step does not do it again.

        Without this call the hook projects, after clipping. Nothing happens with gradient=False.
        """
        if not self._gradient:
            return
        sources = []
        for entry in self._plan.entries:
            gradient = entry.target.parameter.grad
            sources.append(None if gradient is None else entry.block.local(gradient))
        self._runtime.run(sources)
        self._gradient_done = True

    def detach(self) -> None:
        """Take the hooks off the optimizer; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    @torch.no_grad()
    def extend(self, more: SpuriousBasis, *, initial: Mapping[str, Tensor] | None = None) -> None:
        """Add directions, in mid-run if need be; collective. Hooks stay attached.

        What `more` adds to the span of each weight joins its basis (`SpuriousBasis.union`). LoRA factors are projected
        off the new directions at once. Full weights are pinned to their state before training: before the first step
        that is the present one, afterwards `initial` must hold it, {parameter name: W0, whole or sharded like the
        parameter}, for each weight (and bias) that gains directions. Raises `InputError`, and changes nothing, where
        that is missing or `more` does not fit.
        """
        more = _select(more, self._side)
        basis = more if self.basis is None else self.basis.union(more)
        plan = self._make_plan(basis)
        if self._optimizer is not None:
            check_ownership(self._optimizer, _targets(plan))
        sources: list[Tensor | None] = list(_weights(plan))
        if self._begun:
            grown = [self._pins.gains(entry) for entry in plan.entries]
            sources = [
                before_training(entry, initial or {}) if gains else None
                for entry, gains in zip(plan.entries, grown, strict=True)
            ]
        runtime = Runtime(plan)
        if not self._begun:
            check_start(plan, runtime, _weights(plan))
        pins = Pins(plan, runtime, sources)
        pins.carry_over(self._pins)
        self.basis, self._plan, self._runtime, self._pins = basis, plan, runtime, pins
        self._clear_factors()
        if self._pin and self._begun:
            self._restore()

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
        return find_unprotected(self._model, self.basis)

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
        holds all; they share memory with the projector's own.
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
        targets: list[Target] = [] if basis is None else find_targets(self._model, basis)
        if basis is not None and not targets:
            raise InputError(
                f"none of the {len(basis)} weights of the basis is trained, by itself or by LoRA (the first is "
                f"{basis.weights[0]!r}); train modules that the basis covers, or detect a basis for those that are"
            )
        return build_plan(targets, basis)

    def _restore(self) -> None:
        self._runtime.run(_weights(self._plan), self._pins.flats)

    def _clear_factors(self) -> None:
        """A V = 0 and U^T B = 0; full weights are not touched."""
        weights = zip(self._plan.entries, _weights(self._plan), strict=True)
        self._runtime.run([weight if entry.target.is_factor else None for entry, weight in weights])

    def _before_step(self, *_: Any) -> None:
        if not self._gradient_done:
            self.project_gradients()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._gradient_done, self._begun = False, True
        if self._pin:
            self._restore()


def _targets(plan: Plan) -> list[Target]:
    return [entry.target for entry in plan.entries]


def _weights(plan: Plan) -> list[Tensor]:
    """This rank's pieces, resolved anew at each pass: frameworks may replace the storage of a parameter."""
    return [entry.block.local(entry.target.parameter) for entry in plan.entries]


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
