"""A sweep on this machine: what all trials share, then one trial after the other, then the report and the page.

All state is in the run directory: what is finished there is never done again, so the same command goes on wherever it
was stopped. `begin`, `unfinished` and `finish` are what a sweep in Ray has in common with this one.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from grasp_dist.config import RunConfig, TuneConfig
from grasp_dist.errors import FORCED_OUT, PREEMPTED, InputError, Preempted
from grasp_dist.graph import RunGraph
from grasp_dist.launch.sweep.grid import (
    Trial,
    arms_of,
    every_combination,
    restrict,
    shared_tasks,
    trials_of,
)
from grasp_dist.launch.sweep.page import build_page
from grasp_dist.launch.sweep.results import objectives
from grasp_dist.stages import prepare, start, work

__all__ = ["SHARED", "TRIAL", "begin", "finish", "finished_arms", "fixed_trials", "run_sweep", "unfinished"]

SHARED, TRIAL = ("naive", "detect", "evaluate"), ("project", "evaluate")
"""The stages of the tasks that all trials share, and of a trial's."""
_REFRESH = 30.0
"""Seconds after which the page of an unfinished sweep is written anew."""
# Exit codes that concern more than one trial: a wrong setting, or somebody who wants it to stop.
_STOPS = (2, PREEMPTED, FORCED_OUT, 130)


def run_sweep(config: RunConfig, *, nproc: int = 1, dry_run: bool = False, command: str = "") -> None:
    """The whole sweep in this process, or in N that it starts for each trial.

    command: how it was called, for the page. Raises `InputError` if trials failed, naming them; the others are then
    finished and shown.
    """
    whole = begin(config, dry_run=dry_run)
    if dry_run:
        return
    tune = config.tune
    assert tune is not None
    if shared := unfinished(whole, SHARED, shared_tasks(whole)):
        start(whole, SHARED, nproc=nproc, only=shared)
    proposed = None
    if tune.search == "optuna":
        _in_turn(whole, fixed_trials(whole), nproc, command)
        proposed = _search(whole, tune, nproc, command)
    else:
        _in_turn(whole, trials_of(whole), nproc, command)
    finish(whole, proposed, command=command)


def begin(config: RunConfig, *, dry_run: bool) -> RunConfig:
    """The expanded configuration, checked, and the run directory made this run's; says what will run.

    Raises `InputError` for what would stop it, a configuration without `tune`, and a call under torchrun.
    """
    tune = config.tune
    if tune is None:
        raise InputError(
            "this configuration has no section `tune`, so there is nothing to sweep over; give --tune.rank 1,2,4,8 "
            "(and --tune.side write,both --tune.seed 0,1), or use `grasp-dist run`"
        )
    if "WORLD_SIZE" in os.environ:
        raise InputError("a sweep starts the processes of each trial itself; call it without torchrun, with --nproc N")
    whole = every_combination(config)
    prepare(whole, (*SHARED, "project"), dry_run=dry_run)
    swept = [arm for arm in arms_of(whole) if not arm.control]
    seeds = whole.training.seeds
    chosen = "" if tune.search == "grid" else f", of which {tune.search} tries up to {tune.trials}"
    print(
        f"sweep: {len(swept)} combinations of side and rank x {len(seeds)} seeds{chosen}, with "
        f"{len(whole.project.arms) - len(swept)} arms beside them; one detection ({whole.detect.method}, side "
        f"{whole.detect.side}, ranks up to {max(arm.rank for arm in swept)})",
        flush=True,
    )
    return whole


def unfinished(config: RunConfig, stages: tuple[str, ...], names: Collection[str]) -> list[str]:
    """Those of the named tasks that have to run, in order, with those that follow another that has to."""
    graph = RunGraph(config)
    return [task.name for task in graph.tasks(stages) if task.name in names and graph.is_stale(task)]


def fixed_trials(config: RunConfig) -> list[Trial]:
    """The trials that no search chooses: random controls, and unprotected full fine-tunes."""
    swept = {arm.name for arm in arms_of(config) if not arm.control}
    return [trial for trial in trials_of(config) if trial.arm not in swept]


def finish(config: RunConfig, proposed: Collection[str] | None, *, command: str) -> None:
    """The report and the sweep's page, of what is finished; raises `InputError` if something is not, naming it.

    proposed: the arms that a search chose to try; None: all are to be there. Arms that were finished before stay.
    """
    if proposed is not None:
        fixed = {trial.arm for trial in fixed_trials(config)}
        config = restrict(config, fixed | {*proposed} | finished_arms(config))
        RunGraph(config).claim()
    names = [*shared_tasks(config), *(task for trial in trials_of(config) for task in trial.tasks)]
    missing = unfinished(config, (*SHARED, "project"), names)
    if not missing:
        work(config, ("report",), only=["report"])
    folder = Path(config.run_dir) / "sweep"
    build_page(config, folder, commands=[command])
    print(f"sweep: {(folder / 'sweep.html').resolve()}")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"not finished: {', '.join(missing[:5])}{more}; what stopped them is said above and in their "
            "manifest.json, the page leaves them out, and the same command tries them again"
        )


def finished_arms(config: RunConfig) -> set[str]:
    """The arms of which every trial is finished."""
    return {
        arm
        for arm in config.project.arms
        if not unfinished(config, TRIAL, [task for trial in _of(config, arm) for task in trial.tasks])
    }


def _in_turn(config: RunConfig, trials: Sequence[Trial], nproc: int, command: str) -> None:
    """One trial after the other. What stops one of them is said, and the next is begun."""
    waiting = [trial for trial in trials if unfinished(config, TRIAL, trial.tasks)]
    began = refreshed = time.monotonic()
    for place, trial in enumerate(waiting):
        left = (time.monotonic() - began) / place * (len(waiting) - place) if place else None
        about = "" if left is None else f", about {_duration(left)} left"
        print(f"trial {place + 1} of {len(waiting)}: {trial.name}{about}", flush=True)
        try:
            start(config, TRIAL, nproc=nproc, only=trial.tasks)
        except (InputError, Preempted):
            raise
        except SystemExit as stop:
            if stop.code in _STOPS:
                raise
        except Exception as error:
            print(f"{trial.name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if time.monotonic() - refreshed > _REFRESH:
            refreshed = time.monotonic()
            build_page(config, Path(config.run_dir) / "sweep", commands=[command])


def _search(config: RunConfig, tune: TuneConfig, nproc: int, command: str) -> set[str]:
    """`tune.trials` combinations, one after the other, each chosen by what those before it reached; returns their arms.

    The sampler's choices follow from its seed and those results, so a search that was stopped makes the same ones
    again, and what is finished of them costs nothing.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(
            "tune.search is 'optuna', which is not installed; `pip install 'grasp-dist[ray]'` brings it, or use "
            "--tune.search grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert tune.trials is not None
    names = {(arm.side, arm.rank): arm.name for arm in arms_of(config) if not arm.control}
    sides, ranks = ([*dict.fromkeys(key[axis] for key in names)] for axis in (0, 1))
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(3, tune.trials // 3))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    proposed = set()
    for _ in range(tune.trials):
        chosen = study.ask()
        arm = names[chosen.suggest_categorical("side", sides), chosen.suggest_categorical("rank", ranks)]
        proposed.add(arm)
        _in_turn(config, _of(config, arm), nproc, command)
        reached = objectives(config, _of(config, arm))
        if math.isfinite(reached["task"] + reached["drift"]):
            study.tell(chosen, [reached["task"], reached["drift"]])
        else:
            study.tell(chosen, state=optuna.trial.TrialState.FAIL)
    return proposed


def _of(config: RunConfig, arm: str) -> list[Trial]:
    return [trial for trial in trials_of(config) if trial.arm == arm]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
