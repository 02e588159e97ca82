"""Loss scaling: a step that `torch.amp.GradScaler` skips changes nothing, and all others are projected and pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import NonFiniteError
from grasp_dist.projection import GraspProjector
from grasp_dist.projection.reference import project_gradient
from tests.projection.projection_cases import draw, orthonormal, relative_error

U, V = orthonormal(12, 3, 1), orthonormal(7, 2, 2)
BASIS = SpuriousBasis.from_tensors({"first.weight.write": U, "first.weight.read": V})
BAD = (1, 2, 5)
STEPS = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 12)
        self.second = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _sgd(**settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, **settings)


def _adamw(**settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **settings)


OPTIMIZERS = {
    "sgd": _sgd(momentum=0.9),
    "adamw": _adamw(foreach=True),
    "sgd-fused": _sgd(fused=True),
    "adamw-fused": _adamw(fused=True),
}
"""The fused ones step on every call, with the scale and `found_inf` as attributes, and skip inside the kernel. (Fused
SGD with momentum, in torch 2.13, goes on from uninitialised memory if its very first step is skipped.)"""
FUSED = ("sgd-fused", "adamw-fused")

# When the loop projects: itself, after unscaling and before clipping; or never, so that the hook does it. A loop that
# clips must unscale; one that does not leaves that to the scaler, or to the fused kernel.
LOOPS = ("explicit", "hook after unscale_", "hook")


def _loss(model: nn.Module, step: int) -> Tensor:
    return model(draw(9, 7, seed=step, dtype=torch.float32)).square().sum()


@dataclass
class Run:
    model: Net
    projector: GraspProjector
    weights: list[dict[str, Tensor]]
    """Before training and after each step."""
    projected: list[bool]
    """What `project_gradients()` returned."""


def _run(make: Callable[[nn.Module], Any], loop: str, *, scaled: bool, gradient: bool = True, pin: bool = True) -> Run:
    """Train with overflows at the steps BAD; without a scaler, leave these steps out."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model)
    projector = GraspProjector(model, BASIS, gradient=gradient, pin=pin)
    projector.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
    run = Run(model, projector, [_snapshot(model)], [])
    for step in range(STEPS):
        if scaled or step not in BAD:
            optimizer.zero_grad()
            scaler.scale(_loss(model, step) * (torch.inf if step in BAD else 1.0)).backward()
            if loop != "hook":
                scaler.unscale_(optimizer)
            if loop == "explicit":
                before = [parameter.grad.clone() for parameter in model.parameters()]
                run.projected.append(projector.project_gradients())
                if not run.projected[-1]:
                    for parameter, gradient_before in zip(model.parameters(), before, strict=True):
                        torch.testing.assert_close(parameter.grad, gradient_before, rtol=0, atol=0, equal_nan=True)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        run.weights.append(_snapshot(model))
    return run


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_without_a_scaler(name, loop):
    """Steps with Inf are left out; all others are those of a run in fp32 that left them out itself."""
    run = _run(OPTIMIZERS[name], loop, scaled=True)
    twin = _run(OPTIMIZERS[name], loop, scaled=False)
    for step, (found, wanted) in enumerate(zip(run.weights, twin.weights, strict=True)):
        for parameter, value in found.items():
            assert value.isfinite().all(), (step, parameter)
            assert relative_error(value, wanted[parameter]) < 1e-5, (step, parameter)
    assert run.projector.residual()["first.weight"] <= 1e-6
    assert relative_error(run.weights[-1]["first.weight"], run.weights[0]["first.weight"]) > 1e-2


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_the_weights(name, loop):
    run = _run(OPTIMIZERS[name], loop, scaled=True)
    for step in BAD:
        for parameter, value in run.weights[step + 1].items():
            before = run.weights[step][parameter]
            if name in FUSED:  # step() runs, and pinning what is pinned rounds
                assert relative_error(value, before) < 1e-6, (step, parameter)
            else:
                assert torch.equal(value, before), (step, parameter)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_project_gradients_says_what_it_found(name):
    run = _run(OPTIMIZERS[name], "explicit", scaled=True)
    assert run.projected == [step not in BAD for step in range(STEPS)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["sgd", "sgd-fused"])
def test_gradients_are_projected_on_every_good_step(name, loop):
    """Without pins, and SGD without decay keeps a projected gradient's directions: all of the change is outside."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=name in FUSED)

    run = _run(make, loop, scaled=True, pin=False)
    change = run.weights[-1]["first.weight"] - run.weights[0]["first.weight"]
    assert change.norm() > 1e-2
    assert relative_error(change, project_gradient(change, U, V)) < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pins_without_projection(name):
    run = _run(OPTIMIZERS[name], "hook", scaled=True, gradient=False)
    assert run.projector.residual()["first.weight"] <= 1e-6
    assert all(value.isfinite().all() for value in run.weights[-1].values())


# -- what one step leaves behind for the next


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("where", ["protected", "elsewhere"])
@pytest.mark.parametrize("name", ["sgd", "sgd-fused"])
def test_a_skipped_step_does_not_count_for_the_next(name, where, set_to_none):
    """The loop projects itself, the scaler skips, and the next step is left to the hook: it must project anew."""
    torch.manual_seed(0)
    model = Net()
    start = _snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=name in FUSED)
    projector = GraspProjector(model, BASIS, pin=False)
    projector.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    scaler.scale(_loss(model, 0)).backward()
    (model.first.weight if where == "protected" else model.second.weight).grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    assert projector.project_gradients() == (where == "elsewhere")
    scaler.step(optimizer)
    scaler.update()
    for parameter, value in _snapshot(model).items():
        assert torch.equal(value, start[parameter])

    optimizer.zero_grad(set_to_none)
    scaler.scale(_loss(model, 1)).backward()
    scaler.step(optimizer)
    scaler.update()
    change = model.first.weight.detach() - start["first.weight"]
    assert change.norm() > 1e-2
    assert relative_error(change, project_gradient(change, U, V)) < 1e-5


def test_without_a_scaler_the_step_is_refused():
    """Nothing would skip it: the Inf would reach every weight through the sketches."""
    model = Net()
    start = _snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = GraspProjector(model, BASIS)
    projector.attach(optimizer)
    for explicit in (True, False):
        optimizer.zero_grad()
        (_loss(model, 0) * torch.inf).backward()
        if explicit:
            assert not projector.project_gradients()
        with pytest.raises(NonFiniteError):
            optimizer.step()
        for parameter, value in _snapshot(model).items():
            assert torch.equal(value, start[parameter])
    optimizer.zero_grad()
    _loss(model, 0).backward()
    assert projector.project_gradients()
    optimizer.step()
    assert projector.residual()["first.weight"] <= 1e-6
    assert not torch.equal(model.first.weight, start["first.weight"])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_autocast_that_overflows_by_itself(name, loop):
    """The usual start of fp16 training: the scale is too large, and falls until gradients fit."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model)
    projector = GraspProjector(model, BASIS)
    projector.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=0.25)
    start, skipped = _snapshot(model), 0
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = _loss(model, step)
        scaler.scale(loss.float()).backward()
        if loop != "hook":
            scaler.unscale_(optimizer)
        if loop == "explicit":
            projector.project_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
    assert 0 < skipped < 10
    assert projector.residual()["first.weight"] <= 1e-6
    assert relative_error(model.first.weight.detach(), start["first.weight"]) > 1e-3
