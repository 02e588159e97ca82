"""A small odd model, and one measured step of it, for the adapters that cut flat runs of numbers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grasp_dist.architecture import canonical_name
from grasp_dist.basis import SpuriousBasis
from grasp_dist.projection.fragments import Interval
from grasp_dist.projection.reference import pin, project_gradient, sketches
from tests.projection.projection_cases import LORA_RANK, LoraLinear, draw, orthonormal

LEARNING_RATE = 0.1
BATCH = 4
SHIFT = 0.25


class Odd(nn.Module):
    """Odd sizes, so that rows are cut and ranks hold nothing of some parameters; frozen layers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(7, 13).requires_grad_(False)
        self.wide = nn.Linear(13, 11)
        self.narrow = nn.Linear(11, 3, bias=False)
        self.single = nn.Linear(3, 1)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed).to(torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.wide(torch.tanh(self.entry(inputs))))
        return self.single(self.narrow(hidden)).square().mean()


def inputs_of(rank: int, micro_step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(BATCH, 7, seed=500 + 10 * micro_step + rank).to(torch.bfloat16).to(dtype)


def reference_gradients(model: nn.Module, micro_steps: int) -> dict[str, Tensor]:
    """Flat fp64 gradients of the mean loss over ranks and micro steps."""
    model = copy.deepcopy(model).double()
    losses = [model(inputs_of(r, m)) for r in range(dist.get_world_size()) for m in range(micro_steps)]
    torch.stack(losses).mean().backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def on_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def join(fragments: dict[str, Interval], find: Callable[[Interval], Tensor | None]) -> dict[str, Tensor]:
    """All numbers of every parameter, flat, each from the rank that holds it; NaN where none does."""
    found = {}
    for key, fragment in fragments.items():
        piece, length = find(fragment), fragment.span[1] - fragment.span[0]
        piece = torch.full((length,), torch.nan) if piece is None else piece.double().clone()
        assert piece.shape == (length,), (key, piece.shape, fragment.span)
        found[key] = fragment.span, piece
    result = {}
    for key, fragment in fragments.items():
        experts, rows, columns = fragment.shape
        result[key] = torch.full((experts * rows * columns,), torch.nan, dtype=torch.float64)
    for rank, (key, whole) in itertools.product(on_all_ranks(found), result.items()):
        span, piece = rank[key]
        whole[slice(*span)] = piece
    return result


def norm(values: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in values.values()]).norm())


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative to all of them together: some gradients are tiny."""
    return max(float((found[key] - wanted[key]).norm()) for key in wanted) / norm(wanted)


def measure(
    model: Odd,
    prepare: Callable[[], tuple[Any, Any]],
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[], None],
    step: Callable[[], None],
    *,
    micro_steps: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One SGD step, in which the hooks look at everything, clear one gradient and shift one weight.

    prepare: shard the model and build the optimizer; (framework, what to attach it to).
    """
    plain = copy.deepcopy(model).double()
    gradients = reference_gradients(model, micro_steps)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}
    start = {key: p.detach().double().flatten() for key, p in model.named_parameters() if p.requires_grad}
    framework, optimizer = prepare()
    named = {canonical_name(key): p for key, p in framework.module.named_parameters() if p.requires_grad}
    fragments: dict[str, Interval] = {key: framework.fragment(key, named[key]) for key in shapes}
    whole = {id(fragment): start[key].view(shapes[key]) for key, fragment in fragments.items()}
    wide, narrow = fragments["wide.weight"].storage, fragments["narrow.weight"].storage

    def weights() -> dict[str, Tensor]:
        return join(fragments, lambda fragment: fragment.storage.weight())

    def loss_error(values: dict[str, Tensor]) -> float:
        """How far the loss is off that of a plain model with these values: does the forward pass use them?"""
        plain.load_state_dict({key: value.view(shapes[key]) for key, value in values.items()}, strict=False)
        inputs = inputs_of(dist.get_rank(), 0)
        with torch.no_grad():
            found, wanted = float(forward(inputs.to(dtype))), float(plain(inputs))
        return max(on_all_ranks(abs(found - wanted) / wanted))

    seen: dict[str, Any] = {
        "owned": framework.owned(optimizer) >= {id(parameter) for parameter in named.values()},
        "shapes": {key: framework.shape(named[key]) == shape for key, shape in shapes.items()},
        "layout": {key: (f.shape, f.span, f.cuts, f.unit) for key, f in fragments.items()},
        "groups": {tuple(group and group.size() for group in (f.group, f.check_group)) for f in fragments.values()},
        "weight": off(weights(), start),
        "like": off(join(fragments, lambda fragment: fragment.storage.like(whole[id(fragment)])), start),
        "calls": [],
    }
    stepped: dict[str, Tensor] = {}

    def before() -> None:
        seen["calls"].append("before")
        found = join(fragments, lambda fragment: fragment.storage.gradient())
        scale = norm(found) / norm(gradients)
        seen["scale"] = scale
        seen["gradient"] = off({key: value / scale for key, value in found.items()}, gradients)
        cleared = wide.gradient()
        assert cleared is not None
        cleared.zero_()

    def after(unit: int) -> None:
        seen["calls"].append(unit)
        now = weights()
        stepped.update({key: now[key] for key, fragment in fragments.items() if fragment.unit == unit})
        if fragments["narrow.weight"].unit == unit:
            narrow.weight().add_(SHIFT)

    remove = framework.hook(optimizer, before, after)
    backward()
    step()
    calls = seen["calls"].copy()
    steps = {key: (start[key] - stepped[key]) / LEARNING_RATE for key in shapes}
    wanted = {**gradients, "wide.weight": torch.zeros_like(gradients["wide.weight"])}
    seen["norms"] = [norm(values) for values in (gradients, wanted, steps)]
    clip = seen["norms"][2] / seen["norms"][1]
    seen["step"] = off({key: value / clip for key, value in steps.items()}, wanted)
    seen["copies"] = [tuple(tensor.shape) for tensor in wide.copies()]
    masters = weights()
    seen["shift"] = float((masters["narrow.weight"] - stepped["narrow.weight"] - SHIFT).abs().max())
    seen["used"] = loss_error(masters)

    # Outside of a step, what is written to a master reaches the forward pass through `copies` and `publish`.
    seen["copies after forward"] = [tuple(tensor.shape) for tensor in wide.copies()]
    for tensor in (wide.weight(), *wide.copies()):
        tensor.fill_(1.5)
    if wide.publish is not None:
        wide.publish()
    seen["published"] = loss_error({**masters, "wide.weight": torch.full_like(masters["wide.weight"], 1.5)})
    remove()
    backward()
    step()
    return {**seen, "calls": calls, "calls after removal": len(seen["calls"]) - len(calls)}


def check_tiles(ranks: list[dict[str, Any]]) -> None:
    """The spans of all ranks tile each parameter, and everything else is the same on every rank."""
    for key, (shape, _, cuts, unit) in ranks[0]["layout"].items():
        spans = sorted({rank["layout"][key][1] for rank in ranks} - {(0, 0)})
        assert [start for start, _ in spans] == [0, *cuts]
        assert [stop for _, stop in spans] == [*cuts, shape[0] * shape[1] * shape[2]]
        assert {rank["layout"][key][2:] for rank in ranks} == {(cuts, unit)}
    assert all(all(rank["shapes"].values()) and rank["owned"] for rank in ranks)


class Adapted(LoraLinear):
    """As peft's layer: the frozen weight's output plus that of the factors."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))


def make_model(kind: str) -> Odd:
    """kind: "full", or "lora" for two layers with adapters."""
    model = Odd()
    if kind == "lora":
        for seed, name in enumerate(("wide", "narrow"), start=40):
            plain = getattr(model, name)
            layer = Adapted(plain.out_features, plain.in_features, LORA_RANK)
            layer.base_layer = plain.requires_grad_(False)
            with torch.no_grad():
                factor = layer.lora_A["default"].weight
                factor.copy_(draw(*factor.shape, seed=seed).to(torch.bfloat16))
            setattr(model, name, layer)
    return model


def odd_basis(side: str) -> SpuriousBasis:
    tensors = {}
    for index, (name, out, into, k_write, k_read) in enumerate(
        (("wide", 11, 13, 2, 3), ("narrow", 3, 11, 1, 2), ("single", 1, 3, 0, 1))
    ):
        if side in ("write", "both") and k_write:
            tensors[f"{name}.weight.write"] = orthonormal(out, k_write, 70 + index)
        if side in ("read", "both"):
            tensors[f"{name}.weight.read"] = orthonormal(into, k_read, 80 + index)
    return SpuriousBasis.from_tensors(tensors)


def sides_of(name: str, basis: SpuriousBasis) -> tuple[Tensor | None, Tensor | None]:
    """Write and read directions that hold a parameter, fp64."""
    weight = f"{name.split('.')[0]}.weight"
    sides = basis.sides(weight) if weight in basis.weights else ()
    U, V = (basis.tensor(weight, side).double() if side in sides else None for side in ("write", "read"))
    return (None if "lora_A" in name else U), (None if "lora_B" in name or name.endswith("bias") else V)


def train_reference(model: Odd, basis: SpuriousBasis, steps: int, *, pinned: bool, decay: float) -> dict[str, Tensor]:
    """SGD in fp64 on all ranks' inputs, with the dense mathematics; the trained parameters."""
    model = copy.deepcopy(model).double()
    named = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    sides = {key: sides_of(key, basis) for key in named}

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.ndim == 2 else tensor.detach().unsqueeze(1)

    for key, parameter in named.items():
        if "lora_A" in key:
            parameter.data = project_gradient(parameter.data, *sides[key])
    pins = {key: sketches(matrix(parameter).clone(), *sides[key]) for key, parameter in named.items()}
    for step in range(steps):
        model.zero_grad()
        losses = [model(inputs_of(rank, step)) for rank in range(dist.get_world_size())]
        torch.stack(losses).mean().backward()
        for key, parameter in named.items():
            assert parameter.grad is not None
            gradient = project_gradient(matrix(parameter.grad), *sides[key])
            moved = matrix(parameter) - LEARNING_RATE * (gradient + decay * matrix(parameter))
            moved = pin(moved, pins[key], *sides[key]) if pinned else moved
            parameter.data = moved.view(parameter.shape)
    return {key: parameter.detach().flatten() for key, parameter in named.items()}
