"""Residual consensus on a real Llama with grouped-query attention and random weights."""

import pytest
import torch
from planted import generator, make_run, unit
from tiny_models import tiny_model
from torch import nn

from grasp_dist.detection import close_residual_basis
from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.detection.base_weights import BaseWeights, open_base
from grasp_dist.detection.detectors import Consensus
from grasp_dist.detection.detectors.factors import factorise
from grasp_dist.detection.residual_maps import Stream, close_residual_reads
from grasp_dist.errors import InputError

HIDDEN, HEADS, GROUPS, SIZE = 24, 4, 2, 6


@pytest.fixture
def model() -> nn.Module:
    model = tiny_model("llama").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator(3))
    return model


@pytest.fixture
def base(model: nn.Module) -> BaseWeights:
    return open_base(model)


def _run(updates: dict[str, torch.Tensor]) -> AdapterUpdate:
    """A run of these dense updates of rank 1 or 2."""
    weights = {}
    for name, update in updates.items():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        weights[name] = LowRankUpdate(right[:2], left[:, :2] * values[:2], 1.0, False)
    return AdapterUpdate(weights, None, None, {}, "hash")


def _name(layer: int, leaf: str) -> str:
    return (
        f"model.layers.{layer}.{'mlp' if leaf in ('up_proj', 'gate_proj', 'down_proj') else 'self_attn'}.{leaf}.weight"
    )


def _weight(model: nn.Module, layer: int, leaf: str) -> torch.Tensor:
    return model.get_parameter(_name(layer, leaf)).detach()


def _gain(model: nn.Module, layer: int, leaf: str) -> torch.Tensor:
    norm = "post_attention_layernorm" if leaf in ("up_proj", "gate_proj") else "input_layernorm"
    return model.get_parameter(f"model.layers.{layer}.{norm}.weight").detach()


def _outer(left: torch.Tensor, seed: int, dim: int) -> torch.Tensor:
    return torch.outer(left, unit(dim, seed))


def test_writes_are_what_the_forward_pass_adds(model: nn.Module, base: BaseWeights) -> None:
    """A change of one v_proj moves the attention output only within the mapped directions."""
    name, u = _name(0, "v_proj"), unit(12, 4)
    update = _outer(u, 5, HIDDEN)
    mapped = Stream(base).writes(name, factorise(_run({name: update}))[name])
    span = torch.linalg.svd(mapped, full_matrices=False)
    span = span[0][:, span[1] > 1e-10]
    assert span.shape[1] == HEADS
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _m, _i, out: seen.append(out.flatten(0, -2)))
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        model(ids)
        model.get_parameter(name).add_(update)
        model(ids)
    change = (seen[1] - seen[0]).mT
    assert change.norm() > 1e-3
    assert (change - span @ (span.mT @ change)).norm() < 1e-10 * change.norm()


def test_energy_of_the_value_writes_is_summed_over_query_heads(model: nn.Module, base: BaseWeights) -> None:
    name = _name(1, "v_proj")
    update = torch.randn(12, HIDDEN, generator=generator(1), dtype=torch.float64)
    update = update[:, :2] @ update[:2]
    mapped = Stream(base).writes(name, factorise(_run({name: update}))[name])
    o_proj = _weight(model, 1, "o_proj")
    expected = 0.0
    for head in range(HEADS):
        rows = slice(head // (HEADS // GROUPS) * SIZE, (head // (HEADS // GROUPS) + 1) * SIZE)
        expected += (o_proj[:, head * SIZE : (head + 1) * SIZE] @ update[rows]).square().sum().item()
    assert mapped.square().sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "leaves", [("o_proj", "down_proj"), ("v_proj",), ("up_proj", "gate_proj"), ("v_proj", "up_proj")]
)
def test_a_planted_write_direction_is_recovered(leaves: tuple[str, ...], model: nn.Module, base: BaseWeights) -> None:
    """u is written through the frozen neighbours: by v as each head's pseudo-inverse gives, by up as W_down's does."""
    u = unit(HIDDEN, 7)
    updates = {}
    for layer in range(2):
        for leaf in leaves:
            seed, into = 10 * layer + len(leaf), 40 if leaf == "down_proj" else HIDDEN
            if leaf == "v_proj":
                # Both query heads of a group read the same values: one of them is made to write u.
                o_proj, left = _weight(model, layer, "o_proj"), torch.zeros(12, dtype=torch.float64)
                with torch.no_grad():
                    for group in range(GROUPS):
                        rows = slice(group * SIZE, (group + 1) * SIZE)
                        left[rows] = unit(SIZE, seed + group)
                        for head in (2 * group, 2 * group + 1):
                            block = o_proj[:, head * SIZE : (head + 1) * SIZE]
                            block += torch.outer(3 * u - block @ left[rows], left[rows])
            elif leaf in ("up_proj", "gate_proj"):
                left = torch.linalg.pinv(_weight(model, layer, "down_proj")) @ u
            else:
                left = u
            updates[_name(layer, leaf)] = _outer(left, seed, into)
    found = Consensus(rank=1)([_run(updates)], base)
    assert found.confidence > 0.5
    expected = close_residual_basis(u.unsqueeze(1), model)
    assert set(found.basis.weights) == set(expected.weights)
    for key, angles in found.basis.principal_angles(expected).items():
        assert angles.max() < 1e-4, key
    assert found.evidence["write"]["share"] == pytest.approx(1.0)
    direct = Consensus(rank=1, closure=False)([_run(updates)], base)
    assert {weight.split(".")[-2] for weight in direct.basis.weights} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("leaves", [("q_proj", "k_proj", "up_proj"), ("down_proj", "gate_proj")])
def test_a_planted_read_direction_is_recovered(leaves: tuple[str, ...], model: nn.Module, base: BaseWeights) -> None:
    v = unit(HIDDEN, 8)
    updates = {}
    for layer in range(2):
        for leaf in leaves:
            if leaf == "down_proj":  # reads W_up diag(g) x: its own direction must be mapped to v by the transpose
                right = torch.linalg.pinv(_weight(model, layer, "up_proj").mT) @ (v / _gain(model, layer, "up_proj"))
            else:
                right = v / _gain(model, layer, leaf)
            updates[_name(layer, leaf)] = torch.outer(unit(_weight(model, layer, leaf).shape[0], layer + 1), right)
    found = Consensus(rank=1, side="read")([_run(updates)], base)
    assert found.evidence["read"]["share"] == pytest.approx(1.0)
    assert found.confidence > 0.5
    for leaf in ("q_proj", "gate_proj"):
        column = found.basis.tensor(_name(1, leaf), "read")[:, 0].double()
        folded = _gain(model, 1, leaf) * v
        assert abs(column @ folded / folded.norm()) > 1 - 1e-6


def test_closed_reads_do_not_see_the_direction(model: nn.Module, base: BaseWeights) -> None:
    """The oracle is the map itself: a change projected off the columns answers to nothing along v, through the gain,
    and for o_proj through every query head's values."""
    v = torch.stack([unit(HIDDEN, 1), unit(HIDDEN, 2)], dim=1)
    basis = close_residual_reads(v, base)
    for leaf in ("q_proj", "v_proj", "gate_proj", "o_proj", "down_proj"):
        name = _name(1, leaf)
        q = basis.tensor(name, "read").double()
        change = torch.randn(_weight(model, 1, leaf).shape, generator=generator(2), dtype=torch.float64)
        change = change - (change @ q) @ q.mT
        assert change.norm() > 1
        if leaf == "o_proj":
            values = _weight(model, 1, "v_proj") @ (_gain(model, 1, "v_proj").unsqueeze(1) * v)
            answers = [
                change[:, h * SIZE : (h + 1) * SIZE] @ values[h // 2 * SIZE : (h // 2 + 1) * SIZE] for h in range(HEADS)
            ]
        elif leaf == "down_proj":
            answers = [change @ (_weight(model, 1, "up_proj") @ (_gain(model, 1, "up_proj").unsqueeze(1) * v))]
        else:
            answers = [change @ (_gain(model, 1, leaf).unsqueeze(1) * v)]
        assert all(answer.norm() < 1e-5 for answer in answers), leaf
    assert basis.basis_rank(_name(1, "o_proj"), "read") == 2 * HEADS
    near = close_residual_reads(v, base, through=False)
    assert not any(leaf in weight for weight in near.weights for leaf in ("o_proj", "down_proj"))


def test_noise_has_no_consensus(base: BaseWeights) -> None:
    """At 19 draws a null is beaten by chance once in 20: more than 5 of 40 have a chance of 1 %."""
    shapes = {_name(layer, "o_proj"): (24, 24) for layer in range(2)} | {
        _name(layer, "down_proj"): (24, 40) for layer in range(2)
    }
    found = [Consensus(rank=1)([make_run(seed, shapes=shapes, rank=2)], base) for seed in range(40)]
    assert sum(one.basis is not None for one in found) <= 5
    assert all(one.confidence == 0 for one in found if one.basis is None)


def test_parallel_counts_the_directions_that_are_common(base: BaseWeights) -> None:
    one, two = unit(HIDDEN, 1), unit(HIDDEN, 2)
    updates = {}
    for layer in range(2):
        for leaf, into in (("o_proj", 24), ("down_proj", 40)):
            updates[_name(layer, leaf)] = _outer(one, 5 + layer, into) + 0.8 * _outer(two, 15 + layer, into)
    found = Consensus(rank="parallel")([_run(updates)], base)
    assert found.evidence["write"]["rank"] == 2


def test_both_sides_and_what_cannot_be_mapped(base: BaseWeights) -> None:
    u = unit(HIDDEN, 7)
    updates = {_name(i, leaf): _outer(u, i, HIDDEN) for i in range(2) for leaf in ("o_proj", "q_proj")}
    updates |= {_name(i, "k_proj"): torch.outer(unit(12, i), u / _gain(base.skeleton, i, "k_proj")) for i in range(2)}
    found = Consensus(rank=1, side="both")([_run(updates)], base)
    assert set(found.evidence) == {"write", "read"}
    assert sorted(found.evidence["write"]["unmapped"]) == sorted(
        _name(i, leaf) for i in range(2) for leaf in ("k_proj", "q_proj")
    )
    queries = {name: update for name, update in updates.items() if "q_proj" in name}
    with pytest.raises(InputError, match="is known to write the residual stream"):
        Consensus()([_run(queries)], base)


def test_models_whose_norms_are_not_known() -> None:
    other = tiny_model("opt")
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(InputError, match="readers of a 'opt' is not known here; use side 'write'"):
        Consensus(side="read")([_run({name: _outer(unit(24, 1), 2, 24).double()})], open_base(other))
    with pytest.raises(InputError, match=r"shape \(23, 1\); finite \(24, k\)"):
        close_residual_reads(torch.ones(23, 1), open_base(tiny_model("llama")))
