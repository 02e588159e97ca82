"""Flat partitions that cut rows and experts anywhere, against the fp64 reference on 1 to 4 ranks.

The partition is made here, on top of real process groups, so that every way to cut comes up: inside a row, a row over
three ranks, between rows, inside an expert, ranks that hold nothing. Each world is spawned once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from grasp_dist.errors import NonFiniteError
from grasp_dist.projection import GraspProjector, projector
from grasp_dist.projection.adapters import torch_optimizers
from grasp_dist.projection.fragments import Interval, Storage, stack_shape
from grasp_dist.projection.reference import project_gradient
from tests.distributed import run_distributed
from tests.projection.projection_cases import (
    Watch,
    Zoo,
    draw,
    per_expert,
    relative_error,
    sides_of,
    stepped,
    worked_on_as_large,
    zoo_basis,
)

LEARNING_RATE, DECAY = 0.3, 0.1
_recognise = projector.recognise
SIDES = ("write", "read", "both")
CUTS = ("even", "ragged", "first and last", "last rank holds all")
CASES = [(cut, side, torch.float32) for cut in CUTS for side in SIDES] + [("ragged", "both", torch.bfloat16)]


class Flat:
    """A framework whose every parameter is cut flat at positions of its own; the optimizer steps the pieces."""

    handles_overflow = staticmethod(torch_optimizers.handles_overflow)
    beside = staticmethod(torch_optimizers.beside)

    def __init__(self, model: nn.Module, cut: str) -> None:
        self.module = model
        self._cut = cut
        self.pieces = {name: nn.Parameter(self._own(name, p).clone()) for name, p in model.named_parameters()}

    def _edges(self, name: str, numel: int) -> list[int]:
        """Where each rank's interval begins, and the end; the same on every rank."""
        world_size = dist.get_world_size()
        if self._cut == "even":
            size = -(-numel // world_size)
            return [min(rank * size, numel) for rank in range(world_size)] + [numel]
        if self._cut == "ragged":
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            inner = torch.randint(0, numel + 1, (world_size - 1,), generator=seed).tolist()
            return [0, *sorted(inner), numel]
        if self._cut == "first and last":  # those between hold nothing, and still take part in the sums
            return [0] + [numel // 2 + 1] * (world_size - 1) + [numel]
        return [0] * world_size + [numel]

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        edges = self._edges(name, tensor.numel())
        return tensor.detach().reshape(-1)[edges[dist.get_rank()] : edges[dist.get_rank() + 1]]

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return self._own(name, whole).clone()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def fragment(self, name: str, parameter: nn.Parameter) -> Interval:
        name = next(own for own, candidate in self.module.named_parameters() if candidate is parameter)
        edges = self._edges(name, parameter.numel())
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        piece = self.pieces[name]
        return Interval(
            shape=stack_shape(tuple(parameter.shape)),
            span=(edges[dist.get_rank()], edges[dist.get_rank() + 1]),
            cuts=tuple(sorted({edge for edge in edges[1:-1] if 0 < edge < parameter.numel()})),
            group=group,
            check_group=group,
            storage=Storage(piece.detach, lambda: piece.grad, like=lambda whole: self._own(name, whole)),
        )

    def owned(self, optimizer: Any) -> set[int]:
        return {id(parameter) for parameter in self.module.parameters()}

    def hook(self, optimizer: Any, before: Callable[[], None], after: Callable[[int], None]) -> Callable[[], None]:
        return torch_optimizers.hook(optimizer, before, after)


def _whole(framework: Flat, name: str, piece: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    edges = framework._edges(name, like.numel())
    total = torch.zeros(like.numel(), dtype=torch.float64)
    total[edges[dist.get_rank()] : edges[dist.get_rank() + 1]] = piece.detach().double()
    dist.all_reduce(total)
    return total.view(like.shape)


def _one_case(cut: str, side: str, dtype: torch.dtype) -> dict:
    model, basis = Zoo(), zoo_basis(side)
    start, gradients = {}, {}
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            parameter.data = draw(*parameter.shape, seed=seed, dtype=dtype)
            if "lora_B" in name:
                parameter.zero_()
            start[name] = parameter.detach().clone()
            gradients[name] = draw(*parameter.shape, seed=1000 + seed, dtype=dtype)
    framework = Flat(model, cut)
    projector.recognise = lambda model: framework
    # With two of the cuts as large weights are.
    with worked_on_as_large(cut in CUTS[1:3]):
        grasp = GraspProjector(model, basis)
    for name in start:
        if "lora_A" in name:
            start[name] = project_gradient(start[name].double(), None, sides_of(name, basis)[1])
    protected = [name for name in start if name in grasp.parameters]
    optimizer = torch.optim.SGD([framework.pieces[n] for n in protected], lr=LEARNING_RATE, weight_decay=DECAY)
    grasp.attach(optimizer)
    for name in protected:
        framework.pieces[name].grad = framework.own(name, gradients[name])

    with Watch() as watch:
        finite = grasp.project_gradients()
    errors = {}
    for name in protected:
        wanted = per_expert(project_gradient, gradients[name], *sides_of(name, basis))
        found = _whole(framework, name, framework.pieces[name].grad, gradients[name])
        errors[f"gradient of {name}"] = relative_error(found.view(wanted.shape), wanted)
    optimizer.step()
    for name in protected:
        arguments = gradients[name], *sides_of(name, basis)
        wanted = per_expert(stepped(LEARNING_RATE, DECAY), start[name], *arguments)
        found = _whole(framework, name, framework.pieces[name], start[name])
        errors[name] = relative_error(found.view(wanted.shape), wanted)

    pins = {name: pin.clone() for name, pin in grasp.state_dict().items()}
    projector.recognise = _recognise
    elsewhere = GraspProjector(model, basis).state_dict()  # of the same weights, not sharded
    grasp.load_state_dict(elsewhere)
    moved = max(relative_error(pins[name], elsewhere[name]) for name in pins)
    grasp.load_state_dict({name: 2 * pin for name, pin in pins.items()})
    doubled = {name: pin.clone() for name, pin in grasp.state_dict().items()}
    grasp.load_state_dict(pins)
    raised = 0
    for name in protected:
        for other in protected:
            framework.pieces[other].grad = framework.own(other, gradients[other])
        damaged = gradients[name].clone()
        damaged.view(-1)[-1] = torch.inf
        framework.pieces[name].grad = framework.own(name, damaged)
        try:
            optimizer.step()
        except NonFiniteError:
            raised += 1
    return {
        "finite": finite,
        "errors": errors,
        "collectives": watch.collectives,
        "bytes": grasp.bytes_per_pass,
        "residual": grasp.residual(),
        "pins": pins,
        "same pins elsewhere": (pins.keys() == elsewhere.keys(), moved),
        "doubled": all(torch.equal(2 * pins[name], doubled[name]) for name in pins),
        "not raised": len(protected) - raised,
    }


def _world() -> dict:
    return {case: _one_case(*case) for case in CASES}


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda world: f"world{world}")
def ranks(request):
    return run_distributed(_world, request.param)


def test_matches_the_fp64_reference(ranks):
    for case, found in ranks[0].items():
        assert found["finite"]
        for what, error in found["errors"].items():
            assert error <= (8e-3 if case[2] is torch.bfloat16 else 1e-5), (case, what, error)


def test_residuals_agree(ranks):
    for case, found in ranks[0].items():
        assert max(found["residual"].values()) <= (8e-3 if case[2] is torch.bfloat16 else 1e-6), case
        assert all(rank[case]["residual"] == found["residual"] for rank in ranks)


def test_one_all_reduce_at_most(ranks):
    for rank in ranks:
        for case, found in rank.items():
            wanted = [("allreduce_", found["bytes"])] if found["bytes"] else []
            assert found["collectives"] == wanted, case


def test_bytes_do_not_grow_with_the_weight(ranks):
    """Of an uncut partition, the sketches of cut experts and rows only: nothing."""
    if len(ranks) > 1:
        for side in SIDES:
            alone = ranks[0]["last rank holds all", side, torch.float32]["bytes"]
            assert alone == 4  # the number by which the ranks agree on non-finite values


def test_pins_are_whole_equal_and_loadable(ranks):
    for case, found in ranks[0].items():
        assert found["doubled"], case
        for rank in ranks:
            for name, pin in found["pins"].items():
                assert torch.equal(rank[case]["pins"][name], pin), (case, name)


def test_pins_of_another_layout_are_the_same(ranks):
    """Names, shapes and values: what was saved under one framework loads under another."""
    for case, found in ranks[0].items():
        named_alike, off = found["same pins elsewhere"]
        assert named_alike
        assert off <= 1e-5, case


def test_a_non_finite_gradient_is_raised_on_every_rank(ranks):
    assert all(found["not raised"] == 0 for rank in ranks for found in rank.values())
