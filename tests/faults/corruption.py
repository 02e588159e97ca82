"""Damage to a file of the newest checkpoint: seen before anything is loaded, and the one before it is used instead."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from grasp_dist.training.checkpoints.store import MARKER
from tests.faults.group import Group
from tests.faults.program import Program, build, digest, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLD = 2
INJECTIONS = 200
CONTINUED = 4
"""How many of them are followed by the rest of the run."""
EXCHANGED = "as in the checkpoint before"
HOW = {
    "truncated": lambda content, generator, _: content[: generator.randrange(1, len(content))],
    "one bit flipped": lambda content, generator, _: _flipped(content, generator.randrange(8 * len(content))),
    "removed": lambda content, generator, _: None,
    "emptied": lambda content, generator, _: b"",
    "zeros where a block was": lambda content, generator, _: _zeroed(content, generator),
    EXCHANGED: lambda content, generator, before: before,
}


@dataclass(frozen=True)
class Damage:
    """What is done to which file; the generator is seeded by `number`."""

    number: int
    file: str
    how: str


@dataclass
class Seen:
    """What a rank saw of one injection."""

    damage: Damage
    step: int | None
    same: bool
    """Whether its state was, bit by bit, that of the checkpoint before."""
    said: list[str]


def run(bench: Bench) -> list[Row]:
    row = Row("the newest checkpoint damaged: truncated, a bit flipped, removed, emptied, zeroed, exchanged")
    program = Program(bench.model, bench.new(), steps=14)
    with Group(bench.new(), fine_tune, WORLD, program) as group:
        expected = group.results()
    newest = program.checkpoints.folder(12)
    files = sorted(path.name for path in newest.iterdir())
    row.check(len(files) == WORLD + 1 and MARKER in files, f"the newest checkpoint holds {files}")
    kinds = [(file, how) for file in files for how in HOW]
    damages = bench.pick([Damage(number, *kinds[number % len(kinds)]) for number in range(INJECTIONS)])
    with Group(bench.new(), _in_process, WORLD, program, damages, bench.seed) as group:
        by_rank = group.results()
    for seen in zip(*by_rank, strict=True):
        damage: Damage = seen[0].damage
        named = f"{damage.file} {damage.how} (injection {damage.number}): "
        row.injected += 1
        stepped = {one.step for one in seen}
        if not row.check(stepped == {8}, f"{named}ranks went on behind the steps {stepped}"):
            row.lost = (row.lost or 0) + 1
        row.check(all(one.same for one in seen), f"{named}something else than the state of step 8 was loaded")
        # Nothing in an older marker contradicts itself; it is the files that are not those it speaks of.
        exchanged = damage.file == MARKER and damage.how == EXCHANGED
        said = [line for line in seen[0].said if str(newest) in line and (exchanged or damage.file in line)]
        row.check(len(said) == 1, f"{named}the message does not say what was wrong: {seen[0].said}")
        bench.say(f"  {named}fell back to step {seen[0].step}")
    for damage in damages[:: max(1, len(damages) // CONTINUED)][:CONTINUED]:
        copy = replace(program, run=bench.new())
        shutil.copytree(program.run, copy.run)
        _apply(damage, copy.checkpoints.folder(12), copy.checkpoints.folder(8), bench.seed)
        with Group(bench.new(), fine_tune, WORLD, copy) as group:
            outcomes = group.results()
        named = f"{damage.file} {damage.how}, continued: "
        row.check([one.digest for one in outcomes] == [one.digest for one in expected], f"{named}other weights")
        row.check(outcomes[0].losses == expected[0].losses, f"{named}other losses")
        row.replay(14 - outcomes[0].started)
        bench.say(f"  {damage.file} {damage.how}: continued behind step {outcomes[0].started}")
        bench.drop(copy.run)
    row.outcome = "seen, said what was wrong, and fell back to the one before; nothing damaged was loaded"
    return [row]


def _in_process(program: Program, damages: list[Damage], seed: int) -> list[Seen]:
    """Damage, load, compare, mend, again and again."""
    engine, projector, keeper, _ = build(program)
    newest, before = (folder for _, folder in program.checkpoints.folders())
    hidden = newest.with_name("hidden")

    def on_main(action: Callable[[], object]) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    on_main(lambda: newest.rename(hidden))
    keeper.resume(engine, projector)
    expected = digest(engine, projector)
    on_main(lambda: hidden.rename(newest))
    seen = []
    for damage in damages:
        for piece in engine.pieces().values():
            piece.local.fill_(7.0)
        path = newest / damage.file
        content = path.read_bytes()
        on_main(partial(_apply, damage, newest, before, seed))
        said: list[str] = []
        extra = keeper.resume(engine, projector, say=said.append)
        step = None if extra is None else extra["step"]
        seen.append(Seen(damage, step, digest(engine, projector) == expected, said))
        on_main(partial(path.write_bytes, content))
    return seen


def _apply(damage: Damage, newest: Path, before: Path, seed: int) -> None:
    generator = random.Random(f"{seed} {damage}")
    path = newest / damage.file
    content = path.read_bytes()
    changed = HOW[damage.how](content, generator, (before / damage.file).read_bytes())
    assert changed != content
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _zeroed(content: bytes, generator: random.Random) -> bytes:
    """512 bytes, as of a block that never reached the disk, where there is something else than zeros."""
    while True:
        start = generator.randrange(len(content)) // 512 * 512
        changed = content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]
        if changed != content:
            return changed
