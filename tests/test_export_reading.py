"""A checkpoint's shards are read bit for bit, and what is missing, changed or double is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from grasp_dist.errors import InputError
from grasp_dist.training.checkpoints.reader import Shards
from grasp_dist.training.checkpoints.store import Checkpoints, fingerprint
from tests.distinct_pieces import SHAPES, save_distinct
from tests.distributed import run_distributed
from tests.export_cases import cut, record_of, write_step


def test_what_three_ranks_wrote_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.prepare(7)
    ranks = run_distributed(save_distinct, 3, str(folder))
    whole = {name: torch.empty(shape) for name, shape in SHAPES.items()} | {"pins.p.write": torch.empty(2, 5)}
    record = {**record_of(whole), "step": 7}
    checkpoints.commit(folder, record, {path.name: fingerprint(path) for path in folder.iterdir()})
    shards = Shards(folder)
    assert shards.names() == sorted(whole)
    for name, shape in SHAPES.items():
        expected = torch.cat([rank[name] for rank in ranks]).view(shape)
        found = shards.read(name)
        assert found.shape == shards.shape(name) == shape
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        for start, stop in ((0, 1), (1, 3), (2, 99), (1, 1)):
            rows = shards.rows(name, start, stop)
            assert torch.equal(rows.view(torch.int32), expected[start:stop].view(torch.int32))
    assert torch.equal(shards.read("pins.p.write"), torch.arange(10.0).view(2, 5))
    assert torch.equal(shards.rows("pins.p.write", 1, 2), torch.arange(5.0, 10.0).view(1, 5))
    with pytest.raises(InputError, match=r"no tensor 'model\.c'"):
        shards.read("model.c")


@pytest.fixture
def pieces():
    return {"model.w": torch.randn(5, 7, generator=torch.Generator().manual_seed(1))}


def test_a_missing_shard_is_refused(pieces, tmp_path):
    folder = write_step(tmp_path, record_of(pieces), cut(pieces, 3))
    next(folder.glob("shard-00002-*")).unlink()
    with pytest.raises(InputError, match=r"shard-00002.*missing"):
        Shards(folder)
    with pytest.raises(InputError, match=r"shard-00002.*cannot be read"):
        Shards(folder, check=False)


def test_a_changed_byte_is_refused(pieces, tmp_path):
    folder = write_step(tmp_path, record_of(pieces), cut(pieces, 3))
    path = next(folder.glob("shard-00003-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00003.*sha256"):
        Shards(folder)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_piece_is_refused_and_never_filled_in(rank, pieces, tmp_path):
    """All files are as they were written; one rank's part of a tensor was never in them."""
    ranks = cut(pieces | {"model.v": torch.ones(9)}, 3)
    del ranks[rank]["model.w"]
    with pytest.raises(InputError, match=r"'model\.w'.*is not whole.* of 2 pieces"):
        Shards(write_step(tmp_path, record_of(pieces | {"model.v": torch.ones(9)}), ranks))


def test_a_tensor_in_no_file_and_one_in_no_record(pieces, tmp_path):
    with pytest.raises(InputError, match=r"'model\.x'.*is not whole"):
        Shards(write_step(tmp_path / "a", record_of(pieces | {"model.x": torch.ones(2)}), cut(pieces, 2)))
    with pytest.raises(InputError, match=r"holds 'model\.x'"):
        Shards(write_step(tmp_path / "b", record_of(pieces), cut(pieces | {"model.x": torch.ones(2)}, 2)))


def test_a_piece_twice_is_read_if_the_two_agree(pieces, tmp_path):
    ranks = cut(pieces, 3)
    start = ranks[1]["model.w"][0][0]
    flat = pieces["model.w"].reshape(-1)
    flat[start + 2] = float("nan")  # not equal to itself, and the same bits
    twice = {"model.w": ([start - 3], flat[start - 3 : start + 6].clone())}
    ranks = [*cut(pieces, 3), twice]
    shards = Shards(write_step(tmp_path / "same", record_of(pieces), ranks))
    assert torch.equal(shards.read("model.w").view(torch.int32), pieces["model.w"].view(torch.int32))
    assert torch.equal(shards.rows("model.w", 1, 3).view(torch.int32), pieces["model.w"][1:3].view(torch.int32))
    twice["model.w"][1][-1] += 1e-6
    shards = Shards(write_step(tmp_path / "other", record_of(pieces), ranks))
    with pytest.raises(InputError, match=r"'model\.w'.*written twice, and differently"):
        shards.read("model.w")


def test_blocks_in_two_dimensions(tmp_path):
    """Pins are saved as they are, cut along either dimension or both."""
    whole = torch.arange(40.0).view(5, 8)
    corners = [(slice(0, 3), slice(0, 2)), (slice(3, 5), slice(0, 2)), (slice(0, 5), slice(2, 8))]
    ranks = [{"pins.w.write": ([rows.start, columns.start], whole[rows, columns])} for rows, columns in corners]
    shards = Shards(write_step(tmp_path / "a", record_of({"pins.w.write": whole}), ranks))
    assert torch.equal(shards.read("pins.w.write"), whole)
    assert torch.equal(shards.rows("pins.w.write", 2, 4), whole[2:4])
    with pytest.raises(InputError, match=r"\[3:5, 0:2\] of \[5, 8\] is in none"):
        Shards(write_step(tmp_path / "b", record_of({"pins.w.write": whole}), [ranks[0], ranks[2]]))
    far = {"pins.w.write": ([4, 0], whole[3:5, 0:2])}
    with pytest.raises(InputError, match=r"\[4:6, 0:2\].*is not within"):
        Shards(write_step(tmp_path / "c", record_of({"pins.w.write": whole}), [ranks[0], far, ranks[2]]))


def test_shards_of_another_dtype_or_without_places(pieces, tmp_path):
    ranks = cut(pieces, 2)
    ranks[1]["model.w"] = (ranks[1]["model.w"][0], ranks[1]["model.w"][1].half())
    with pytest.raises(InputError, match="F16"):
        Shards(write_step(tmp_path / "a", record_of(pieces), ranks))
    checkpoints = Checkpoints(tmp_path / "b")
    folder = checkpoints.prepare(5)
    save_file(pieces, folder / "x.safetensors")
    checkpoints.commit(folder, record_of(pieces), {"x.safetensors": fingerprint(folder / "x.safetensors")})
    with pytest.raises(InputError, match="where its tensors belong"):
        Shards(folder)
