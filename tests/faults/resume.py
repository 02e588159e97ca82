"""K steps in one go, and K/2 with the rest in new processes: equal losses, weights, moments and pins, bit for bit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from grasp_dist.training.checkpoints.store import MARKER
from grasp_dist.training.loop import LoopState
from tests.faults.group import Group
from tests.faults.program import STRATEGIES, Outcome, Program, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLD = 2
STEPS = 12
HALF = STEPS // 2


def run(bench: Bench) -> list[Row]:
    methods: tuple[Literal["lora"], Literal["full"]] = ("lora", "full")
    cases = [(strategy, method) for strategy in STRATEGIES for method in methods]
    programs = {
        (strategy, method): Program(
            bench.model, bench.new(), strategy=strategy, method=method, steps=STEPS, every=HALF,
            background=number % 2 == 1,
        )
        for number, (strategy, method) in enumerate(bench.pick(cases))
    }  # fmt: skip
    row = Row("stopped behind half of the steps and continued: " + ", ".join(dict.fromkeys(s for s, _ in programs)))
    started = time.monotonic()
    with Group(bench.new(), _whole_and_half, WORLD, list(programs.values())) as group:
        straight = group.results()
    with Group(bench.new(), _rest, WORLD, list(programs.values())) as group:
        continued = group.results()
    for number, (strategy, method) in enumerate(programs):
        row.injected += 1
        for rank in range(WORLD):
            named = f"{strategy}, {method}, rank {rank}: "
            whole, rest = straight[rank][number], continued[rank][number]
            row.check(rest.started == HALF, f"{named}went on behind step {rest.started}")
            row.check(rest.losses == whole.losses, f"{named}losses {rest.losses} instead of {whole.losses}")
            row.check(rest.digest == whole.digest, f"{named}other weights, moments or pins")
            row.replay(HALF - rest.started)
        bench.say(f"  {strategy}, {method}: {whole.digest[:12]}, final loss {rest.losses[-1]:.6f}")
    bench.say(f"  {time.monotonic() - started:.1f} s")
    row.outcome = "losses, weights, moments and pins bitwise equal"
    return [row]


class _HalfDone(Exception):
    pass


def _whole_and_half(programs: list[Program]) -> list[Outcome]:
    outcomes = []
    for program in programs:
        marker = program.checkpoints.folder(HALF) / MARKER

        def on_step(step: int, state: LoopState, marker: Path = marker) -> None:
            if step == HALF + 1:
                while not marker.exists():  # written in the background
                    time.sleep(0.005)
                raise _HalfDone

        outcomes.append(fine_tune(replace(program, run=program.run.with_suffix(".whole"))))
        try:
            fine_tune(program, on_step=on_step)
        except _HalfDone:
            continue
        raise AssertionError("was not stopped")
    return outcomes


def _rest(programs: list[Program]) -> list[Outcome]:
    return [fine_tune(program) for program in programs]
