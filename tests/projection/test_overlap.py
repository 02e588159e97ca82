"""Projection during the backward pass: the same gradients as after it, on process groups of its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError, NonFiniteError
from grasp_dist.projection import GraspProjector, overlap
from tests.distributed import run_distributed
from tests.projection.projection_cases import draw, orthonormal

LAYERS, WIDTH = 5, 11


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


def _basis() -> SpuriousBasis:
    names = [f"layers.{index}" for index in range(LAYERS)] + ["unused"]
    tensors = {f"{name}.weight.write": orthonormal(WIDTH, 2, index) for index, name in enumerate(names)}
    tensors |= {f"{name}.weight.read": orthonormal(WIDTH, 3, 50 + index) for index, name in enumerate(names)}
    return SpuriousBasis.from_tensors(tensors)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _wrapped(layout: str) -> nn.Module:
    model = Stack()
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _train(layout: str, *, overlapping: bool, micro_batches: int) -> dict:
    model = _wrapped(layout)
    projector = GraspProjector(model, _basis(), overlap=overlapping)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    projector.attach(optimizer)
    rank = dist.get_rank() if layout != "plain" else 0
    gradients = {}
    for step in range(4):
        for micro_batch in range(micro_batches):
            seed = 1000 * step + 10 * micro_batch + rank
            model(draw(3, WIDTH, seed=seed, dtype=torch.float32)).square().mean().backward()
        finite = projector.project_gradients()
        gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    model(draw(3, WIDTH, seed=rank, dtype=torch.float32)).square().mean().backward()
    sick = next(p for p in model.parameters() if p.grad is not None)
    weights = {name: _whole(p) for name, p in model.named_parameters()}
    raised = None
    if not overlapping:
        local = sick.grad.to_local() if isinstance(sick.grad, DTensor) else sick.grad
        if local.numel() and (layout != "fsdp" or rank == 0):
            local.view(-1)[0] = torch.nan
        try:
            optimizer.step()
        except NonFiniteError:
            raised = True
    else:
        optimizer.zero_grad()
        bad = torch.full((3, WIDTH), torch.nan if rank == 0 else 0.1)
        model(bad).square().mean().backward()
        try:
            optimizer.step()
        except NonFiniteError:
            raised = True
    same = all(torch.equal(_whole(p), weights[name]) for name, p in model.named_parameters())
    return {"finite": finite, "gradients": gradients, "weights": weights, "raised": raised, "same": same}


def _both(layout: str, micro_batches: int, chunk: int) -> tuple[dict, dict]:
    overlap.CHUNK = chunk
    return tuple(_train(layout, overlapping=flag, micro_batches=micro_batches) for flag in (False, True))


CASES = [("plain", 1, 2), ("plain", 2, 2), ("ddp", 1, 2), ("fsdp", 1, 3), ("fsdp", 2, 3), ("fsdp", 1, 16)]


def _world() -> dict:
    return {case: _both(*case) for case in CASES}


@pytest.fixture(scope="module")
def world():
    return run_distributed(_world, 3)


@pytest.mark.parametrize("case", CASES)
def test_same_gradients_and_weights(world, case):
    for rank in world:
        after, during = rank[case]
        assert after["finite"]
        assert during["finite"]
        for what in ("gradients", "weights"):
            assert during[what].keys() == after[what].keys()
            for name, value in after[what].items():
                assert torch.allclose(during[what][name], value, rtol=1e-5, atol=2e-6), (what, name)


@pytest.mark.parametrize("case", CASES)
def test_a_non_finite_gradient_leaves_the_weights_alone_on_every_rank(world, case):
    for rank in world:
        for run in rank[case]:
            assert run["raised"]
            assert run["same"]


def test_the_work_is_done_before_the_step():
    """In one process every gradient is projected as soon as it is there."""
    model, basis = Stack(), _basis()
    twin = copy.deepcopy(model)
    projector = GraspProjector(model, basis, overlap=True)
    projector.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for module in (model, twin):
        module(draw(3, WIDTH, seed=0, dtype=torch.float32)).square().mean().backward()
    U = basis.tensor("layers.0.weight", "write")
    assert (U.T @ model.layers[0].weight.grad).norm() < 1e-6 < (U.T @ twin.layers[0].weight.grad).norm()
    projector.detach()
    model.zero_grad()
    model(draw(3, WIDTH, seed=0, dtype=torch.float32)).square().mean().backward()
    assert torch.equal(model.layers[0].weight.grad, twin.layers[0].weight.grad)


def _backward(model: nn.Module, seed: int = 0) -> None:
    model(draw(3, WIDTH, seed=seed, dtype=torch.float32)).square().mean().backward()


def test_gradients_from_before_the_hooks_are_projected_too():
    model, basis = Stack(), _basis()
    U = basis.tensor("layers.0.weight", "write")
    _backward(model)
    projector = GraspProjector(model, basis, overlap=True)
    projector.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert (U.T @ model.layers[0].weight.grad).norm() > 1e-4
    assert projector.project_gradients()
    assert (U.T @ model.layers[0].weight.grad).norm() < 1e-6


def test_a_step_that_a_scaler_left_out_does_not_spoil_the_next():
    model = Stack()
    projector = GraspProjector(model, _basis(), overlap=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector.attach(optimizer)
    model(torch.full((3, WIDTH), torch.inf)).square().mean().backward()
    optimizer.zero_grad()  # as a loop does that finds the overflow by itself
    _backward(model)
    optimizer.step()
    model(torch.full((3, WIDTH), torch.inf)).square().mean().backward()
    for _ in range(2):  # and asking again does not help
        with pytest.raises(NonFiniteError):
            optimizer.step()


def test_half_precision_chunks_share_one_buffer():
    model = Stack().to(torch.bfloat16)
    projector = GraspProjector(model, _basis(), overlap=True)
    projector.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(draw(3, WIDTH, seed=0, dtype=torch.bfloat16)).square().mean().backward()
    assert len({id(chunk._runtime.scratch) for chunk in projector._overlap._alone}) == 1


def test_without_gradients_it_is_refused():
    with pytest.raises(InputError, match="overlap=True"):
        GraspProjector(Stack(), _basis(), gradient=False, overlap=True)
