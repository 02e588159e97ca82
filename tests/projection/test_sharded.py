"""The fast path against the fp64 reference on 1 to 4 ranks: plain tensors and DTensors, uneven and empty shards.

Each world is spawned once and returns every figure that the tests look at.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from grasp_dist.projection import GraspProjector
from grasp_dist.projection.reference import pin, project_gradient, sketches
from tests.distributed import run_distributed
from tests.projection.projection_cases import SHAPES, Watch, Zoo, draw, relative_error, zoo_basis

LEARNING_RATE, DECAY = 0.3, 0.1
PLACEMENTS = {"plain": None, "shard0": 0, "shard1": 1}
SIDES = ("write", "read", "both")
CASES = [
    *itertools.product(PLACEMENTS, SIDES, (torch.float32,)),
    *itertools.product(PLACEMENTS, ("both",), (torch.float64, torch.bfloat16)),
]


def _fill(model: nn.Module, dim: int | None, mesh, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Give every parameter known values, sharded on `dim`; returns the whole values."""
    whole = {}
    for seed, (name, old) in enumerate(list(model.named_parameters())):
        value = torch.zeros(old.shape, dtype=dtype) if "lora_B" in name else draw(*old.shape, seed=seed, dtype=dtype)
        whole[name] = value.clone()
        if dim is not None:
            value = distribute_tensor(value, mesh, [Shard(min(dim, value.ndim - 1))])
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    return whole


def _give_gradients(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    whole = {}
    for offset, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            whole[name] = draw(*parameter.shape, seed=seed + offset, dtype=parameter.dtype)
            gradient = whole[name].clone()
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
    return whole


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _sides_of(name: str, basis) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Left and right basis of a stored parameter, by what the parameter is."""
    module, _, leaf = name.partition(".")
    weight = f"{module}.weight"
    U, V = (basis.tensor(weight, side).double() if side in basis.sides(weight) else None for side in ("write", "read"))
    if leaf == "bias" or "lora_B" in leaf:
        return U, None
    if "lora_A" in leaf:
        return None, V
    return (V, U) if module == "turned" else (U, V)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.double()
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(1)


def _one_case(dim: int | None, side: str, mesh, dtype: torch.dtype) -> dict:
    """One optimizer step, held against the reference."""
    model, basis = Zoo(), zoo_basis(side)
    start = _fill(model, dim, mesh, dtype)
    projector = GraspProjector(model, basis)
    for name in start:
        if "lora_A" in name:
            _, V = _sides_of(name, basis)
            start[name] = project_gradient(start[name].double(), None, V)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE, weight_decay=DECAY, foreach=False)
    projector.attach(optimizer)
    gradients = _give_gradients(model, seed=1000)

    with Watch() as watch:
        projector.project_gradients()
    gradient_errors, weight_errors = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = project_gradient(_matrix(gradients[name]), *_sides_of(name, basis))
            gradient_errors[name] = relative_error(_matrix(_full(parameter.grad)), wanted)
    once = {name: _full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    projector.project_gradients()
    again = max(relative_error(_full(p.grad), once[n]) for n, p in model.named_parameters() if p.grad is not None)

    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            left, right = _sides_of(name, basis)
            W0, G = _matrix(start[name]), project_gradient(_matrix(gradients[name]), left, right)
            moved = W0 - LEARNING_RATE * (G + DECAY * W0)
            wanted = pin(moved, sketches(W0, left, right), left, right)
            weight_errors[name] = relative_error(_matrix(_full(parameter)), wanted)
    # A rank without a gradient must still take part in the sums.
    for parameter in trainable:
        parameter.grad = None
    projector.project_gradients()
    return {
        "gradient": gradient_errors,
        "weight": weight_errors,
        "again": again,
        "collectives": watch.collectives,
        "bytes": projector.bytes_per_pass,
        "residual": projector.residual(),
    }


def _world() -> dict:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {case: _one_case(PLACEMENTS[case[0]], case[1], mesh, case[2]) for case in CASES}


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda world: f"world{world}")
def world(request):
    return request.param, run_distributed(_world, request.param)


def test_matches_the_fp64_reference(world):
    _, ranks = world
    for (placement, side, dtype), case in ranks[0].items():
        for what in ("gradient", "weight"):
            for name, error in case[what].items():
                assert error <= TOLERANCE[dtype], (placement, side, dtype, what, name, error)


def test_projecting_twice_changes_nothing(world):
    _, ranks = world
    for (placement, side, dtype), case in ranks[0].items():
        assert case["again"] <= TOLERANCE[dtype], (placement, side, dtype)


def test_one_all_reduce_at_most_and_no_other_collective(world):
    """None at all where every contraction is local; otherwise exactly the sketches' bytes."""
    size, ranks = world
    for rank in ranks:
        for (placement, side, dtype), case in rank.items():
            wanted = _bytes_on_the_wire(placement, side, 8 if dtype is torch.float64 else 4) if size > 1 else 0
            assert case["bytes"] == wanted
            assert case["collectives"] == ([("allreduce_", wanted)] if wanted else []), (placement, side)


def test_residual_is_the_same_on_every_rank(world):
    _, ranks = world
    for key, case in ranks[0].items():
        assert set(case["residual"]) == {f"{name}.weight" for name in SHAPES}
        assert max(case["residual"].values()) <= {torch.bfloat16: 8e-3}.get(key[2], 1e-6)
        assert all(rank[key]["residual"] == case["residual"] for rank in ranks)


def _bytes_on_the_wire(placement: str, side: str, width: int) -> int:
    """k_w * in where rows are cut, out * k_r where columns are; LoRA factors likewise. By hand, not from the plan."""
    if placement == "plain":
        return 0
    total = 0
    k_w = 2
    for name, (out, into) in SHAPES.items():
        k_r = min(3, into - 1)
        write, read = side in ("write", "both"), side in ("read", "both")
        rows_cut = placement == "shard0"
        if name == "adapted":
            rank = 5
            total += k_w * rank if write and rows_cut else 0  # U^T B sums over out
            total += k_r * rank if read and not rows_cut else 0  # A V sums over in
            continue
        output_cut = rows_cut != (name == "turned")
        total += k_w * into if write and output_cut else 0
        total += k_r * out if read and not output_cut else 0
        total += k_w if write else 0  # the bias is cut in either placement
    return total * width
