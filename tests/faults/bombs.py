"""Pickles that run a command, in every file that a checkpoint, basis or adapter may hold: none is ever executed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.export import export_checkpoint
from grasp_dist.training.checkpoints.reader import Shards
from grasp_dist.training.checkpoints.store import MARKER, Checkpoints, fingerprint
from grasp_dist.training.loop import LoopState
from grasp_dist.training.lora import load_adapter, save_adapter
from tests.bombs import KINDS, bombs
from tests.faults.group import Group
from tests.faults.program import Program, basis, build, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]


@dataclass
class Door:
    """What happened to the bombs in one kind of directory."""

    name: str
    planted: int = 0
    refused: int = 0
    executed: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)


def run(bench: Bench) -> list[Row]:
    own = Row("a pickle bomb in every file of this package's checkpoints, bases and adapters", lost=None)
    others = Row("the same in those of DeepSpeed, torch.distributed.checkpoint and PEFT, read by detection", lost=None)
    program = Program(bench.model, bench.new(), steps=10)
    adapter = bench.new()
    with Group(bench.new(), _saves, 1, program, adapter) as group:
        group.results()
    kinds = tuple(bench.pick(list(KINDS)))
    with Group(bench.new(), _own_doors, 1, program, adapter, kinds) as group:
        _add(bench, own, group.results(timeout=900)[0])
    with Group(bench.new(), _other_doors, 1, kinds) as group:
        _add(bench, others, group.results(timeout=900)[0])
    for row in (own, others):
        row.outcome = "0 executed; refused with a message, or passed over for the checkpoint before"
    return [own, others]


def _add(bench: Bench, row: Row, doors: list[Door]) -> None:
    for door in doors:
        row.injected += door.planted
        row.check(not door.executed, f"{door.name}: {len(door.executed)} executed, the first of them {door.executed}")
        row.check(not door.crashed, f"{door.name}: {len(door.crashed)} crashed, the first of them {door.crashed[:1]}")
        row.check(door.refused, f"{door.name}: none of {door.planted} was refused")
        ends = f"{door.refused} refused, {len(door.executed)} executed, {len(door.crashed)} crashed"
        bench.say(f"  {door.name}: {door.planted} planted, {ends}")


def _saves(program: Program, adapter: Path) -> None:
    """A run of one process, with an adapter at its end."""

    def on_end(state: LoopState) -> None:
        from grasp_dist.training.parallel import Parallel

        save_adapter(
            state.engine.module, adapter, Parallel("none", 0, 1, next(state.engine.module.parameters()).device)
        )

    fine_tune(program, on_end=on_end)


def _try(name: str, folder: Path, kinds: tuple[str, ...], read: Callable[[], object], leave_out: str = "") -> Door:
    """read: returns True if the bomb was passed over, or raises `InputError`. leave_out: the name of a file."""
    door = Door(name)
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch) / "canary"
        for bomb in bombs(folder, canary, kinds):
            if bomb.file.name == leave_out:
                continue
            door.planted += 1
            named = f"{bomb.kind} in {bomb.file.name}"
            try:
                door.refused += read() is True
            except InputError:
                door.refused += 1
            except BaseException as error:
                door.crashed.append(f"{named}: {type(error).__name__}: {error}"[:300])
            if canary.exists():
                canary.unlink()
                door.executed.append(named)
    return door


def _own_doors(program: Program, adapter: Path, kinds: tuple[str, ...]) -> list[Door]:
    engine, projector, keeper, parallel = build(program)
    newest, before = (folder for _, folder in program.checkpoints.folders())

    def resume() -> bool:
        extra = keeper.resume(engine, projector, say=lambda _: None)
        return extra is not None and extra["step"] == 4

    doors = [_try("a checkpoint, continued from", newest, kinds, resume)]
    record = json.loads((newest / MARKER).read_text())["record"]
    shutil.rmtree(before)

    def signed(read: Callable[[], Any]) -> Callable[[], bool]:
        """Behind the checksums: as of someone who can write the marker, too."""

        def sign_and_read() -> bool:
            files = {path.name: fingerprint(path) for path in newest.glob("*.safetensors")}
            Checkpoints(newest.parent).commit(newest, record, files)
            read()
            return False

        return sign_and_read

    marker = (newest / MARKER).read_bytes()
    export = newest.parent / "exported"
    readers: dict[str, Callable[[], Any]] = {
        "continued from": resume,
        "read by name": lambda: [Shards(newest).read(name) for name in record["tensors"]],
        "exported": lambda: export_checkpoint(newest, export, overwrite=True, say=lambda _: None),
    }
    for name, read in readers.items():
        doors.append(_try(f"a checkpoint with right checksums, {name}", newest, kinds, signed(read), MARKER))
        (newest / MARKER).write_bytes(marker)
    doors.append(_try("a PEFT adapter", adapter, kinds, lambda: load_adapter(engine.module, adapter, parallel)))
    folder = newest.parent / "basis"
    folder.mkdir()
    basis().save(folder / "basis.safetensors")
    doors.append(_try("a basis", folder, kinds, lambda: SpuriousBasis.load(folder / "basis.safetensors")))
    return doors


def _other_doors(kinds: tuple[str, ...]) -> list[Door]:
    sys.path.append(str(Path(__file__).parent.parent))  # as pytest does, for what those tests import
    from tests.test_safe_pickle import DOORS

    doors = []
    for name, (make, read) in DOORS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            make(folder)
            doors.append(_try(name, folder, kinds, partial(read, folder)))
    return doors
