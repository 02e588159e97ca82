"""The fast path against the fp64 reference on 1 to 4 ranks: plain tensors and DTensors, uneven and empty shards.

Each world is spawned once and returns every figure that the tests look at.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from grasp_dist.errors import NonFiniteError
from grasp_dist.projection import GraspProjector
from grasp_dist.projection.reference import project_gradient
from tests.distributed import run_distributed
from tests.projection.projection_cases import (
    SHAPES,
    STACKS,
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
LINE = ("plain", "first", "second", "last")
"""Not sharded, and sharded on that dimension of a one-dimensional mesh."""
GRID = ("hsdp", "tensor-parallel", "fsdp-on-rows", "fsdp-on-columns", "strided")
"""On a mesh of 2 x 2: replicas of shards; replicas over tensor parallelism; FSDP on the rows of column-parallel (the
same dimension, strided) and of row-parallel weights, ..."""
SIDES = ("write", "read", "both")
SICK = ("plain.weight", "plain.bias", "turned.weight", "adapted.lora_A.default.weight", "experts.up", "experts.down")
"""Parameters that get a NaN, one at a time."""


def _cases(world_size: int) -> list[tuple[str, str, torch.dtype]]:
    placements = LINE + (GRID if world_size == 4 else ())
    return [
        *itertools.product(placements, SIDES, (torch.float32,)),
        *itertools.product(LINE, ("both",), (torch.float64, torch.bfloat16)),
    ]


def _place(value: torch.Tensor, placement: str, line: DeviceMesh, grid: DeviceMesh | None) -> torch.Tensor:
    last = value.ndim - 1
    if placement == "plain":
        return value
    if placement in LINE:
        dim = {"first": 0, "second": min(1, last), "last": last}[placement]
        return distribute_tensor(value, line, [Shard(dim)], src_data_rank=None).clone()
    assert grid is not None
    if placement == "strided":
        # As fully_shard makes of a column-parallel weight: cut by the second axis first, then by the first.
        rows = value.chunk(2)
        piece = rows[grid.get_coordinate()[1]] if len(rows) > grid.get_coordinate()[1] else value[:0]
        halves = piece.chunk(2)
        piece = halves[grid.get_coordinate()[0]] if len(halves) > grid.get_coordinate()[0] else piece[:0]
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        return DTensor.from_local(
            piece.clone(), grid, placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    placements = {
        "hsdp": [Replicate(), Shard(0)],
        "tensor-parallel": [Replicate(), Shard(last)],
        "fsdp-on-rows": [Shard(0), Shard(last)],
        "fsdp-on-columns": [Shard(last), Shard(0)],
    }[placement]
    return distribute_tensor(value, grid, placements, src_data_rank=None).clone()


def _fill(model: nn.Module, dtype: torch.dtype, place) -> dict[str, torch.Tensor]:
    """Give every parameter known values, placed; returns the whole values."""
    whole = {}
    for seed, (name, old) in enumerate(list(model.named_parameters())):
        value = torch.zeros(old.shape, dtype=dtype) if "lora_B" in name else draw(*old.shape, seed=seed, dtype=dtype)
        whole[name] = value.clone()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(place(value), requires_grad=old.requires_grad))
    return whole


def _give_gradients(model: nn.Module, seed: int, place) -> dict[str, torch.Tensor]:
    whole = {}
    for offset, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            whole[name] = draw(*parameter.shape, seed=seed + offset, dtype=parameter.dtype)
            parameter.grad = place(whole[name].clone())
    return whole


def _full(name: str, tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The whole tensor, from the pieces of all ranks. (DTensor's own gathering of strided uneven shards is not what is
    under test here.)"""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    from grasp_dist.projection.adapters.tensors import Tensors

    box = Tensors(nn.Module()).fragment(name, nn.Parameter(tensor.detach())).box
    spans = [box.experts, box.rows, box.columns]
    spans = {1: spans[1:2], 2: spans[1:], 3: spans}[tensor.ndim]
    both = torch.zeros(2, *whole.shape, dtype=torch.float64)
    own = tuple(slice(*span) for span in spans)
    both[(0, *own)], both[(1, *own)] = tensor.to_local().detach().double(), 1.0
    torch.distributed.all_reduce(both)
    total, count = both[0], both[1]
    assert (count >= 1).all(), f"nobody holds some numbers of {name}"
    return total / count


def _one_case(placement: str, side: str, dtype: torch.dtype, line: DeviceMesh, grid: DeviceMesh | None) -> dict:
    """One optimizer step, held against the reference."""

    def place(value: torch.Tensor) -> torch.Tensor:
        return _place(value, placement, line, grid)

    model, basis = Zoo(), zoo_basis(side)
    start = _fill(model, dtype, place)
    # In fp32 as large weights are.
    with worked_on_as_large(dtype is torch.float32):
        projector = GraspProjector(model, basis)
    for name in start:
        if "lora_A" in name:
            _, V = sides_of(name, basis)
            start[name] = project_gradient(start[name].double(), None, V)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE, weight_decay=DECAY, foreach=False)
    projector.attach(optimizer)
    gradients = _give_gradients(model, 1000, place)

    with Watch() as watch:
        finite = projector.project_gradients()
    gradient_errors, weight_errors, once = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = per_expert(project_gradient, gradients[name], *sides_of(name, basis))
            once[name] = _full(name, parameter.grad, gradients[name])
            gradient_errors[name] = relative_error(once[name].reshape(wanted.shape), wanted)
    projector.project_gradients()
    now = {name: parameter.grad for name, parameter in model.named_parameters()}
    again = max(relative_error(_full(name, now[name], once[name]), once[name]) for name in once)

    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            arguments = gradients[name], *sides_of(name, basis)
            wanted = per_expert(stepped(LEARNING_RATE, DECAY), start[name], *arguments)
            found = _full(name, parameter, gradients[name])
            weight_errors[name] = relative_error(found.reshape(wanted.shape), wanted)
    # A rank without a gradient must still take part in the sums.
    for parameter in trainable:
        parameter.grad = None
    projector.project_gradients()
    return {
        "finite": finite,
        "gradient": gradient_errors,
        "weight": weight_errors,
        "again": again,
        "collectives": watch.collectives,
        "bytes": projector.bytes_per_pass,
        "residual": projector.residual(),
        "pins": {name: tuple(pin.shape) for name, pin in projector.state_dict().items()},
        "non-finite": _non_finite(model, projector, optimizer, place) if dtype is torch.float32 else {},
    }


def _non_finite(model: nn.Module, projector: GraspProjector, optimizer, place) -> dict:
    """A NaN in one number of each parameter in turn, on whichever rank holds it."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    pins = {name: pin.clone() for name, pin in projector.state_dict().items()}
    found = {}
    for name, parameter in model.named_parameters():
        if name not in projector.parameters or name not in SICK:
            continue
        gradients = _give_gradients(model, 7, place)
        gradients[name].view(-1)[-1] = torch.nan
        parameter.grad = place(gradients[name].clone())
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        others = {n: p.grad.clone() for n, p in parameters.items() if n != name}
        raised = False
        try:
            optimizer.step()
        except NonFiniteError:
            raised = True
        untouched = all(torch.equal(_local(parameters[n].grad), _local(g)) for n, g in others.items())
        same = all(torch.equal(_local(p), _local(old)) for p, old in zip(model.parameters(), before, strict=True))
        kept = all(torch.equal(_local(pin), _local(pins[n])) for n, pin in projector.state_dict().items())
        found[name] = raised, untouched, same, kept
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _world() -> dict:
    size = torch.distributed.get_world_size()
    line = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (2, 2)) if size == 4 else None
    return {case: _one_case(*case, line, grid) for case in _cases(size)}


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 8e-3}


@pytest.fixture(
    scope="module", params=[1, 2, pytest.param(3, marks=pytest.mark.slow), 4], ids=lambda world: f"world{world}"
)
def world(request):
    return request.param, run_distributed(_world, request.param)


def _cases_of(ranks, *, placements=None):
    for key, case in ranks[0].items():
        if placements is None or key[0] in placements:
            yield key, case


def test_matches_the_fp64_reference(world):
    _, ranks = world
    for (placement, side, dtype), case in _cases_of(ranks):
        assert case["finite"]
        for what in ("gradient", "weight"):
            assert case[what]
            for name, error in case[what].items():
                assert error <= TOLERANCE[dtype], (placement, side, dtype, what, name, error)


def test_projecting_twice_changes_nothing(world):
    _, ranks = world
    for (placement, side, dtype), case in _cases_of(ranks):
        assert case["again"] <= TOLERANCE[dtype], (placement, side, dtype)


def test_one_all_reduce_at_most_and_no_other_collective(world):
    """None at all on replicas; otherwise exactly the sketches' bytes, and one number to agree on non-finite values."""
    size, ranks = world
    for rank in ranks:
        for (placement, side, dtype), case in rank.items():
            assert {name for name, _ in case["collectives"]} <= {"allreduce_"}, (placement, side)
            assert sum(numbers for _, numbers in case["collectives"]) == case["bytes"], (placement, side)
            if placement in LINE:
                wanted = _bytes_on_the_wire(placement, side, 8 if dtype is torch.float64 else 4) if size > 1 else 0
                assert case["collectives"] == ([("allreduce_", wanted)] if wanted else []), (placement, side)
            else:  # the two axes and both together
                assert len(case["collectives"]) <= 3, (placement, side)


def test_replicas_are_not_summed(world):
    """HSDP reduces over the shard axis only: as many bytes as the same shards without replicas."""
    _, ranks = world
    for (_, side, _), case in _cases_of(ranks, placements=["hsdp"]):  # on 4 ranks
        assert case["collectives"] == [("allreduce_", _bytes_on_the_wire("first", side, 4))]


def test_residual_is_the_same_on_every_rank(world):
    _, ranks = world
    for key, case in _cases_of(ranks):
        assert set(case["residual"]) == {f"{name}.weight" for name in SHAPES} | set(STACKS)
        assert max(case["residual"].values()) <= {torch.bfloat16: 8e-3}.get(key[2], 1e-6), key
        assert all(rank[key]["residual"] == case["residual"] for rank in ranks)


def test_pins_have_the_same_shapes_in_every_layout(world):
    _, ranks = world
    for key, case in _cases_of(ranks):
        assert case["pins"] == ranks[0]["plain", key[1], torch.float32]["pins"], key


def test_a_non_finite_gradient_stops_all_ranks_and_touches_nothing(world):
    """Whichever rank holds the NaN: every rank raises; other gradients, weights and pins stay bit for bit."""
    _, ranks = world
    for rank in ranks:
        for key, case in rank.items():
            for name, found in case["non-finite"].items():
                assert found == (True, True, True, True), (key, name)


def _bytes_on_the_wire(placement: str, side: str, width: int) -> int:
    """k_w * in where rows are cut, out * k_r where columns are; LoRA factors likewise. By hand, not from the plan."""
    if placement == "plain":
        return 0
    total = 0
    k_w = 2
    write, read = side in ("write", "both"), side in ("read", "both")
    rows_cut = placement == "first"
    for name, (out, into) in SHAPES.items():
        k_r = min(3, into - 1)
        if name == "adapted":
            rank = 5
            total += k_w * rank if write and rows_cut else 0  # U^T B sums over out
            total += k_r * rank if read and not rows_cut else 0  # A V sums over in
            continue
        output_cut = rows_cut != (name == "turned")
        total += k_w * into if write and output_cut else 0
        total += k_r * out if read and not output_cut else 0
        total += k_w if write else 0  # the bias is cut in either placement
    for name, (experts, out, into) in STACKS.items() if placement != "first" else ():  # experts are whole on a rank
        output_cut = (placement == "second") != name.startswith("turned")
        total += experts * k_w * into if write and output_cut else 0
        total += experts * 3 * out if read and not output_cut else 0
        total += experts * k_w if write and name.startswith("turned") else 0  # U^T of each expert's bias
    return (total + 1) * width
