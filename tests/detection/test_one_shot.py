"""detect_basis against the dense SVD of what PEFT merges."""

from pathlib import Path

import pytest
import torch
from adapters import edit_config, edit_tensors, make_adapter, merged_change
from largest_tensor import LargestTensor
from safetensors.torch import load_file
from tiny_models import tiny_model

from grasp_dist.basis import SpuriousBasis, model_fingerprint
from grasp_dist.detection import detect_basis, read_adapter
from grasp_dist.errors import InputError

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["o_proj", "down_proj", "v_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
def test_against_the_dense_svd_of_the_merged_weights(tmp_path: Path, architecture: str, targets: list[str]) -> None:
    changes = merged_change(make_adapter(tmp_path, architecture, target_modules=targets))
    basis = detect_basis(tmp_path, rank=3, side="both")
    assert set(basis.weights) == set(changes)
    for name, change in changes.items():
        dense = change.T if architecture == "gpt2" else change
        assert basis.shape(name) == tuple(dense.shape)
        u, s, vh = torch.linalg.svd(dense)
        assert torch.allclose(basis.singular_values(name).double(), s[:4], rtol=1e-5)
        for side, expected in (("write", u), ("read", vh.T)):
            found = basis.tensor(name, side).double()
            assert found.shape == (expected.shape[0], 3)
            assert torch.allclose((found * expected[:, :3]).sum(0).abs(), torch.ones(3).double(), atol=1e-5)


def test_no_matrix_of_a_weights_size_is_made(tmp_path: Path) -> None:
    """From reading the adapter to the saved file: nothing larger than a factor in fp64, (40, 4), against (24, 40)."""
    make_adapter(tmp_path)
    with LargestTensor() as seen:
        detect_basis(tmp_path, rank=4, side="both").save(tmp_path / "basis.safetensors")
    assert 0 < seen.nbytes <= 8 * 40 * 4


def test_sides_weights_and_provenance(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="org/base", revision="abc")
    basis = detect_basis(tmp_path, rank=2)
    assert {basis.sides(weight) for weight in basis.weights} == {("write",)}
    assert detect_basis(tmp_path, rank=2, side="read").sides(O_PROJ) == ("read",)
    assert basis.provenance == {
        "base_model": {"id": "org/base", "revision": "abc", "hash": None},
        "method": "one_shot",
        "settings": {"rank": 2, "side": "write", "weights": None},
        "seeds": [],
        "adapter_hash": read_adapter(tmp_path).hash,
    }
    assert detect_basis(tmp_path, rank=2, weights=[O_PROJ]).weights == (O_PROJ,)
    both = detect_basis(tmp_path, rank=2, weights=["o_proj"])
    assert both.weights == (O_PROJ, O_PROJ.replace("0", "1"))
    assert torch.equal(both.tensor(O_PROJ, "write"), basis.tensor(O_PROJ, "write"))
    # Directions stand in order: a smaller rank is a prefix of a larger one.
    assert basis.fingerprint() == detect_basis(tmp_path, rank=4).truncate(2).fingerprint()


def test_round_trip_through_the_file(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    basis = detect_basis(tmp_path, rank=4, side="both")
    basis.save(tmp_path / "basis.safetensors")
    assert SpuriousBasis.load(tmp_path / "basis.safetensors").fingerprint() == basis.fingerprint()


def test_weights_that_learnt_less_contribute_less(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    stem = "base_model.model.model.layers.{}.self_attn.o_proj.lora_B.weight"
    b = load_file(tmp_path / "adapter_model.safetensors")[stem.format(0)]
    b[:, 1] = 2 * b[:, 0]
    edit_tensors(tmp_path, **{stem.format(0): b, stem.format(1): torch.zeros_like(b)})
    basis = detect_basis(tmp_path, rank=4)
    assert basis.basis_rank(O_PROJ, "write") == 3
    assert O_PROJ.replace("0", "1") not in basis
    assert len(basis) == 3
    with pytest.raises(InputError, match="changed none of the chosen weights"):
        detect_basis(tmp_path, rank=4, weights=["layers.1.self_attn.o_proj"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 5}, r"rank 5 .* rank 4.*training\.lora\.rank"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 1, "side": "left"}, "side 'left'"),
        ({"rank": 1, "weights": ["o_porj"]}, "no update for 'o_porj'; the nearest .* 'o_proj'"),
        ({"rank": 1, "weights": []}, "empty"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    make_adapter(tmp_path)
    with pytest.raises(InputError, match=message):
        detect_basis(tmp_path, **arguments)


def test_a_local_base_model_is_hashed_and_held_against_the_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path / "wider")
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    basis = detect_basis(tmp_path / "adapter", rank=1, base_model=tmp_path / "base")
    assert basis.provenance["base_model"]["hash"] == model_fingerprint(tmp_path / "base")
    basis.check_model(id="elsewhere", hash=model_fingerprint(tmp_path / "base"))
    with pytest.raises(InputError, match="detected on the base model"):
        basis.check_model(id="wider", hash=model_fingerprint(tmp_path / "wider"))
    with pytest.raises(InputError, match=r"down_proj.*\(24, 40\).*\(24, 48\).*another base model"):
        detect_basis(tmp_path / "adapter", rank=1, base_model=tmp_path / "wider")
    with pytest.raises(InputError, match="none of the weights"):
        detect_basis(tmp_path / "adapter", rank=1, base_model=tmp_path / "neox")
    # A path that the adapter remembers and that is gone stays a name.
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    assert detect_basis(tmp_path / "adapter", rank=1).provenance["base_model"]["hash"] is None
