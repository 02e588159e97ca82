"""Small weights of one shape are worked on together: the same numbers, in a fixed number of calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection import GraspProjector, batches
from grasp_dist.projection.reference import pin, project_gradient, sketches
from tests.distributed import run_distributed
from tests.projection.projection_cases import LoraLinear, Watch, draw, orthonormal, relative_error
from tests.projection.test_sharded import GRID, LINE, SIDES, TOLERANCE, _full, _place

SIZES = {"square": (9, 9), "wide": (7, 13), "short": (3, 8)}


class Crowd(nn.Module):
    """`count` linear layers of each size, and as many adapters, their orders mixed."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for index, (name, (out, into)) in itertools.product(range(count), SIZES.items()):
            self.add_module(f"{name}{index}", nn.Linear(into, out, bias=index != 1))
            self.add_module(f"adapted{index}", LoraLinear(10, 6, 4))


def _basis(model: nn.Module, side: str) -> SpuriousBasis:
    tensors = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if "." in name or not name:
            continue
        weight = module.base_layer.weight if isinstance(module, LoraLinear) else module.weight
        # One of each kind lacks a side that the others have.
        other = name.strip("abcdefghijklmnopqrstuvwxyz") == "2"
        if side in ("write", "both") and not other:
            tensors[f"{name}.weight.write"] = orthonormal(weight.shape[0], 2, 2 * seed)
        if side in ("read", "both") or other:
            tensors[f"{name}.weight.read"] = orthonormal(weight.shape[1], 3, 2 * seed + 1)
    return SpuriousBasis.from_tensors(tensors)


def _directions(name: str, basis: SpuriousBasis) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    module, leaf = name.split(".", 1)
    U, V = (
        basis.tensor(f"{module}.weight", side).double() if side in basis.sides(f"{module}.weight") else None
        for side in ("write", "read")
    )
    return (None if "lora_A" in leaf else U), (None if "lora_B" in leaf or leaf == "bias" else V)


def _one_case(placement: str, side: str, dtype: torch.dtype, line, grid) -> dict:
    model = Crowd(6)
    whole, start = {}, {}
    basis = _basis(model, side)
    for seed, (name, old) in enumerate(list(model.named_parameters())):
        zero = "lora_B" in name
        start[name] = torch.zeros(old.shape, dtype=dtype) if zero else draw(*old.shape, seed=seed, dtype=dtype)
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(_place(start[name].clone(), placement, line, grid), requires_grad=old.requires_grad)
        setattr(model.get_submodule(owner), leaf, value)
    projector = GraspProjector(model, basis)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, weight_decay=0.1)
    projector.attach(optimizer)
    for seed, (name, parameter) in enumerate(parameters.items()):
        whole[name] = draw(*parameter.shape, seed=1000 + seed, dtype=dtype)
        if not name.startswith("wide4"):  # one of a batch has no gradient
            parameter.grad = _place(whole[name].clone(), placement, line, grid)
    with Watch() as watch:
        finite = projector.project_gradients()
    errors = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            wanted = project_gradient(whole[name].double().view(len(whole[name]), -1), *_directions(name, basis))
            found = _full(name, parameter.grad, whole[name])
            errors["gradient", name] = relative_error(found.view(wanted.shape), wanted)
    # One of a batch has no gradient and stays; the optimizer moves the others.
    optimizer.step()
    for name, parameter in parameters.items():
        U, V = _directions(name, basis)
        weight, gradient = (value.double().view(len(value), -1) for value in (start[name], whole[name]))
        weight = project_gradient(weight, None, V) if "lora_A" in name else weight
        moved = weight
        if parameter.grad is not None:
            moved = weight - 0.3 * (project_gradient(gradient, U, V) + 0.1 * weight)
        wanted = pin(moved, sketches(weight, U, V), U, V)
        errors["weight", name] = relative_error(_full(name, parameter, whole[name]).view(wanted.shape), wanted)
    batched = {index for batch in projector._plan.batches for index in batch.members}
    held = [e.fragment.box.numel > 0 for e in projector._plan.entries]
    return {
        "finite": finite,
        "errors": errors,
        "collectives": watch.collectives,
        "bytes": projector.bytes_per_pass,
        "residual": max(projector.residual().values()),
        "batched": sum(held[index] for index in batched) / max(1, sum(held)),
    }


def _world() -> dict:
    size = torch.distributed.get_world_size()
    line = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (2, 2)) if size == 4 else None
    cases = itertools.product(LINE + (GRID if grid is not None else ()), SIDES, (torch.float32, torch.bfloat16))
    return {case: _one_case(*case, line, grid) for case in cases if case[1] == "both" or case[2] is torch.float32}


@pytest.mark.parametrize(
    "world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_matches_the_reference_on_every_placement(world_size):
    for rank in run_distributed(_world, world_size):
        for key, case in rank.items():
            assert case["finite"], key
            assert case["errors"]
            for name, error in case["errors"].items():
                assert error <= TOLERANCE[key[2]], (key, name, error)
            assert case["residual"] <= (8e-3 if key[2] is torch.bfloat16 else 1e-6), key
            assert {name for name, _ in case["collectives"]} <= {"allreduce_"}, key
            assert sum(numbers for _, numbers in case["collectives"]) == case["bytes"], key
            assert case["batched"] > 0.5, key


class _Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is not torch.ops.aten.detach:  # a weight is looked up, which calls nothing
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["write", "both"])
def test_the_calls_of_a_pass_do_not_grow_with_the_number_of_weights(side, dtype):
    counts = []
    for count in (6, 60):
        model = Crowd(count).to(dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 2)
        basis = _basis(model, side)
        projector = GraspProjector(model, basis)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        passes = projector.project_gradients, projector._restore
        for run in passes:
            run()
        with _Calls() as calls:
            for run in passes:
                run()
        counts.append(calls.count)
    assert counts[0] == counts[1]


def test_batched_and_one_by_one_agree(monkeypatch):
    found = []
    for fewest in (batches.FEWEST, 10**9):
        monkeypatch.setattr(batches, "FEWEST", fewest)
        torch.manual_seed(0)
        model = Crowd(6)
        projector = GraspProjector(model, _basis(model, "both"))
        assert bool(projector._plan.batches) is (fewest < 10**9)
        for seed, parameter in enumerate(model.parameters()):
            parameter.grad = draw(*parameter.shape, seed=seed, dtype=torch.float32)
        projector.project_gradients()
        found.append([parameter.grad for parameter in model.parameters()])
    for batched, alone in zip(*found, strict=True):
        torch.testing.assert_close(batched, alone, rtol=0, atol=2e-6)


def test_a_batch_keeps_no_second_copy_of_the_basis():
    model = Crowd(6)
    projector = GraspProjector(model, _basis(model, "both"))
    for batch in projector._plan.batches:
        for position, index in enumerate(batch.members):
            (part,) = projector._plan.entries[index].parts
            for own, stack in ((part.left, batch.part.left), (part.right, batch.part.right)):
                assert (own is None) == (stack is None)
                if own is not None:
                    assert own.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
                    assert torch.equal(own[0], stack[position])
