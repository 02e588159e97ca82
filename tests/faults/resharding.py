"""Saved by so many ranks and continued by others: the state is equal after gathering, and so are the samples."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_dist.training.loop import LoopState
from tests.faults.group import Group
from tests.faults.program import BATCH, Program, example_number, fine_tune, whole_state
from tests.faults.table import Bench, Row

__all__ = ["run"]

WORLDS = (1, 2, 3, 4)
STRATEGIES = ("fsdp2", "zero2", "zero3")
STEPS, SAVED = 8, 4
RESIDUAL = 1e-6


@dataclass
class Continued:
    """What a rank saw."""

    started: int = 0
    differing: list[str] = field(default_factory=list)
    """Names of what is not bit for bit as it was when it was saved."""
    compared: int = 0
    residual: float = 0.0
    losses: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    """By step, the examples that this rank's model was given, in their order."""


def run(bench: Bench) -> list[Row]:
    """Every pair of world sizes in each layout, and every pair of layouts from 2 ranks to 3."""
    cases = [(layout, layout, one, two) for layout in STRATEGIES for one in WORLDS for two in WORLDS]
    cases += [(one, two, 2, 3) for one in STRATEGIES for two in STRATEGIES if one != two]
    cases = bench.pick(cases)
    same = Row("saved at one world size, continued at another (1, 2, 3, 4 ranks; fsdp2, zero2, zero3)")
    other = Row("saved by one layout, continued by another (fsdp2, zero2, zero3)")
    saved: dict[tuple[str, int], Program] = {
        key: Program(bench.model, bench.new(), strategy=key[0], steps=STEPS, every=SAVED, recorded=False)
        for key in dict.fromkeys((strategy, world) for strategy, _, world, _ in cases)
    }
    straight = Program(bench.model, bench.new(), steps=STEPS, every=None, recorded=False)
    with Group(bench.new(), _saves, 1, [straight], None) as group:
        expected = _order([group.results()[0]])
    for world in WORLDS:
        programs = [program for (_, size), program in saved.items() if size == world]
        if programs:
            with Group(bench.new(), _saves, world, programs, SAVED) as group:
                group.results()
    for world in WORLDS:
        chosen = [case for case in cases if case[3] == world]
        if not chosen:
            continue
        started = time.monotonic()
        runs = [(replace(saved[case[0], case[2]], strategy=case[1]), saved[case[0], case[2]].run) for case in chosen]
        with Group(bench.new(), _continues, world, runs) as group:
            by_rank = group.results()
        for number, case in enumerate(chosen):
            row = same if case[0] == case[1] else other
            _check(row, case, [found[number] for found in by_rank], expected)
            bench.say(f"  {case[0]} on {case[2]} -> {case[1]} on {case[3]}: residual {by_rank[0][number].residual:.1e}")
        bench.say(f"  {time.monotonic() - started:.1f} s")
    for row in (same, other):
        row.outcome = f"weights, moments, pins bitwise equal after gathering; residual <= {RESIDUAL:g}; same samples"
    return [row for row in (same, other) if row.injected]


def _check(row: Row, case: tuple[str, str, int, int], seen: list[Continued], expected: list[list[int]]) -> None:
    one, two, before, after = case
    named = f"{one} on {before} -> {two} on {after}: "
    row.injected += 1
    for rank, found in enumerate(seen):
        row.check(found.started == SAVED, f"{named}rank {rank} went on behind step {found.started}")
        row.check(not found.differing, f"{named}rank {rank}: {len(found.differing)} differ, {found.differing[:3]}")
        row.check(found.compared > 20, f"{named}rank {rank} compared {found.compared} tensors")
        row.check(found.residual <= RESIDUAL, f"{named}residual {found.residual}")
        row.check(found.losses == seen[0].losses, f"{named}ranks had other losses")
    order = _order([found.samples for found in seen])
    row.check(order == expected[SAVED:], f"{named}saw the samples {order} instead of {expected[SAVED:]}")
    row.replay(SAVED - seen[0].started)


def _order(by_rank: list[list[list[int]]]) -> list[list[int]]:
    """The global order of each step's samples: rank r takes every world-size-th one."""
    world = len(by_rank)
    return [[steps[place % world][place // world] for place in range(BATCH)] for steps in zip(*by_rank, strict=True)]


class _Saved(Exception):
    pass


def _saves(programs: list[Program], until: int | None) -> list[list[int]]:
    """Train until behind the save, and keep beside it what the state was; the samples of the last run."""
    samples: list[list[int]] = []
    for program in programs:
        samples.clear()
        watch = _Samples(samples)

        def on_step(step: int, state: LoopState, program: Program = program, watch: _Samples = watch) -> None:
            watch.next()
            if step == until:
                torch.save(whole_state(state.engine, state.projector), _kept(program.run))
            if until is not None and step > until:
                raise _Saved

        try:
            fine_tune(program, on_start=watch.start, on_step=on_step)
        except _Saved:
            continue
        assert until is None
    return samples


def _continues(runs: list[tuple[Program, Path]]) -> list[Continued]:
    found = []
    for program, before in runs:
        continued = Continued()
        watch = _Samples(continued.samples)

        def on_start(
            state: LoopState, continued: Continued = continued, watch: _Samples = watch, before: Path = before
        ) -> None:
            saved: dict[str, Tensor] = torch.load(_kept(before))
            own = whole_state(state.engine, state.projector)
            continued.compared = len(own)
            continued.differing = sorted(
                name
                for name in own.keys() | saved.keys()
                if name not in own or name not in saved or not torch.equal(own[name].view(-1), saved[name].view(-1))
            )
            watch.start(state)

        outcome = fine_tune(program, on_start=on_start, on_step=lambda *_, watch=watch: watch.next())
        continued.started, continued.losses, continued.residual = outcome.started, outcome.losses, outcome.residual
        found.append(continued)
    return found


def _kept(run: Path) -> Path:
    return run / "state-of-all-ranks.pt"


class _Samples:
    """Which examples reach the model, by what they begin with."""

    def __init__(self, steps: list[list[int]]) -> None:
        self._steps, self._step = steps, list[int]()

    def start(self, state: LoopState) -> None:
        state.engine.module.register_forward_pre_hook(self._see, with_kwargs=True)

    def next(self) -> None:
        self._steps.append(self._step)
        self._step = []

    def _see(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self._step += [example_number(*row[:2]) for row in keywords["input_ids"].tolist()]
