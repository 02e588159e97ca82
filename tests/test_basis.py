"""The basis in memory and on disk: round trips, lazy slices, refusals, combinations."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grasp_dist.basis import SpuriousBasis, model_fingerprint, model_reference
from grasp_dist.errors import InputError
from grasp_dist.subspaces import orthonormal_error

A, B, E = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight", "experts.down_proj"


def columns(dim: int, k: int, seed: int = 0, *experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*experts, dim, k, generator=generator, dtype=torch.float64))[0]


@pytest.fixture
def basis() -> SpuriousBasis:
    return SpuriousBasis.from_tensors(
        {
            f"{A}.write": columns(10, 3, 1),
            f"{A}.read": columns(7, 2, 2),
            f"{B}.write": columns(10, 5, 3),
            f"{E}.write": columns(6, 2, 4, 3),
        },
        singular_values={A: torch.tensor([3.0, 2.0, 1.0, 0.5]), f"{B}.write": torch.arange(5.0, 0, -1)},
        shapes={A: (10, 7), E: (6, 9)},
        provenance={"base_model": {"id": "tiny", "revision": "r1", "hash": "aa"}, "method": "one_shot", "seeds": [3]},
    )


@pytest.fixture
def file(basis: SpuriousBasis, tmp_path: Path) -> Path:
    basis.save(tmp_path / "basis.safetensors")
    return tmp_path / "basis.safetensors"


def test_round_trip(basis: SpuriousBasis, file: Path) -> None:
    loaded = SpuriousBasis.load(file)
    assert loaded.weights == basis.weights == tuple(sorted((A, B, E)))
    for weight in basis.weights:
        assert loaded.sides(weight) == basis.sides(weight)
        assert loaded.shape(weight) == basis.shape(weight)
        for side in basis.sides(weight):
            assert loaded.basis_rank(weight, side) == basis.basis_rank(weight, side)
            assert loaded.tensor(weight, side).dtype == torch.float32
            assert torch.equal(loaded.tensor(weight, side), basis.tensor(weight, side))
    assert loaded.shape(B) is None
    assert loaded.singular_values(A).tolist() == [3.0, 2.0, 1.0, 0.5]
    assert loaded.singular_values(A, "read").tolist() == [3.0, 2.0, 1.0, 0.5]
    assert loaded.singular_values(E) is None
    assert loaded.provenance == basis.provenance
    assert loaded.fingerprint() == basis.fingerprint()
    assert loaded.truncate(2).fingerprint() == basis.truncate(2).fingerprint() != basis.fingerprint()


def test_the_file_is_plain_safetensors_with_the_documented_names(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["grasp_basis"])
        names = set(opened.keys())
    assert header["version"] == 1
    assert header["shapes"] == {A: [10, 7], E: [6, 9]}
    spectra = {f"{A}.write.singular_values", f"{A}.read.singular_values", f"{B}.write.singular_values"}
    assert names == {f"{A}.write", f"{A}.read", f"{B}.write", f"{E}.write"} | spectra


def test_saving_twice_gives_the_same_bytes(basis: SpuriousBasis, file: Path, tmp_path: Path) -> None:
    SpuriousBasis.load(file).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    SpuriousBasis.load(file).save(file)  # over the file that it reads from
    assert SpuriousBasis.load(file).fingerprint() == basis.fingerprint()


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 7), (0, 0), (10, 10), (9, 10)])
def test_rows_are_slices_of_the_tensor(basis: SpuriousBasis, file: Path, start: int, stop: int) -> None:
    for origin in (basis, SpuriousBasis.load(file), basis.random_like(1)):
        for derived in (origin, origin.truncate(2)):
            piece = derived.rows(A, "write", start, stop)
            assert piece.shape == (stop - start, derived.basis_rank(A, "write"))
            assert torch.equal(piece, derived.tensor(A, "write")[start:stop])
    assert SpuriousBasis.load(file).rows(E, "write", 2, 5).shape == (3, 3, 2)
    with pytest.raises(IndexError):
        basis.rows(A, "write", 5, 11)


def test_loading_reads_no_directions_and_rows_read_no_others(tmp_path: Path) -> None:
    """NaN in rows 8 and 9: a rank that holds other rows never sees them; one that holds them refuses by name."""
    good = SpuriousBasis.from_tensors({f"{A}.write": columns(10, 3)})
    good.save(tmp_path / "b.safetensors")
    tensors = load_file(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    tensors[f"{A}.write"][8:] = float("nan")
    save_file(tensors, tmp_path / "b.safetensors", metadata)

    basis = SpuriousBasis.load(tmp_path / "b.safetensors")
    assert torch.equal(basis.rows(A, "write", 0, 8), good.rows(A, "write", 0, 8))
    with pytest.raises(InputError, match=r"o_proj\.weight\.write holds NaN"):
        basis.rows(A, "write", 6, 10)
    with pytest.raises(InputError, match=r"o_proj\.weight\.write.* holds NaN"):
        basis.tensor(A, "write")
    with pytest.raises(InputError, match="NaN"):
        basis.check()


def test_a_file_whose_columns_are_not_orthonormal_is_refused_on_reading(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors[f"{B}.write"][0, 0] += 0.01
    save_file(tensors, file, metadata)
    basis = SpuriousBasis.load(file)
    basis.tensor(A, "write")
    with pytest.raises(InputError, match=r"down_proj\.weight\.write.*not orthonormal.*qr"):
        basis.tensor(B, "write")
    with pytest.raises(InputError, match="not orthonormal"):
        basis.truncate(1).tensor(B, "write")


def _edit(file: Path, header: dict | None = None, drop_metadata: bool = False, **tensors: torch.Tensor | None) -> None:
    stored = load_file(file)
    with safe_open(file, framework="pt") as opened:
        found = json.loads(opened.metadata()["grasp_basis"])
    stored = {key: value for key, value in (stored | tensors).items() if value is not None}
    metadata = None if drop_metadata else {"grasp_basis": json.dumps(found | (header or {}))}
    save_file(stored, file, metadata)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"header": {"version": 2}}, "format version 2"),
        ({"header": {"version": None}}, "format version None"),
        ({"header": {"shapes": [1]}}, "header is damaged"),
        ({"header": {"shapes": {A: [10, "x"]}}}, "header is damaged"),
        ({"header": {"provenance": 3}}, "header is damaged"),
        ({"header": {"shapes": {A: [11, 7]}}}, r"'.*o_proj\.weight\.write' has dimension 10.*\(11, 7\)"),
        ({"header": {"shapes": {"other.weight": [1, 1]}}}, "other.weight"),
        ({"drop_metadata": True}, "no basis"),
        ({"x.weight": torch.eye(3)}, "does not end in '.write' or '.read'"),
        ({"x.weight.write": torch.eye(3).repeat(1, 2)}, "6 columns of dimension 3; 1 to 3"),
        ({"x.weight.write": torch.empty(3, 0)}, "0 columns of dimension 3"),
        ({"x.weight.write": torch.ones(3)}, "has shape"),
        ({"x.weight.write": torch.eye(3).half()}, "stored as F16, not F32"),
        ({f"{A}.write.singular_values": torch.ones(2)}, "at least one value per direction"),
        ({f"{A}.write.singular_values": torch.tensor([1.0, float("nan"), 0.0])}, "finite"),
        ({"x.weight.write.singular_values": torch.ones(2)}, "singular values of 'x.weight.write'"),
    ],
)
def test_malformed_files_are_refused_by_name(file: Path, edit: dict, message: str) -> None:
    _edit(file, **edit)
    with pytest.raises(InputError, match=message) as caught:
        SpuriousBasis.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text", "folder"])
def test_files_that_are_no_safetensors(file: Path, damage: str) -> None:
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "text":
        file.write_text("not a basis at all, but a text of some length")
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
    with pytest.raises(InputError, match=r"basis\.safetensors.*give the path of a basis"):
        SpuriousBasis.load(file)


def test_a_file_that_changes_under_its_reader_is_refused(file: Path) -> None:
    basis = SpuriousBasis.load(file)
    SpuriousBasis.from_tensors({f"{A}.write": columns(10, 2)}).save(file)
    with pytest.raises(InputError, match="changed while it was in use"):
        basis.tensor(A, "write")
    file.unlink()
    with pytest.raises(InputError, match="cannot read"):
        basis.rows(A, "write", 0, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no directions"),
        ({f"{A}.write": columns(5, 2) * 1.001}, "not orthonormal"),
        ({f"{A}.write": columns(5, 2) + float("inf")}, "NaN or infinity"),
        ({f"{A}": columns(5, 2)}, "does not end in"),
        ({f"{A}.left": columns(5, 2)}, "does not end in"),
        ({f"{A}.write": torch.ones(4)}, r"shape \(4,\)"),
        ({f"{A}.write": torch.eye(3, dtype=torch.int64)}, "int64"),
        ({f"{A}.write": torch.empty(4, 0)}, "0 columns"),
        ({f"{E}.write": torch.stack([columns(5, 2), columns(5, 2) * 2])}, "not orthonormal"),
    ],
)
def test_from_tensors_refuses(tensors: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpuriousBasis.from_tensors(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_tensors_accepts_every_float_dtype_and_keeps_the_span(dtype: torch.dtype) -> None:
    given = columns(200, 8)
    stored = SpuriousBasis.from_tensors({f"{A}.write": given.to(dtype)}).tensor(A, "write")
    assert stored.dtype == torch.float32
    assert orthonormal_error(stored) < 1e-6
    overlap = torch.linalg.svdvals(stored.double().T @ given)
    assert overlap.min() > (0.9999 if dtype.itemsize == 2 else 1 - 1e-6)


def test_from_tensors_keeps_its_own_copy() -> None:
    given = columns(6, 2).float()
    basis = SpuriousBasis.from_tensors({f"{A}.write": given})
    given.zero_()
    assert orthonormal_error(basis.tensor(A, "write")) < 1e-6


def test_unknown_weight_or_side(basis: SpuriousBasis) -> None:
    with pytest.raises(InputError, match="no weight 'nope'"):
        basis.tensor("nope", "write")
    with pytest.raises(InputError, match=r"no read side for .*down_proj"):
        basis.rows(B, "read", 0, 1)
    assert basis.sides("nope") == ()
    assert A in basis
    assert "nope" not in basis


def test_saving_to_a_readonly_or_full_place_leaves_nothing_torn(basis: SpuriousBasis, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file where a folder is wanted")
    with pytest.raises(InputError, match=r"cannot write the basis to .*plain.*choose a folder"):
        basis.save(tmp_path / "plain" / "basis.safetensors")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell to limit the size of files")
def test_a_full_disk_keeps_the_older_file_whole(file: Path) -> None:
    """A file-size limit stops the write half way, as a full disk does; the folder then holds the old file alone."""
    before = file.read_bytes()
    script = (
        "import resource, signal, sys, torch\n"
        "from grasp_dist.basis import SpuriousBasis\n"
        "from grasp_dist.errors import InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "big = SpuriousBasis.from_tensors({'w.weight.write': torch.eye(4096, 8)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    big.save(sys.argv[1])\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "cannot write the basis" in done.stdout
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_truncate(basis: SpuriousBasis) -> None:
    short = basis.truncate(3)
    assert [short.basis_rank(A, "write"), short.basis_rank(A, "read"), short.basis_rank(B, "write")] == [3, 2, 3]
    assert torch.equal(short.tensor(B, "write"), basis.tensor(B, "write")[:, :3])
    assert short.singular_values(A).tolist() == [3.0, 2.0, 1.0, 0.5]
    for rank in (0, 6):
        with pytest.raises(InputError, match=rf"rank {rank} .*1 to 5"):
            basis.truncate(rank)
    with pytest.raises(InputError, match="1 to 3"):
        short.truncate(4)


def test_select_and_only(basis: SpuriousBasis) -> None:
    assert basis.select("both") is basis
    assert basis.select("read").weights == (A,)
    assert basis.select("write").sides(A) == ("write",)
    assert basis.select("write").singular_values(A, "read") is None
    with pytest.raises(InputError, match=r"no read side.*use side 'write'"):
        basis.select("write").select("read")
    with pytest.raises(InputError, match="'sideways'"):
        basis.select("sideways")
    assert basis.only([B]).weights == (B,)
    with pytest.raises(InputError, match="nope"):
        basis.only(["nope"])


def test_random_like(basis: SpuriousBasis) -> None:
    control = basis.random_like(7)
    assert control.weights == basis.weights
    for weight in basis.weights:
        assert control.sides(weight) == basis.sides(weight)
        for side in basis.sides(weight):
            assert control.tensor_shape(weight, side) == basis.tensor_shape(weight, side)
            assert orthonormal_error(control.tensor(weight, side)) < 1e-6
    other_order = basis.random_like(7)
    assert torch.equal(other_order.tensor(B, "write"), control.tensor(B, "write"))
    assert control.fingerprint() == other_order.fingerprint() != basis.random_like(8).fingerprint()
    assert not torch.allclose(control.tensor(A, "write"), control.tensor(B, "write")[:, :3])
    before, after = basis.truncate(2).random_like(7).tensor(B, "write"), control.truncate(2).tensor(B, "write")
    assert torch.allclose(before, after, atol=1e-6)
    assert control.provenance["base_model"] == basis.provenance["base_model"]
    assert control.provenance["seeds"] == [7]


def test_random_like_saves(basis: SpuriousBasis, tmp_path: Path) -> None:
    basis.random_like(7).save(tmp_path / "random.safetensors")
    assert SpuriousBasis.load(tmp_path / "random.safetensors").fingerprint() == basis.random_like(7).fingerprint()


def test_union_keeps_own_columns_first_and_adds_what_is_new() -> None:
    first, second = columns(12, 3, 1), columns(12, 3, 2)
    second = torch.linalg.qr(torch.cat([first[:, 1:2], second], dim=1))[0]  # its first column is one of the first's
    one = SpuriousBasis.from_tensors(
        {f"{A}.write": first, f"{A}.read": columns(5, 1)}, singular_values={A: torch.ones(3)}
    )
    two = SpuriousBasis.from_tensors(
        {f"{A}.write": second, f"{B}.write": columns(4, 2)}, singular_values={A: torch.tensor([9.0, 8, 7, 6])}
    )
    both = one.union(two)
    joined = both.tensor(A, "write")
    assert torch.equal(joined[:, :3], one.tensor(A, "write"))
    assert joined.shape == (12, 6)
    assert orthonormal_error(joined) < 1e-6
    spanned = torch.cat([first, second], dim=1).float()
    assert torch.allclose(joined @ (joined.T @ spanned), spanned, atol=1e-5)
    assert both.singular_values(A).tolist() == [1, 1, 1, 8, 7, 6]
    assert torch.equal(both.tensor(B, "write"), two.tensor(B, "write"))
    assert both.sides(A) == ("write", "read")
    assert one.union(one).fingerprint() == one.fingerprint()


def test_union_of_many_rounds_stays_orthonormal() -> None:
    """Warm deflation joins a direction a round; rounding must not add up."""
    basis = SpuriousBasis.from_tensors({f"{A}.write": columns(24, 1, 0)})
    for seed in range(1, 20):
        basis = basis.union(SpuriousBasis.from_tensors({f"{A}.write": columns(24, 1, seed)}))
    assert basis.basis_rank(A, "write") == 20
    assert orthonormal_error(basis.tensor(A, "write")) < 1e-6


def test_union_refuses_other_models(basis: SpuriousBasis) -> None:
    with pytest.raises(InputError, match=r"o_proj\.weight\.write.*\(10, 3\) and \(9, 2\)"):
        basis.union(SpuriousBasis.from_tensors({f"{A}.write": columns(9, 2)}))
    with pytest.raises(InputError, match="stacked experts"):
        basis.union(basis)
    stranger = SpuriousBasis.from_tensors({f"{A}.write": columns(10, 2)}, provenance={"base_model": {"hash": "bb"}})
    with pytest.raises(InputError, match="hash 'aa'"):
        basis.union(stranger)


def test_principal_angles(basis: SpuriousBasis, file: Path) -> None:
    zero = basis.principal_angles(SpuriousBasis.load(file))
    assert set(zero) == {f"{A}.write", f"{A}.read", f"{B}.write", f"{E}.write"}
    assert max(angles.max() for angles in zero.values()) < 1e-6
    assert zero[f"{E}.write"].shape == (3, 2)
    full = torch.linalg.qr(torch.cat([basis.tensor(A, "write"), torch.randn(10, 7)], dim=1))[0]
    beside = SpuriousBasis.from_tensors({f"{A}.write": full[:, 3:5]})
    assert torch.allclose(basis.principal_angles(beside)[f"{A}.write"], torch.full((2,), torch.pi / 2).double())
    with pytest.raises(InputError, match="no weight and side in common"):
        basis.principal_angles(SpuriousBasis.from_tensors({"z.weight.read": columns(3, 1)}))
    with pytest.raises(InputError, match="different models"):
        basis.principal_angles(SpuriousBasis.from_tensors({f"{A}.write": columns(9, 1)}))


def test_check_model(basis: SpuriousBasis) -> None:
    basis.check_model(id="elsewhere/tiny", hash="aa")  # the hash decides, not where the model lies
    basis.check_model(id="tiny", revision="r1")
    basis.check_model(id="tiny")
    SpuriousBasis.from_tensors({f"{A}.write": columns(3, 1)}).check_model(id="anything", hash="zz")
    for wrong in ({"id": "tiny", "hash": "bb"}, {"id": "other"}, {"id": "tiny", "revision": "r2"}):
        with pytest.raises(InputError, match=r"detected on the base model 'tiny'.*detect a basis for this one"):
            basis.check_model(**wrong)


def test_repr_says_what_it_is(basis: SpuriousBasis, file: Path) -> None:
    assert repr(basis) == (
        "SpuriousBasis(3 weights, write rank 2-5, read rank 2, method 'one_shot', base 'tiny', from memory)"
    )
    assert str(file) in repr(SpuriousBasis.load(file))


def _model_dir(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4} | config))
    names = sorted(tensors)
    for shard in range(shards):
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / f"model-{shard}.safetensors")
    return folder


def test_model_fingerprint_is_of_config_headers_and_a_sample_of_the_weights(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 3), "b.weight": torch.zeros(2)}
    reference = model_fingerprint(_model_dir(tmp_path / "one", tensors))
    assert model_fingerprint(_model_dir(tmp_path / "sharded", tensors, shards=2)) == reference
    assert model_fingerprint(_model_dir(tmp_path / "saved_again", tensors, transformers_version="9")) == reference
    assert model_fingerprint(_model_dir(tmp_path / "config", tensors, hidden_size=5)) != reference
    other = tensors | {"b.weight": torch.zeros(3)}
    assert model_fingerprint(_model_dir(tmp_path / "shape", other)) != reference
    assert model_fingerprint(_model_dir(tmp_path / "dtype", tensors | {"b.weight": torch.zeros(2).half()})) != reference
    assert model_fingerprint(_model_dir(tmp_path / "values", tensors | {"a.weight": torch.zeros(4, 3)})) != reference
    assert model_reference(tmp_path / "one")["hash"] == reference
    assert model_reference("org/model", "main") == {"id": "org/model", "revision": "main", "hash": None}


@pytest.mark.parametrize("damage", ["config", "weights", "cut"])
def test_model_fingerprint_refuses_what_is_no_model(tmp_path: Path, damage: str) -> None:
    folder = _model_dir(tmp_path / "m", {"a.weight": torch.ones(4, 3)})
    if damage == "config":
        (folder / "config.json").unlink()
    elif damage == "weights":
        (folder / "model-0.safetensors").unlink()
    else:
        (folder / "model-0.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes()[:20])
    with pytest.raises(InputError, match="m"):
        model_fingerprint(folder)
