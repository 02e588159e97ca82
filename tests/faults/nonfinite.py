"""A loss or gradient that is NaN on one rank: seen by all, left out as often as was allowed, and then named."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from grasp_dist.errors import InputError
from grasp_dist.training.batches import GlobalOrder
from grasp_dist.training.loop import LoopState
from tests.faults.group import Group
from tests.faults.program import BATCH, Outcome, Program, digest, examples, fine_tune
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLD = 2
SICK = 9
"""The first step that is not finite; a checkpoint was made behind step 8."""
GOOD = 8


@dataclass(frozen=True)
class Case:
    program: Program
    what: str
    rank: int
    steps: int
    """How many are sick; more than are allowed, or as many."""


@dataclass
class Seen:
    message: str = ""
    skipped: list[int] = field(default_factory=list)
    unchanged: bool = True
    """Whether the weights stayed as before the first sick step, in those that were left out."""
    losses: list[float] = field(default_factory=list)


def run(bench: Bench) -> list[Row]:
    row = Row("NaN in the loss or the gradient of one rank")
    healthy = Program(bench.model, bench.new(), recorded=False)
    cases = bench.pick([
        Case(
            Program(
                bench.model, bench.new(), strategy=strategy, max_skipped_steps=allowed, recorded=False,
                background=rank == 1,
            ),
            what, rank, allowed + more,
        )
        for strategy in ("fsdp2", "zero2")
        for what in ("loss", "gradient")
        for rank in range(WORLD)
        for allowed, more in ((0, 1), (2, 1), (2, 0))
    ])  # fmt: skip
    with Group(bench.new(), _all_sick, WORLD, cases) as group:
        sick = group.results()
    references = {strategy: replace(healthy, run=bench.new(), strategy=strategy) for strategy in ("fsdp2", "zero2")}
    again = [case.program for case in cases]
    with Group(bench.new(), _healthy, WORLD, [*references.values(), *again]) as group:
        by_rank = group.results()
    expected = {name: [outcomes[number] for outcomes in by_rank] for number, name in enumerate(references)}
    for number, case in enumerate(cases):
        allowed = case.program.max_skipped_steps
        named = f"{case.program.strategy}, {case.what} of rank {case.rank}, {case.steps} steps, {allowed} allowed: "
        seen = [found[number] for found in sick]
        row.injected += 1
        row.check(seen[0].message == seen[1].message, f"{named}ranks say {[one.message for one in seen]}")
        skipped = list(range(SICK, SICK + case.steps))
        if case.steps > allowed:
            _check_message(row, named, seen[0].message, case, skipped[-1])
            row.check(all(one.unchanged for one in seen), f"{named}the weights changed")
            rest = [outcomes[len(references) + number] for outcomes in by_rank]
            whole = expected[case.program.strategy]
            row.check(rest[0].started == GOOD, f"{named}went on behind step {rest[0].started}")
            same = [one.digest for one in rest] == [one.digest for one in whole] and rest[0].losses == whole[0].losses
            row.check(same, f"{named}continued without the fault, it ended with other weights")
            row.replay(skipped[-1] - 1 - rest[0].started)
        else:
            row.check(not seen[0].message, f"{named}stopped: {seen[0].message}")
            row.check(all(one.skipped == skipped for one in seen), f"{named}left out {[one.skipped for one in seen]}")
            row.check(all(len(one.losses) == case.program.steps for one in seen), f"{named}did not go to the end")
        bench.say(f"  {named}{'stopped' if seen[0].message else 'went on'}")
    row.outcome = "seen by all ranks, left out as allowed, then stopped naming samples and the last good checkpoint"
    return [row]


def _check_message(row: Row, named: str, message: str, case: Case, step: int) -> None:
    order = GlobalOrder(len(examples()), 7)
    ids = order.samples((step - 1) * BATCH, BATCH)
    folder = case.program.checkpoints.folder(GOOD)
    row.check(message.startswith(f"step {step}: "), f"{named}another step: {message}")
    row.check(f"{case.steps} time(s) in a row" in message, f"{named}another count: {message}")
    row.check(str(folder) in message, f"{named}the last good checkpoint is not named: {message}")
    told = re.search(r"examples ([\d, ]+) \(", message)
    found = [int(number) for number in told[1].split(",")] if told else []
    row.check(found == ids, f"{named}samples {found} instead of {ids}")


def _all_sick(cases: list[Case]) -> list[Seen]:
    return [_sick(case) for case in cases]


def _sick(case: Case) -> Seen:
    seen = Seen()
    now = [0]
    before: list[str] = []

    def poison(module: Any, arguments: Any, output: Any) -> Any:
        if dist.get_rank() == case.rank and SICK <= now[0] < SICK + case.steps:
            if case.what == "loss":
                output.logits = output.logits * float("nan")
            else:
                output.logits.register_hook(lambda gradient: gradient * float("nan"))
        return output

    def on_start(state: LoopState) -> None:
        now[0] = state.step + 1
        state.engine.module.register_forward_hook(poison)

    def on_step(step: int, state: LoopState) -> None:
        now[0] = step + 1
        seen.skipped = list(state.skipped)
        if step == SICK - 1:
            before.append(digest(state.engine, None))
        elif SICK <= step < SICK + case.steps:
            seen.unchanged = seen.unchanged and digest(state.engine, None) == before[0]

    try:
        seen.losses = fine_tune(case.program, on_start=on_start, on_step=on_step).losses
    except InputError as error:
        seen.message = str(error)
    return seen


def _healthy(programs: list[Program]) -> list[Outcome]:
    return [fine_tune(replace(program, max_skipped_steps=0)) for program in programs]
