"""Closure over frozen neighbours, through the real attention and MLP code of transformers.

The oracle is the forward pass: after a change of a neighbour's weight that is projected off the closed basis, what the
writing module adds to the residual stream must have no new component along the direction, for any input.
"""

from pathlib import Path

import pytest
import torch
from tiny_models import WRITERS, tiny_model
from torch import nn

from grasp_dist.architecture import decoder_layers, is_conv1d, linear_modules
from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection import close_residual_basis
from grasp_dist.errors import InputError
from grasp_dist.fingerprints import model_fingerprint
from grasp_dist.subspaces import orthonormal_error

HIDDEN = 24
VALUES = {
    "llama": "self_attn.v_proj",
    "qwen3": "self_attn.v_proj",
    "gemma": "self_attn.v_proj",
    "opt": "self_attn.v_proj",
    "phi3": "self_attn.qkv_proj",
    "gpt2": "attn.c_attn",
    "gpt_neox": "attention.query_key_value",
    "falcon": "self_attention.query_key_value",
    "falcon_multi_query": "self_attention.query_key_value",
    "falcon_by_head": "self_attention.query_key_value",
}
UPS = {
    "llama": ("mlp.up_proj", "mlp.gate_proj"),
    "phi3": ("mlp.gate_up_proj",),
    "gpt2": ("mlp.c_fc",),
    "gpt_neox": ("mlp.dense_h_to_4h",),
    "opt": ("fc1",),
}


def _directions(k: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randn(HIDDEN, k, generator=torch.Generator().manual_seed(seed))


def _model(name: str) -> nn.Module:
    if name.startswith("falcon_"):
        multi = name == "falcon_multi_query"
        settings = {"new_decoder_architecture": False, "multi_query": multi, "num_kv_heads": 1 if multi else 4}
        return tiny_model("falcon", **settings)
    return tiny_model(name)


def _layer(model: nn.Module, index: int) -> str:
    return decoder_layers(model)[index][0]


def _writes(model: nn.Module, module: str, ids: torch.Tensor) -> torch.Tensor:
    """What `module` adds to the residual stream, (tokens, hidden)."""
    seen = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _m, _i, output: seen.append(output.flatten(0, -2))
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def _change(model: nn.Module, name: str, basis: SpuriousBasis | None, rows: list[int]) -> None:
    """Add a random change to these output rows of a weight, projected off its write basis."""
    module = model.get_submodule(name)
    out, into = (module.weight.shape[1], module.weight.shape[0]) if is_conv1d(module) else module.weight.shape
    change = torch.zeros(out, into, dtype=torch.float64)
    change[rows] = torch.randn(len(rows), into, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if basis is not None:
        u = basis.tensor(f"{name}.weight", "write").double()
        change -= u @ (u.T @ change)
    with torch.no_grad():
        module.weight += change.T if is_conv1d(module) else change


@pytest.mark.parametrize("name", VALUES)
def test_a_change_of_the_values_cannot_write_the_direction(name: str) -> None:
    model = _model(name).double()
    architecture = name.partition("_")[0] if name.startswith("falcon") else name
    layer = _layer(model, 0)
    writer, values = f"{layer}.{WRITERS[architecture][0]}", f"{layer}.{VALUES[name]}"
    u = _directions(1).double()
    basis = close_residual_basis(u, model)
    columns = basis.tensor(f"{values}.weight", "write")
    rows = columns.abs().sum(1).nonzero().flatten().tolist()  # the value rows, all of which are touched

    ids = torch.arange(20).reshape(2, 10) % 64
    before = _writes(model, writer, ids)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _change(model, values, None, rows)
    free = _writes(model, writer, ids) - before
    model.load_state_dict(state)
    _change(model, values, basis, rows)
    blocked = _writes(model, writer, ids) - before
    assert blocked.norm() > 1e-2 * free.norm()  # the change still does something
    assert (free @ u).norm() > 1e-2 * free.norm()
    assert (blocked @ u).norm() < 1e-6 * blocked.norm()


@pytest.mark.parametrize("name", VALUES)
def test_only_value_rows_are_blocked(name: str) -> None:
    """Queries and keys of a fused projection stay free: their rows are zero, and there are as many rows as values."""
    model = _model(name)
    values = f"{_layer(model, 0)}.{VALUES[name]}"
    architecture = name.partition("_")[0] if name.startswith("falcon") else name
    inner = linear_modules(model)[f"{_layer(model, 0)}.{WRITERS[architecture][0]}"]
    basis = close_residual_basis(_directions(1), model)
    columns = basis.tensor(f"{values}.weight", "write")
    touched = int(columns.abs().sum(1).count_nonzero())
    num_kv = {"llama": 2, "qwen3": 2, "gemma": 2, "phi3": 2, "falcon": 2, "falcon_multi_query": 1}.get(name, 4)
    size = (inner.weight.shape[0] if is_conv1d(inner) else inner.weight.shape[1]) // 4
    assert touched == num_kv * size
    assert columns.shape[1] == 4  # one per query head
    assert (columns.abs() > 0).sum(0).tolist() == [size] * 4


@pytest.mark.parametrize("name", UPS)
def test_the_linear_map_through_the_mlp_cannot_write_the_direction(name: str) -> None:
    model = tiny_model(name).double()
    layer = _layer(model, 1)
    u = torch.linalg.qr(_directions(2).double())[0]
    basis = close_residual_basis(u, model)
    down = linear_modules(model)[f"{layer}.{WRITERS[name][1]}"].weight.detach()
    down = down.T if name == "gpt2" else down
    for up in UPS[name]:
        columns = basis.tensor(f"{layer}.{up}.weight", "write").double()
        halves = columns.unflatten(0, (-1, down.shape[1]))
        assert columns.shape[1] == 2 * halves.shape[0]
        change = torch.randn(columns.shape[0], 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        change -= columns @ (columns.T @ change)
        for half in change.unflatten(0, (-1, down.shape[1])):
            assert (u.T @ down @ half).norm() < 1e-6 * (down @ half).norm()
        # No more than that is blocked: another direction can still be written.
        other = torch.linalg.qr(torch.cat([u, _directions(1, 8).double()], dim=1))[0][:, 2:]
        assert (other.T @ down @ change[: down.shape[1]]).norm() > 1e-2


def test_writing_modules_get_the_direction_itself_in_order() -> None:
    model = tiny_model("llama")
    u = _directions(3)
    basis = close_residual_basis(u, model, neighbours=False)
    assert set(basis.weights) == {f"model.layers.{i}.{w}.weight" for i in range(2) for w in WRITERS["llama"]}
    for weight in basis.weights:
        columns = basis.tensor(weight, "write")
        assert basis.shape(weight)[0] == HIDDEN
        for j in range(1, 4):
            assert torch.allclose(columns[:, :j] @ (columns[:, :j].T @ u[:, :j]), u[:, :j], atol=1e-5)


def test_directions_per_layer() -> None:
    model = tiny_model("llama")
    basis = close_residual_basis({1: _directions(2)}, model)
    assert all(".layers.1." in weight for weight in basis.weights)
    assert {weight.split(".")[-2] for weight in basis.weights} == {
        "o_proj",
        "v_proj",
        "down_proj",
        "up_proj",
        "gate_proj",
    }


def test_many_directions_fill_a_head_and_stop_there() -> None:
    """8 directions x 2 query heads of size 6 span each key-value head wholly: the change of v is blocked altogether."""
    basis = close_residual_basis(_directions(8), tiny_model("llama"))
    columns = basis.tensor("model.layers.0.self_attn.v_proj.weight", "write")
    assert columns.shape == (12, 12)
    assert orthonormal_error(columns) < 1e-6
    strengths = basis.singular_values("model.layers.0.self_attn.v_proj.weight")
    assert torch.equal(strengths, strengths.sort(descending=True).values)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_from_a_model_directory(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found, expected = close_residual_basis(_directions(2), tmp_path), close_residual_basis(_directions(2), model)
    assert found.fingerprint() == expected.fingerprint()
    assert found.provenance["base_model"]["hash"] == model_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(23, 1), r"\(23, 1\).*o_proj.*24 numbers"),
        (torch.ones(24), "is wanted"),
        (torch.ones(24, 2), r"1 of the 2 directions .*are independent"),
        (torch.full((24, 1), float("nan")), "NaN"),
        ({2: torch.ones(24, 1)}, "layer 2, but the model has layers 0 to 1"),
        ({}, "no directions"),
    ],
)
def test_directions_that_do_not_fit(directions: torch.Tensor | dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        close_residual_basis(directions, tiny_model("llama"))


def test_models_that_cannot_be_closed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"normalises what it adds .*post_feedforward_layernorm"):
        close_residual_basis(_directions(), tiny_model("gemma2"))
    with torch.device("meta"):
        empty = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(InputError, match="give the model directory"):
        close_residual_basis(_directions(), empty)
    model = tiny_model("phi3")
    model.config.model_type = "newcomer"
    with pytest.raises(InputError, match=r"qkv_proj.*'newcomer'.*neighbours=False"):
        close_residual_basis(_directions(), model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        close_residual_basis(_directions(), tmp_path)
