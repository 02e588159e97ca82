"""SIGKILL of any rank at any moment: nothing that was saved is lost, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from grasp_dist.errors import InputError
from grasp_dist.training.checkpoints.store import MARKER, verify
from grasp_dist.training.loop import LoopState
from tests.faults.boundaries import Boundaries
from tests.faults.group import Group
from tests.faults.program import Outcome, Program, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["NAME", "run"]

NAME = "kill"
WORLD = 2
INTERVAL = 4
BEGUN, SAVE = 8, 12
"""Every injection begins with a run that was killed behind the save of BEGUN; the save that is hit is that of SAVE."""
CASES = {
    "LoRA": Program(Path(), Path(), every=INTERVAL),
    "LoRA, saves in the background": Program(Path(), Path(), every=INTERVAL, background=True),
    "full": Program(Path(), Path(), method="full", every=INTERVAL),
}
MOMENTS = 24
"""Kills at random times during steps."""


@dataclass(frozen=True)
class Point:
    """Where a rank is killed: before the change `at`, or within the write behind it after `size` bytes."""

    rank: int
    at: int
    size: int | None = None
    starting: bool = False
    """While the run starts, instead of in a save."""


@dataclass
class Reference:
    """The run without faults, and what was there when each injection begins."""

    outcomes: list[Outcome]
    begun: Path
    saving: list[list[str]]
    """By rank, what it changes in the save."""
    starting: list[list[str]]
    """By rank, what it changes before the first step."""


def run(bench: Bench) -> list[Row]:
    """All kills: at every boundary, in the middle of writes, and at any time."""
    return [row for name, case in CASES.items() for row in _case(bench, name, replace(case, model=bench.model))]


def _case(bench: Bench, name: str, program: Program) -> list[Row]:
    reference = _reference(bench, program)
    boundaries = Row(f"SIGKILL of a rank before each change of a save, and of a start ({name})")
    for problem in _order(reference):
        boundaries.failures.append(problem)
    points = [Point(rank, at) for rank, seen in enumerate(reference.saving) for at in range(len(seen))]
    points += [
        Point(rank, at, starting=True) for rank, seen in enumerate(reference.starting) for at in range(len(seen))
    ]
    for point in bench.pick(points):
        seen = (reference.starting if point.starting else reference.saving)[point.rank]
        _injection(bench, boundaries, program, reference, point, f"rank {point.rank} before {seen[point.at]}")
    writes = Row(f"SIGKILL of a rank in the middle of a write ({name})")
    for point, what in bench.pick(_writes(bench, reference, name)):
        _injection(bench, writes, program, reference, point, f"rank {point.rank} in {what} after {point.size} bytes")
    moments = Row(f"SIGKILL of a rank, or of all, at a random time ({name})")
    for number in bench.pick(range(MOMENTS // len(CASES))):
        _injection(bench, moments, program, reference, number, "at a random time")
    bench.drop(reference.begun)
    # A save in the background has until the next one to be done.
    bar = "an interval and the steps during a save" if program.background else f"the interval of {INTERVAL}"
    for row in (boundaries, writes, moments):
        row.outcome = f"continued, replaying at most {bar}; final weights, moments, pins and losses bitwise equal"
    return [boundaries, writes, moments]


def _reference(bench: Bench, program: Program) -> Reference:
    whole, begun, scratch = bench.new(), bench.new(), bench.new()
    with Group(scratch, fine_tune, WORLD, replace(program, run=whole)) as group:
        outcomes = group.results()
    with Group(bench.new(), _dies, WORLD, replace(program, run=begun), None, BEGUN + 1) as group:
        group.wait()
    copy = bench.new()
    shutil.copytree(begun, copy)
    with Group(bench.new(), _watched, WORLD, replace(program, run=copy)) as group:
        starting, saving = zip(*group.results(), strict=True)
    bench.drop(whole, copy)
    return Reference(outcomes, begun, list(saving), list(starting))


def _watched(program: Program) -> tuple[list[str], list[str]]:
    """What this rank changes until its first step, and in the save."""
    boundaries = Boundaries(program.run)
    boundaries.begin()
    starting: list[str] = []

    def on_step(step: int, state: LoopState) -> None:
        if step == BEGUN + 1:
            starting[:] = boundaries.seen
        _arm(boundaries, step)

    fine_tune(program, on_step=on_step)
    return starting, boundaries.seen[len(starting) :]


def _arm(boundaries: Boundaries, step: int) -> None:
    """Look from the step whose state is saved to the last one before the next save, which waits for this one."""
    if step == SAVE:
        boundaries.begin()
    elif step < SAVE or step >= SAVE + INTERVAL:
        boundaries.end()


def _dies(program: Program, point: Point | None, at_step: int | None = None) -> Outcome:
    """As `fine_tune`, with one rank killed."""
    from os import environ, getpid, kill

    own = point is not None and int(environ["RANK"]) == point.rank
    boundaries = Boundaries(program.run, kill_at=point.at, size=point.size) if point is not None and own else None
    if boundaries is not None and point is not None and point.starting:
        boundaries.begin()

    def on_step(step: int, state: LoopState) -> None:
        if step == at_step:
            kill(getpid(), signal.SIGKILL)
        if boundaries is not None:
            _arm(boundaries, step)

    return fine_tune(program, on_step=on_step)


def _writes(bench: Bench, reference: Reference, name: str) -> list[tuple[Point, str]]:
    """Seeded places in every file that a save or a start writes."""
    found = []
    random = bench.random("writes", name)
    for starting, by_rank in ((False, reference.saving), (True, reference.starting)):
        for rank, seen in enumerate(by_rank):
            for at, what in enumerate(seen):
                if not what.startswith("open "):
                    continue
                size = 300 if starting else 5000 if MARKER in what else 12000
                sizes = [0, size - 1, *(random.randrange(1, size) for _ in range(2))]
                found += [(Point(rank, at, size, starting), what.removeprefix("open ")) for size in sizes]
    return found


def _injection(bench: Bench, row: Row, program: Program, reference: Reference, point: Point | int, what: str) -> None:
    """Begin with the run as it was, kill, look, go on to the end, and compare."""
    started = time.monotonic()
    run, first, second = bench.new(), bench.new(), bench.new()
    shutil.copytree(reference.begun, run)
    program = replace(program, run=run)
    named = f"{row.fault}: {what}: "
    if isinstance(point, Point):
        with Group(first, _dies, WORLD, program, point) as group:
            codes = group.wait()
            reached = group.steps()
        died = codes[point.rank] in (-signal.SIGKILL, -signal.SIGXFSZ)
        row.check(died, f"{named}was not killed there, exit codes {codes}: {group.last_words()}")
    else:
        with Group(first, fine_tune, WORLD, program) as group:
            what = named = _at_a_random_time(bench, group, point, row)
            reached = group.steps()
    row.injected += 1
    newest = _newest_on_disk(row, program, named)
    with Group(second, fine_tune, WORLD, program) as group:
        codes = group.wait()
        if row.check(codes == [0] * WORLD, f"{named}did not go on, exit codes {codes}: {group.last_words()}"):
            outcomes: list[Outcome] = group.results()
            _compare(row, named, outcomes, reference, program)
            if outcomes[0].started < newest:
                row.lost = (row.lost or 0) + 1
                row.check(False, f"{named}went on behind step {outcomes[0].started}, and step {newest} was saved")
            replayed = (reached[-1] if reached else BEGUN) - outcomes[0].started
            row.replay(replayed)
            allowed = 2 * INTERVAL if program.background else INTERVAL
            row.check(replayed <= allowed, f"{named}{replayed} steps were done again")
    bench.say(f"  {what}: {time.monotonic() - started:.1f} s")
    bench.drop(run, first, second)


def _at_a_random_time(bench: Bench, group: Group, number: int, row: Row) -> str:
    """Kill one rank, or all, a random time behind a random step; what was done."""
    random = bench.random("moment", row.fault, number)
    ranks = random.choice([[0], [1], [0, 1]])
    step, delay = random.randrange(BEGUN, 17), random.random() * 0.06
    deadline = time.monotonic() + 60
    while (group.steps(ranks[0]) or [0])[-1] < step and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    for rank in ranks:
        group.send(rank)
    codes = group.wait()
    named = f"{row.fault}: ranks {ranks} {delay:.3f} s behind step {step}: "
    row.check(codes[ranks[0]] == -signal.SIGKILL, f"{named}exit codes {codes}: {group.last_words()}")
    return named


def _newest_on_disk(row: Row, program: Program, named: str) -> int:
    """The newest step whose checkpoint was finished. Every one that has its marker must be whole."""
    newest = 0
    for step, folder in program.checkpoints.folders():
        if (folder / MARKER).exists():
            try:
                verify(folder)
                newest = max(newest, step)
            except InputError as error:
                row.lost = (row.lost or 0) + 1
                row.check(False, f"{named}{error}")
    row.check(newest >= BEGUN, f"{named}the newest checkpoint is that of step {newest}")
    return newest


def _compare(row: Row, named: str, outcomes: list[Outcome], reference: Reference, program: Program) -> None:
    """With the run without faults: state of each rank, losses, metrics; and nothing half done is left."""
    for rank, (outcome, expected) in enumerate(zip(outcomes, reference.outcomes, strict=True)):
        row.check(outcome.digest == expected.digest, f"{named}rank {rank} ended with other weights")
        row.check(outcome.losses == expected.losses, f"{named}rank {rank} had other losses")
    steps = [json.loads(line)["step"] for line in (program.run / "metrics.jsonl").read_text().splitlines()]
    row.check(steps == list(range(1, program.steps + 1)), f"{named}metrics.jsonl has the steps {steps}")
    states = [(entry.step, entry.state) for entry in program.checkpoints.listing()]
    kept = [(step, "valid") for step in (16, 12)]
    row.check(states == kept, f"{named}checkpoints at the end: {states}")


def _order(reference: Reference) -> list[str]:
    """What a power cut asks for beside SIGKILL: each file is on the disk before the marker has its name."""
    problems = []
    for rank, seen in enumerate(reference.saving):
        opened = [line.removeprefix("open ") for line in seen if line.startswith("open ")]
        problems += [f"rank {rank} never syncs {name}" for name in opened if f"os.fsync {name}" not in seen]
    first = reference.saving[0]
    rename = next(index for index, line in enumerate(first) if line.startswith("os.rename"))
    folder = str(Path(first[rename].split()[1]).parent)
    if f"os.fsync {folder}" not in first[:rename] or f"os.fsync {folder}" not in first[rename:]:
        problems.append("the folder is not synced before and after the marker is renamed into place")
    return problems
