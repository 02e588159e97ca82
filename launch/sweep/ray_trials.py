"""A sweep in Ray: one Train run for what all trials share, then Tune's trials side by side, each a Train run too.

    Tuner(driver) --> driver of a trial --> TorchTrainer --> one process per worker, which calls `stages.work`

All results are in the run directory, on storage that every node sees, and a task is done by whoever finds it
unfinished. So a trial whose processes were lost goes on from its own checkpoints, and a sweep whose driver was killed
goes on with the same command: Tune's state (`<run_dir>/sweep/ray`) says which trials it has seen, the run directory
which are finished.

Ray's state is pickled. It is read again only where this user owns it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grasp_dist.config import RunConfig, TuneConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.sweep.grid import Trial, arms_of, shared_tasks, trials_of
from grasp_dist.launch.sweep.ray_groups import Group, await_free, connected, require_ray, room, train
from grasp_dist.launch.sweep.results import objectives
from grasp_dist.launch.sweep.run import SHARED, TRIAL, begin, finish, finished_arms, fixed_trials, unfinished
from grasp_dist.manifest import digest, set_aside

__all__ = ["restored", "run_ray_sweep"]


def run_ray_sweep(config: RunConfig, cluster: Cluster, *, dry_run: bool = False, command: str = "") -> None:
    """The whole sweep in a Ray cluster that runs, or with address `local` in one that is started on this machine.

    command: how it was called, for the page. Raises `InputError` if Ray is missing or cannot be reached, if it has no
    room for a trial, and if trials failed, naming them; the others are then finished and shown.
    """
    require_ray(cluster)
    whole = begin(config, dry_run=dry_run)
    if dry_run:
        return
    tune = config.tune
    assert tune is not None
    wanted = cluster.resources("train")
    group = Group(
        run_dir=str(Path(whole.run_dir).absolute()),
        workdir=str(Path.cwd()),
        num_workers=wanted.nodes * cluster.tasks_of("train"),
        cpus=float(wanted.cpus_per_task or 1),
        gpu=cluster.gpus_of("train") > 0,
        max_failures=tune.max_failures,
    )
    proposed = None if tune.search == "grid" else finished_arms(whole)
    shared = unfinished(whole, SHARED, shared_tasks(whole))
    if shared or any(unfinished(whole, TRIAL, trial.tasks) for trial in trials_of(whole)):
        with connected(cluster, group):
            if shared:
                _do_shared(whole, group, shared)
            at_once = tune.concurrent or room(group)
            if tune.search == "grid":
                _grid(whole, group, trials_of(whole), at_once)
            else:
                _grid(whole, group, fixed_trials(whole), at_once)
                proposed = _optuna(whole, tune, group, at_once)
    finish(whole, proposed, command=command)


def _do_shared(config: RunConfig, group: Group, tasks: Sequence[str]) -> None:
    print(f"first, what all trials share: {', '.join(tasks)}", flush=True)
    print(f"`grasp-dist status {shlex.quote(config.run_dir)}` shows how far each task is", flush=True)
    try:
        train(group, "shared", SHARED, tasks)
    except Exception as error:
        if not (left := unfinished(config, SHARED, tasks)):
            return
        reason = next((why for task in left if (why := _said(config, task))), str(error))
        raise InputError(f"{left[0]} did not finish, and all trials need it: {reason}") from None


def _grid(config: RunConfig, group: Group, trials: Sequence[Trial], at_once: int) -> None:
    """All of these trials that are not finished."""
    import ray.tune

    by_name = {trial.name: (trial,) for trial in trials}
    folder = group.state / f"trials-{_inputs(config, trials, at_once)}"
    for _ in range(2):
        waiting = [trial.name for trial in trials if unfinished(config, TRIAL, trial.tasks)]
        if not waiting:
            return
        known = folder.exists()
        space = {"trial": ray.tune.grid_search(waiting)}
        ended = _tune(folder, group, lambda point: by_name[point["trial"]], space, max_concurrent_trials=at_once)
        if ended.num_errors or not known or not any(unfinished(config, TRIAL, trial.tasks) for trial in trials):
            return
        set_aside(folder)  # Ray takes trials for finished whose results are gone


def _optuna(config: RunConfig, tune: TuneConfig, group: Group, at_once: int) -> set[str]:
    """`tune.trials` combinations, each with every seed, chosen for more task and less drift; returns their arms."""
    import optuna
    import ray.tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert tune.trials is not None
    arms = [arm for arm in arms_of(config) if not arm.control]
    names = {(arm.side, arm.rank): arm.name for arm in arms}
    combinations = {key: tuple(t for t in trials_of(config) if t.arm == arm) for key, arm in names.items()}
    space = {
        axis: ray.tune.choice(list(dict.fromkeys(getattr(arm, axis) for arm in arms))) for axis in ("side", "rank")
    }
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(3, tune.trials // 3))
    folder = group.state / f"search-{tune.trials}-{_inputs(config, trials_of(config), at_once)}"
    proposed: set[str] = set()
    for _ in range(2):
        known = folder.exists()
        ended = _tune(
            folder,
            group,
            lambda point: combinations[point["side"], point["rank"]],
            space,
            num_samples=tune.trials,
            search_alg=OptunaSearch(metric=["task", "drift"], mode=["max", "min"], sampler=sampler),
            max_concurrent_trials=at_once,
        )
        proposed = {names[result.config["side"], result.config["rank"]] for result in ended if result.config}
        if ended.num_errors or not known or proposed <= finished_arms(config):
            break
        set_aside(folder)  # Ray takes combinations for finished whose results are gone
    return proposed


def _tune(
    folder: Path, group: Group, trials_at: Callable[[Any], tuple[Trial, ...]], space: dict[str, Any], **how: Any
) -> Any:
    """Run Tune's trials, or go on with those whose state is in `folder`; returns Tune's `ResultGrid`.

    trials_at: the sweep's trials that a point of the search space stands for.
    """
    from ray import tune

    def drive(point: dict[str, Any]) -> None:
        config = group.config()
        trials = trials_at(point)
        for trial in trials:
            await_free(group, trial.tasks)
            if left := unfinished(config, TRIAL, trial.tasks):
                train(group, trial.name, TRIAL, left)
        tune.report(objectives(config, trials))

    # A driver only waits, and takes no CPU from the trials: it asks for one byte, since it has to ask for something.
    # One that has finished takes the next trial: a process less to start.
    driver = tune.with_resources(drive, {"memory": 1})
    tuner = restored(folder, driver)
    if tuner is None:
        tuner = tune.Tuner(
            driver,
            param_space=space,
            tune_config=tune.TuneConfig(
                trial_name_creator=_called, trial_dirname_creator=_folder_name, reuse_actors=True, **how
            ),
            run_config=tune.RunConfig(
                name=folder.name, storage_path=str(folder.parent), callbacks=[_progress()], verbose=0
            ),
        )
    return tuner.fit()


def _called(trial: Any) -> str:
    return "-".join(str(value) for value in trial.config.values())


def _folder_name(trial: Any) -> str:
    return f"{_called(trial)}_{trial.trial_id}"


def restored(folder: Path, driver: Any) -> Any:
    """The Tuner whose state lies in `folder`; None if there is none that can be used, which is then set aside.

    Raises `InputError` for state of another user: it is pickled.
    """
    from ray import tune

    if not tune.Tuner.can_restore(str(folder)):
        return None
    if any(path.stat().st_uid != os.getuid() for path in (folder, *folder.iterdir())):
        raise InputError(
            f"{folder} holds Ray's state of another user. It is pickled, so reading it would run whatever code is in "
            "it; move it away, and finished trials are known all the same"
        )
    try:
        tuner = tune.Tuner.restore(str(folder), trainable=driver, resume_errored=True)
    except Exception as error:  # cut off by the driver's end, or of another version of Ray
        print(f"Ray cannot go on from {folder} ({error}); finished trials are known all the same", file=sys.stderr)
        set_aside(folder)
        return None
    return tuner


def _progress() -> Any:
    """A line whenever a trial begins or ends."""
    from ray.tune import Callback

    class Progress(Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            print(f"{trial} begins", flush=True)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._ended(trials, trial, "has finished")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            why = str(trial.get_error() or "").strip().splitlines()
            self._ended(trials, trial, f"failed: {why[-1]}" if why else "failed")

        def _ended(self, trials: list[Any], trial: Any, what: str) -> None:
            ended = 1 + sum(other.is_finished() for other in trials if other is not trial)
            print(f"{trial} {what} ({ended} so far)", flush=True)

    return Progress()


def _inputs(config: RunConfig, trials: Sequence[Trial], at_once: int) -> str:
    """A name for what these trials are made from: another detection or setting makes it another experiment, and so does
    another number side by side, which Ray would not take on when it goes on with an old one."""
    names = {task for trial in trials for task in trial.tasks}
    tasks = RunGraph(config).tasks(("project",))
    return digest([{task.name: task.unit.inputs for task in tasks if task.name in names}, at_once])[:12]


def _said(config: RunConfig, name: str) -> str | None:
    """What a task's manifest says stopped it."""
    tasks = RunGraph(config).tasks(SHARED)
    return next((task.unit.manifest.get("error") for task in tasks if task.name == name), None)
