"""The tables of `grasp-dist inspect`."""

import io
import re
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, merged_change
from rich.console import Console

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection import detect_basis
from grasp_dist.detection.inspect import adapter_rows, basis_rows, render
from grasp_dist.errors import InputError

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def _text(path: Path, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(path, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_of_a_one_shot_basis_against_the_dense_spectrum(tmp_path: Path) -> None:
    change = merged_change(make_adapter(tmp_path))[O_PROJ]
    energy = torch.linalg.svdvals(change)[:4].square()
    rows = basis_rows(detect_basis(tmp_path, rank=2, side="both"))
    assert len(rows) == 8
    row = next(row for row in rows if (row.weight, row.side) == (O_PROJ, "read"))
    assert (row.dim, row.rank, len(row.values)) == (24, 2, 4)
    assert row.leading == pytest.approx((energy[0] / energy.sum()).item(), rel=1e-5)
    assert row.covered == pytest.approx((energy[:2].sum() / energy.sum()).item(), rel=1e-5)
    assert 1 < row.effective_rank < 4
    whole = next(row for row in adapter_rows(tmp_path) if row.weight == O_PROJ)
    assert whole.covered == pytest.approx(1.0)
    assert whole.leading == pytest.approx(row.leading, rel=1e-5)


def test_render_a_basis_and_an_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    detect_basis(tmp_path, rank=2).save(tmp_path / "out" / "basis.safetensors")
    text = _text(tmp_path / "out" / "basis.safetensors")
    assert "weights: 4" in text
    assert "directions: 8" in text
    assert re.search(rf"{re.escape(O_PROJ)} .* write .* 24 .* 2 .*\d%", text)
    assert _text(tmp_path / "out") == text  # the folder of a basis will do
    adapter = _text(tmp_path)
    assert "update" in adapter
    assert "100%" in adapter


def test_deflation_has_no_spectrum_of_one_update(tmp_path: Path) -> None:
    basis = SpuriousBasis.from_tensors(
        {"w.weight.write": torch.eye(6, 3)},
        singular_values={"w.weight": torch.tensor([2.0, 3.0, 1.0])},
        provenance={"method": "warm"},
    )
    assert basis_rows(basis)[0].leading is None
    basis.save(tmp_path / "b.safetensors")
    text = _text(tmp_path / "b.safetensors")
    assert "2 3 1" in text
    assert "order of discovery" in text
    assert "%" not in text


def test_a_basis_without_values_and_a_narrow_terminal(tmp_path: Path) -> None:
    SpuriousBasis.from_tensors({f"{O_PROJ}.write": torch.eye(6, 3)}).save(tmp_path / "b.safetensors")
    text = _text(tmp_path / "b.safetensors", width=72)
    folded = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert folded == O_PROJ  # cut into lines, never shortened
    with pytest.raises(InputError, match="no basis file"):
        render(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="no PEFT adapter"):
        render(tmp_path)
