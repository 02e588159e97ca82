"""A disk that is full in the middle of a save, one that turns read-only, and a run directory that two jobs use."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from grasp_dist.training.loop import LoopState
from tests.faults.group import Group
from tests.faults.program import Outcome, Program, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLD = 2
SIZES = range(88, 124, 4)
"""KiB of disks on which two checkpoints have room, and a third not, or not all of it."""
LIMITS = range(1000, 15000, 1000)
"""Bytes that a file may have, where no disk can be mounted."""
RECORDED = 1200
"""Bytes that metrics.jsonl outgrows in the steps behind PAUSE; the messages of a rank stay below."""
PAUSE = 9
"""A step that waits until something was done to the disk."""
USER_ERROR = 2


def run(bench: Bench) -> list[Row]:
    program = Program(bench.model, bench.new(), recorded=False)
    with Group(bench.new(), fine_tune, WORLD, program) as group:
        expected = group.results()
    return [
        _full(bench, program, expected),
        _read_only(bench, program, expected),
        _two_jobs(bench, program, expected),
    ]


@dataclass(frozen=True)
class _Shortage:
    """Room in KiB on a disk, or in bytes for each file behind a step."""

    size: int
    limit: bool
    background: bool
    recorded: bool

    def __str__(self) -> str:
        kind = f"{self.size} bytes a file" if self.limit else f"a disk of {self.size} KiB"
        return f"{kind}, in the {'back' if self.background else 'fore'}ground{', recorded' * self.recorded}: "


def _full(bench: Bench, program: Program, expected: list[Outcome]) -> Row:
    mounts = _can_mount(bench)
    row = Row("no space left in the middle of a save" if mounts else "a file size limit in the middle of a save")
    sizes = SIZES if mounts else LIMITS
    shortages = [
        _Shortage(size, not mounts, background, mounts and number % 2 == 1)
        for number, size in enumerate(sizes)
        for background in (False, True)
    ]
    shortages += [_Shortage(RECORDED, True, background, True) for background in (False, True)]
    for shortage in bench.pick(shortages):
        run = bench.new()
        run.mkdir()
        one = replace(program, run=run, background=shortage.background, recorded=shortage.recorded)
        if shortage.limit:
            _stops(bench, row, one, str(shortage), "cannot write", _with_limit, shortage.size)
            _goes_on(bench, row, one, str(shortage), expected)
            continue
        with _mounted(run, f"size={shortage.size}k"):
            _stops(bench, row, one, str(shortage), "the disk is full; free some space")
            _mount(run, "remount,size=64m")
            _goes_on(bench, row, one, str(shortage), expected)
    row.outcome = "a message with the remedy, code 2, the last checkpoint whole; continued, bitwise equal"
    return row


def _with_limit(program: Program, size: int) -> Outcome:
    def on_step(step: int, state: LoopState) -> None:
        if step == PAUSE:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return fine_tune(program, on_step=on_step)


def _read_only(bench: Bench, program: Program, expected: list[Outcome]) -> Row:
    """In the middle of a run, and from its start."""
    row = Row("the run directory turns read-only")
    mounts = _can_mount(bench)
    cases = [(when, background) for when in ("in the middle", "from the start") for background in (False, True)]
    for when, background in bench.pick(cases):
        run, gate = bench.new(), bench.new()
        run.mkdir()
        one = replace(program, run=run, background=background)
        named = f"{when}, in the {'back' if background else 'fore'}ground: "
        with _mounted(run, "size=64m") if mounts else _as_it_is():
            with Group(bench.new(), _waiting, WORLD, one, gate) as group:
                _until_paused(group)
                if when == "from the start":
                    group.send(0)
                    group.wait()
                    _freeze(run, mounts, True)
                    _stops(bench, row, one, named, "read-only" if mounts else "permission is denied")
                else:
                    _freeze(run, mounts, True)
                    gate.touch()
                    _check_stop(row, named, group, "read-only" if mounts else "permission is denied")
            _freeze(run, mounts, False)
            _goes_on(bench, row, one, named, expected)
    row.outcome = "a message with the remedy, code 2, the last checkpoint whole; continued, bitwise equal"
    return row


def _two_jobs(bench: Bench, program: Program, expected: list[Outcome]) -> Row:
    """A second job on the directory of a running one, and two that begin at the same moment."""
    row = Row("a run directory used by two jobs at once")
    for number in bench.pick(range(8)):
        one, gate = replace(program, run=bench.new()), bench.new()
        together = number % 2 == 1
        named = f"{'both at once' if together else 'one behind the other'} (injection {number}): "
        with Group(bench.new(), _waiting, WORLD, one, gate) as first:
            if not together:
                _until_paused(first)
            with Group(bench.new(), _waiting, WORLD, one, gate) as second:
                time.sleep(bench.random("jobs", number).random() * 0.1)
                refused = _first_to_end(first, second)
                kept = second if refused is first else first
                _check_stop(row, named, refused, f"the run directory {one.run} is in use by training of")
                gate.touch()
                _compare(row, named, kept.results(), expected)
        bench.say(f"  {named}refused: {refused.said(0).splitlines()[-1][:120] if refused.said(0) else ''}...")
        bench.drop(one.run)
    row.outcome = "the second named the first and ended with code 2; the first undisturbed, bitwise equal"
    return row


def _first_to_end(first: Group, second: Group) -> Group:
    """One of two, of which the other waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for group in (first, second):
            if group.ended():
                return group
        time.sleep(0.01)
    raise TimeoutError(f"none of two jobs gave way:\n{first.last_words()}\n{second.last_words()}")


def _waiting(program: Program, gate: Path) -> Outcome:
    """As `fine_tune`, but it stops behind a step until the gate is there."""

    def on_step(step: int, state: LoopState) -> None:
        while step == PAUSE and not gate.exists():
            time.sleep(0.005)

    return fine_tune(program, on_step=on_step)


def _until_paused(group: Group) -> None:
    deadline = time.monotonic() + 60
    while not all(PAUSE in group.steps(rank) for rank in range(WORLD)):
        if time.monotonic() > deadline or group.ended():
            raise TimeoutError(f"step {PAUSE} was not reached:\n{group.last_words()}")
        time.sleep(0.005)


def _stops(
    bench: Bench,
    row: Row,
    program: Program,
    named: str,
    message: str,
    function: Callable[..., Outcome] = fine_tune,
    *arguments: object,
) -> None:
    with Group(bench.new(), function, WORLD, program, *arguments) as group:
        _check_stop(row, named, group, message)


def _check_stop(row: Row, named: str, group: Group, message: str) -> None:
    codes = group.wait(grace=10)
    row.injected += 1
    row.check(codes == [USER_ERROR] * WORLD, f"{named}exit codes {codes}: {group.last_words()}")
    told = [line for line in group.said().splitlines() if line.startswith("error: ") and message in line]
    row.check(told, f"{named}there is no message with {message!r}: {group.last_words()}")
    row.check("Traceback" not in group.said(), f"{named}a traceback: {group.last_words()}")


def _goes_on(bench: Bench, row: Row, program: Program, named: str, expected: list[Outcome]) -> None:
    """What was saved is there, and the run ends as if nothing had happened."""
    listing = program.checkpoints.listing()
    damaged = [entry.reason for entry in listing if entry.state == "damaged"]
    valid = [entry.step for entry in listing if entry.state == "valid"]
    if not row.check(not damaged, f"{named}{damaged}"):
        row.lost = (row.lost or 0) + len(damaged)
    with Group(bench.new(), fine_tune, WORLD, program) as group:
        codes = group.wait()
        if row.check(codes == [0] * WORLD, f"{named}did not go on, exit codes {codes}: {group.last_words()}"):
            outcomes = group.results()
            row.check(
                outcomes[0].started == max(valid, default=0), f"{named}behind step {outcomes[0].started}, {valid}"
            )
            _compare(row, named, outcomes, expected)
            bench.say(f"  {named}continued behind step {outcomes[0].started}")


def _compare(row: Row, named: str, outcomes: list[Outcome], expected: list[Outcome]) -> None:
    row.check([one.digest for one in outcomes] == [one.digest for one in expected], f"{named}ended with other weights")
    row.check(outcomes[0].losses == expected[0].losses, f"{named}had other losses")


# -- file systems


def _can_mount(bench: Bench) -> bool:
    if os.geteuid() != 0:
        return False
    folder = bench.new()
    folder.mkdir()
    if not _mount(folder, "size=64k"):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def _mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    assert _mount(folder, options)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _freeze(run: Path, mounts: bool, frozen: bool) -> None:
    if mounts:
        assert _mount(run, f"remount,{'ro' if frozen else 'rw'}"), f"{run} cannot be remounted"
        return
    for folder in (run, *(path for path in run.rglob("*") if path.is_dir())):
        folder.chmod(0o500 if frozen else 0o700)
