"""A signal that reaches one rank of four, at any moment: all save the same step and end with code 75."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import replace

from grasp_dist.errors import PREEMPTED
from grasp_dist.training.checkpoints.store import verify
from tests.faults.group import Group
from tests.faults.program import Program, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLD = 4
INJECTIONS = 20
STEPS = 24


def run(bench: Bench) -> list[Row]:
    row = Row(f"SIGUSR2 to one rank of {WORLD}, once, twice or three times", replayed=0)
    program = Program(bench.model, bench.new(), steps=STEPS, every=None)
    with Group(bench.new(), fine_tune, WORLD, program) as group:
        expected = group.results()
    for number in bench.pick(range(INJECTIONS)):
        _injection(bench, row, replace(program, run=bench.new(), background=number % 2 == 1), number, expected)
    row.outcome = f"every rank saved the same step, code {PREEMPTED} on all; continued, bitwise equal"
    return [row]


def _injection(bench: Bench, row: Row, program: Program, number: int, expected: list) -> None:
    started = time.monotonic()
    random = bench.random("signal", number)
    times = 1 + number % 3
    rank, step = random.randrange(WORLD), random.randrange(1, STEPS - 4)
    first, second = bench.new(), bench.new()
    named = f"{times} time(s) to rank {rank} behind step {step} (injection {number}): "
    with Group(first, fine_tune, WORLD, program) as group:
        deadline = time.monotonic() + 60
        while (group.steps(rank) or [0])[-1] < step and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        for _ in range(times):
            group.send(rank, signal.SIGUSR2)
            # The others come when the first has long been noticed: in the save, or behind it.
            time.sleep(random.random() * 0.1)
            rank = random.randrange(WORLD)
        codes = group.wait(grace=30)
        row.injected += 1
        row.check(codes == [PREEMPTED] * WORLD, f"{named}exit codes {codes}: {group.last_words()}")
        stopped = {group.steps(rank)[-1] for rank in range(WORLD)}
        saved = program.checkpoints.folders()
        at = saved[0][0] if saved else None
        said = [f"saved behind step {at}" in group.said(rank) for rank in range(WORLD)]
    row.check(stopped == {at}, f"{named}ranks stopped at the steps {stopped}, and the checkpoint is of step {at}")
    row.check(all(said), f"{named}not every rank says behind which step it saved")
    if not saved:
        row.lost = (row.lost or 0) + 1
        return
    row.check(verify(saved[0][1])["extra"]["step"] == at, f"{named}the marker says another step than {at}")
    with Group(second, fine_tune, WORLD, program) as group:
        outcomes = group.results()
    row.check(outcomes[0].started == at, f"{named}went on behind step {outcomes[0].started} instead of {at}")
    row.check([one.digest for one in outcomes] == [one.digest for one in expected], f"{named}ended with other weights")
    row.check(outcomes[0].losses == expected[0].losses, f"{named}had other losses")
    row.replay((at or 0) - outcomes[0].started)
    bench.say(f"  {named}saved step {at}, {time.monotonic() - started:.1f} s")
    shutil.rmtree(program.run)
    bench.drop(first, second)
