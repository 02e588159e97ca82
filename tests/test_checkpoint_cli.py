"""`grasp-dist checkpoint` and `grasp-dist export` as a user types them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_dist.cli import main
from grasp_dist.run_lock import RunLock
from grasp_dist.training.checkpoints.store import MARKER, Checkpoints
from tests.export_cases import cut, lora_state, record_of, write_step
from tests.tiny_runs import grasp_dist
from tests.training.training_cases import save_tiny

TENSORS = {"model.w": torch.arange(3000.0)}


@pytest.fixture
def command(capsys):
    """Run the command line in this process; returns exit code, output and errors."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


@pytest.fixture
def root(tmp_path) -> Path:
    """Steps 10, 20, ..., 60 of a run: 60 unfinished, 50 damaged, the others valid."""
    run = tmp_path / "run"
    root = run / "naive" / "seed-0" / "checkpoints"
    for step in range(10, 70, 10):
        write_step(root, {**record_of(TENSORS), "step": step}, cut(TENSORS, 2))
    (run / "config.yaml").write_text("run_dir: x\n")
    (root / "step-00000060" / MARKER).unlink()
    flip(root / "step-00000050")
    os.utime(root / "step-00000040" / MARKER, (0, time.mktime((2026, 2, 3, 4, 5, 6, 0, 0, -1))))
    return root


def flip(folder: Path) -> Path:
    """Change one bit of a checkpoint's second file, which keeps its size."""
    path = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    return path


def steps(root: Path) -> list[int]:
    return [step for step, _ in Checkpoints(root).folders()]


def cells(output: str) -> list[list[str]]:
    """The rows of a table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("place", ["run", "task", "checkpoints"])
def test_list(place, command, root):
    path = {"run": root.parents[2], "task": root.parent, "checkpoints": root}[place]
    code, said, _ = command("checkpoint", "list", path)
    assert code == 0
    assert str(root) in said
    rows = cells(said)
    assert [row[0] for row in rows] == ["60", "50", "40", "30", "20", "10"]
    assert rows[0][3:] == ["-", "-", "unfinished: it was never finished"]
    assert rows[1][5].startswith("damaged: ")
    assert "shard-00002" in rows[1][5]
    assert rows[2][1] == "2026-02-03 04:05:06"
    assert rows[2][3:] == ["2", "fsdp2", "valid"]
    size = sum(path.stat().st_size for path in (root / "step-00000040").iterdir())
    assert rows[2][2] == f"{size / 1000:.1f} kB"


def test_list_quickly_sees_sizes_alone(command, root):
    path = sorted((root / "step-00000030").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-4])
    sorted((root / "step-00000020").glob("*.safetensors"))[0].unlink()
    rows = cells(command("checkpoint", "list", "--quick", root)[1])
    assert rows[1][5] == "sizes fit"  # a changed bit
    assert rows[2][5] == "sizes fit"
    assert "bytes, and had" in rows[3][5]
    assert rows[4][5].endswith("is missing")


def test_list_several_runs_and_one_step(command, root):
    write_step(root.parents[1] / "seed-1" / "checkpoints", record_of(TENSORS), cut(TENSORS, 2))
    aside = root.parents[1] / "seed-1.old-1" / "checkpoints"
    write_step(aside, record_of(TENSORS), cut(TENSORS, 2))
    said = command("checkpoint", "list", root.parents[2])[1]
    assert len(cells(said)) == 7
    assert "seed-1.old-1" not in said
    assert len(cells(command("checkpoint", "list", aside)[1])) == 1
    assert [row[0] for row in cells(command("checkpoint", "list", root / "step-00000020")[1])] == ["20"]


def test_verify(command, root):
    code, said, errors = command("checkpoint", "verify", root.parents[2])
    assert code == 2
    assert "step-00000050/shard-00002" in errors
    assert "Traceback" not in errors
    assert sum(line.endswith(": valid") for line in said.splitlines()) == 4
    assert command("checkpoint", "verify", root / "step-00000040")[0] == 0
    assert command("checkpoint", "verify", root / "step-00000060")[0] == 2
    assert command("checkpoint", "prune", root, "--keep-last", 9, "--damaged")[0] == 0
    assert command("checkpoint", "verify", root)[0] == 0
    write_step(root, {**record_of(TENSORS), "step": 70}, cut(TENSORS, 2))
    (root / "step-00000070" / MARKER).unlink()  # what a killed run leaves
    assert command("checkpoint", "verify", root)[0] == 0


@pytest.mark.parametrize("what", ["marker", "extra file", "missing file"])
def test_verify_sees_every_kind_of_damage(what, command, root):
    folder = root / "step-00000040"
    path = {"marker": folder / MARKER, "extra file": folder / "x", "missing file": next(folder.glob("*-00001-of*"))}[
        what
    ]
    if what == "marker":
        path.write_text(path.read_text().replace('"step": 40', '"step": 41'))
    elif what == "extra file":
        path.write_text("x")
    else:
        path.unlink()
    code, _, errors = command("checkpoint", "verify", folder)
    assert code == 2
    assert str(path) in errors


def test_prune_keeps_the_newest_valid_ones(command, root):
    code, said, _ = command("checkpoint", "prune", root.parents[2], "--keep-last", 1, "--keep-every", 20, "--dry-run")
    assert code == 0
    assert steps(root) == [60, 50, 40, 30, 20, 10]
    assert [line.split()[2] for line in said.splitlines() if line.startswith("would remove")] == [
        str(root / f"step-{step:08d}") for step in (30, 10)
    ]
    code, said, _ = command("checkpoint", "prune", root.parents[2], "--keep-last", 1, "--keep-every", 20)
    assert code == 0
    assert "2 checkpoint(s)" in said
    assert steps(root) == [60, 50, 40, 20]
    command("checkpoint", "prune", root, "--keep-last", 1)
    assert steps(root) == [60, 50, 40]  # 40 is what a run would go on from
    command("checkpoint", "prune", root, "--keep-last", 1, "--damaged")
    assert steps(root) == [40]
    assert command("checkpoint", "prune", root, "--keep-last", 0)[0] == 2
    assert steps(root) == [40]


def test_prune_leaves_a_running_training_alone(command, root, tmp_path):
    """What is unfinished may be what it is writing now."""
    (root / "step-00000050").rename(root / "step-00000050.old-1")
    with RunLock(root.parents[2], what="training"):
        code, _, errors = command("checkpoint", "prune", root, "--keep-last", 1, "--damaged")
        assert code == 2
        assert "in use by training" in errors
        assert steps(root) == [60, 40, 30, 20, 10]
        assert command("checkpoint", "prune", root, "--keep-last", 1)[0] == 0
    assert steps(root) == [60, 40]
    assert command("checkpoint", "prune", root, "--keep-last", 1, "--damaged")[0] == 0
    assert [path.name for path in root.iterdir()] == ["step-00000040"]
    code, _, errors = command("checkpoint", "prune", root / "step-00000040", "--keep-last", 1)
    assert code == 2
    assert "single checkpoint" in errors
    assert steps(root) == [40]


@pytest.mark.parametrize("name", ["list", "verify", "prune"])
def test_nothing_there(name, command, tmp_path):
    options = ["--keep-last", 1] if name == "prune" else []
    code, _, errors = command("checkpoint", name, tmp_path / "nowhere", *options)
    assert code == 2
    assert "does not exist" in errors
    code, _, errors = command("checkpoint", name, tmp_path, *options)
    assert code == 2
    assert "no checkpoints under" in errors


def test_export(command, tmp_path):
    base = save_tiny(tmp_path / "base")
    _, factors, settings = lora_state(base)
    tensors = {f"model.{name}": value for name, value in factors.items()}
    step = write_step(tmp_path / "checkpoints", record_of(tensors, **settings), cut(tensors, 2))
    code, said, _ = command("export", tmp_path / "checkpoints", "--out", tmp_path / "out", "--merge", "--dtype", "bf16")
    assert code == 0
    assert f"checkpoint: {step}" in said
    assert said.splitlines()[-1] == f"export: {tmp_path / 'out'}"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    code, _, errors = command("export", step, "--out", tmp_path / "out")
    assert code == 2
    assert "--overwrite" in errors
    code, _, errors = command("export", step, "--out", tmp_path / "out2", "--training.steps", 3)
    assert code == 2
    assert "settings with dots" in errors
    flip(step)
    code, _, errors = command("export", step, "--out", tmp_path / "out2")
    assert code == 2
    assert "sha256" in errors
    assert not (tmp_path / "out2").exists()


def test_help_teaches(command):
    said = command("checkpoint", "--help")[1] + command("checkpoint", "prune", "--help")[1] + command("export", "-h")[1]
    for words in ("newest valid one", "runs/mine --keep-last 2", "grasp-dist export runs/mine"):
        assert words in " ".join(said.replace("│", " ").split())


@pytest.mark.slow
def test_the_checkpoint_of_a_step_is_a_run_of_that_many_steps(write_config, organism, tmp_path):
    """Two processes train with FSDP2 for 8 steps; the export of step 4 is the adapter of a run with 4 steps."""
    long = write_config("long.yaml", checkpoint={"every": 4})
    short = write_config("short.yaml", run_dir=str(tmp_path / "short"))
    for arguments in (("naive", long), ("naive", short, "--training.steps", 4)):
        done = grasp_dist(*arguments, nproc=2)
        assert done.returncode == 0, done.stderr
    listed = grasp_dist("checkpoint", "list", tmp_path / "run")
    assert [[row[0], *row[3:]] for row in cells(listed.stdout)] == [["4", "2", "fsdp2", "valid"]]
    assert grasp_dist("checkpoint", "verify", tmp_path / "run").returncode == 0
    exports = {"step": tmp_path / "run" / "naive" / "seed-0" / "checkpoints", "end": tmp_path / "run"}
    for name, source in exports.items():
        done = grasp_dist("export", source, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    for name, run in (("step", "short"), ("end", "run")):
        ours, own = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / name, tmp_path / run / "naive" / "seed-0" / "adapter")
        )
        assert ours.keys() == own.keys()
        assert all(torch.equal(ours[key], own[key]) for key in own)
    done = grasp_dist("export", tmp_path / "run", "--out", tmp_path / "merged", "--merge")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
