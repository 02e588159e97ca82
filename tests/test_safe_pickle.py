"""What is in a checkpoint's pickles never runs, through whichever door the file comes in."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection import detect_basis, detect_difference
from grasp_dist.errors import InputError
from grasp_dist.safe_pickle import load_metadata, load_piece, load_tensors
from tests.bombs import KINDS, bombs, explosives
from tests.detection.checkpoint_cases import ALPHA, made, universal

# A kind of every family; all kinds with every file are for the slow test.
FEW = (
    "os.system, protocol 0",
    "builtins.exec, protocol 5",
    "os.system, saved by torch",
    "builtins.getattr chain, saved by torch",
    "saved by torch before 1.6",
    "among the file's own tensors",
    "in the metadata",
    "in a storage",
    "a dotted name of an allowed module",
)


def adapter(folder: Path) -> Any:
    return detect_basis(folder, rank=1, lora_alpha=ALPHA)


def difference(folder: Path) -> Any:
    return detect_difference(folder, made() / "base", rank=1)


def peft(folder: Path) -> Any:
    return detect_basis(folder, rank=1)


def a_peft_adapter(folder: Path) -> None:
    from tests.detection.adapters import make_adapter

    make_adapter(folder)


def a_pickled_model(folder: Path, name: str) -> None:
    shutil.copytree(made() / "base", folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / name)
    weights.unlink()


def a_pickled_adapter(folder: Path, name: str) -> None:
    a_peft_adapter(folder)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / name)
    weights.unlink()


# name -> (what makes the directory, what reads it)
DOORS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "DCP of LoRA": (lambda to: shutil.copytree(made() / "dcp-app", to), adapter),
    "DCP in safetensors": (lambda to: shutil.copytree(made() / "dcp-safetensors", to), adapter),
    "DCP of a full fine-tune": (lambda to: shutil.copytree(made() / "dcp-full", to), difference),
    "ZeRO-2 of LoRA": (lambda to: shutil.copytree(made() / "zero2-bf16-excluded", to), adapter),
    "ZeRO-3 of LoRA": (lambda to: shutil.copytree(made() / "zero3", to), adapter),
    "ZeRO-1 of a full fine-tune": (lambda to: shutil.copytree(made() / "zero1-full-bf16", to), difference),
    "universal": (lambda to: shutil.copytree(universal(made() / "zero2-bf16-excluded"), to), adapter),
    "own checkpoint": (lambda to: shutil.copytree(made() / "own" / "step-00000003", to), adapter),
    "PEFT adapter": (a_peft_adapter, peft),
    "PEFT adapter_model.bin": (lambda to: a_pickled_adapter(to, "adapter_model.bin"), peft),
    "PEFT adapter_model.pt": (lambda to: a_pickled_adapter(to, "adapter_model.pt"), peft),
    "model directory": (lambda to: shutil.copytree(made() / "base", to), difference),
    "pytorch_model.bin": (lambda to: a_pickled_model(to, "pytorch_model.bin"), difference),
    "pytorch_model.bin as the base": (
        lambda to: a_pickled_model(to, "pytorch_model.bin"),
        lambda folder: detect_difference(made() / "dcp-full", folder, rank=1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bombs_are_real(tmp_path: Path, kind: str) -> None:
    """Read carelessly, each of them makes its canary: otherwise the tests below would prove nothing."""
    canary = tmp_path / "canary"
    metadata = (made() / "dcp-lora" / ".metadata").read_bytes()
    content = metadata if kind == "in the metadata" else _saved({"a": torch.ones(2)})
    planted = KINDS[kind](content, canary)
    assert planted is not None
    try:
        if zipfile.is_zipfile(io.BytesIO(planted)) or "torch before" in kind:
            torch.load(io.BytesIO(planted), weights_only=False)
        else:
            pickle.loads(planted)
    except (Exception, SystemExit):
        pass  # what it is asked for afterwards does not matter
    assert canary.exists()


@pytest.mark.parametrize("door", DOORS)
def test_nothing_runs_through_any_door(tmp_path: Path, door: str) -> None:
    _try_all(tmp_path, door, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_nothing_runs_through_any_door_of_any_kind(tmp_path: Path, door: str) -> None:
    _try_all(tmp_path, door, None)


def _try_all(tmp_path: Path, door: str, kinds: tuple[str, ...] | None) -> None:
    make, read = DOORS[door]
    folder, canary = tmp_path / "checkpoint", tmp_path / "canary"
    make(folder)
    planted, refused = 0, 0
    for bomb in bombs(folder, canary, kinds):
        planted += 1
        try:
            read(folder)
        except InputError:
            refused += 1  # any other exception fails: a user would see a traceback
        except SystemExit:
            pytest.fail(f"{bomb} ended the process")
        assert not canary.exists(), bomb
    assert planted >= len(kinds or KINDS) // 2
    assert refused > 0


def test_a_basis_file_that_is_a_pickle(tmp_path: Path) -> None:
    basis = adapter(made() / "dcp-lora")
    file = tmp_path / "basis" / "basis.safetensors"
    basis.save(file)
    for bomb in bombs(file.parent, tmp_path / "canary"):
        with pytest.raises(InputError):
            SpuriousBasis.load(file)
        assert not (tmp_path / "canary").exists(), bomb
    assert SpuriousBasis.load(file).fingerprint() == basis.fingerprint()


@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "..", "a\0b", "", "nowhere", "\x80\x04cos\nsystem\n"])
def test_latest_cannot_lead_elsewhere(tmp_path: Path, named: str) -> None:
    shutil.copytree(made() / "zero3", tmp_path / "elsewhere" / "deeper")
    shutil.copytree(made() / "zero3" / "global_step3", tmp_path / "elsewhere" / "global_step3")
    folder = tmp_path / "checkpoint"
    shutil.copytree(made() / "zero3", folder)
    (folder / "latest").write_bytes(named.encode())
    with pytest.raises(InputError, match="latest"):
        adapter(folder)


def test_metadata_cannot_lead_elsewhere(tmp_path: Path) -> None:
    shutil.copytree(made() / "dcp-lora", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../checkpoint/{info.relative_path}"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="outside of its own folder"):
        adapter(tmp_path / "checkpoint")


def test_the_refusal_says_what_where_and_how_to_proceed(tmp_path: Path) -> None:
    for path, read in ((tmp_path / "a.pt", load_tensors), (tmp_path / ".metadata", load_metadata)):
        bomb = explosives(tmp_path / "canary")["os.system"]
        if read is load_tensors:
            torch.save({"a": torch.ones(1), "b": bomb}, path)
        else:
            path.write_bytes(pickle.dumps(bomb))
        with pytest.raises(InputError, match=r"asks for posix\.system, .*--trust-checkpoint") as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_trust_reads_everything_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary = tmp_path / "canary"
    torch.save({"a": torch.ones(2), "b": explosives(canary)["builtins.exec"]}, tmp_path / "a.pt")
    read = load_tensors(tmp_path / "a.pt", trust=True)
    assert canary.exists()
    assert torch.equal(read["a"], torch.ones(2))
    assert "unpickled in full" in caplog.text
    for name in ("zero3", "dcp-app", "zero2-bf16-excluded"):
        plain, trusted = (detect_basis(made() / name, rank=2, lora_alpha=ALPHA, trust=trust) for trust in (False, True))
        assert plain.fingerprint() == trusted.fingerprint()


def test_what_other_libraries_allow_is_not_allowed_here(tmp_path: Path) -> None:
    """torch's list of safe globals belongs to the process: any import may have added to it."""
    canary = tmp_path / "canary"
    torch.save({"a": explosives(canary)["builtins.exec"]}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([exec]):
        with pytest.raises(InputError, match=r"builtins\.exec|__builtin__\.exec"):
            load_tensors(tmp_path / "a.pt")
        assert not canary.exists()
        torch.load(tmp_path / "a.pt", weights_only=True)
        assert canary.exists()  # so the list alone would not have helped


def test_the_environment_cannot_switch_it_off(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"a": explosives(canary)["os.system"]}, tmp_path / "a.pt")
    code = f"from grasp_dist.safe_pickle import load_tensors; load_tensors({str(tmp_path / 'a.pt')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "InputError" in done.stderr
    assert not canary.exists()


def test_stand_ins_are_new_for_every_file(tmp_path: Path) -> None:
    """A pickle may set attributes on a class that it names; the next file must not see them."""
    path = tmp_path / ".metadata"
    for module, name in ((b"torch", b"Size"), (b"torch.distributed.checkpoint.metadata", b"Metadata")):
        program = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"
        path.write_bytes(program + b"N}\x8c\x06poison\x8c\x01xs\x86b.")  # BUILD with (None, {"poison": "x"})
        with contextlib.suppress(InputError):
            assert load_metadata(path).poison == "x"
        path.write_bytes(program + b".")
        assert not hasattr(load_metadata(path), "poison")
    assert not hasattr(torch.Size, "poison")


def test_what_passes_the_list_is_still_read_as_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two locks: this one must hold alone as well."""
    monkeypatch.setattr("grasp_dist.safe_pickle._check_archive", lambda path, file: None)
    for name, bomb in explosives(tmp_path / "canary").items():
        torch.save({"a": torch.ones(1), "b": bomb}, tmp_path / "a.pt")
        with pytest.raises(InputError):
            load_tensors(tmp_path / "a.pt")
        assert not (tmp_path / "canary").exists(), name


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    for source, read in (
        (made() / "zero3" / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt", load_tensors),
        (made() / "dcp-lora" / ".metadata", load_metadata),
    ):
        content = source.read_bytes()
        path = tmp_path / source.name
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(InputError, match=r"cannot be read|no whole archive"):
            read(path)


def test_a_piece_that_is_no_tensor(tmp_path: Path) -> None:
    content = _saved({"a": 1})
    (tmp_path / "a.distcp").write_bytes(b"12345" + content)
    with pytest.raises(InputError, match="no tensor at byte 5"):
        load_piece(tmp_path / "a.distcp", 5, len(content))


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
