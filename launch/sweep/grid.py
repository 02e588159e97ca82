"""A sweep as an ordinary run: one arm per side and rank, each with its seeds, on a single detection. Needs no torch.

    tune: {rank: [1, 8], side: [write]}  ->  project.arms: {write-k1, write-k8, random-write-k8}

Rank k is the first k columns of the one basis, which is detected with every side and all the directions that any arm
needs. So `launch`, `status` and `report` work on a sweep as on any run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from grasp_dist.config import ArmConfig, RunConfig, TuneConfig
from grasp_dist.errors import InputError
from grasp_dist.graph import RunGraph
from grasp_dist.settings import explain

__all__ = ["Arm", "Trial", "arms_of", "every_combination", "expand", "restrict", "shared_tasks", "trials_of"]


@dataclass(frozen=True)
class Arm:
    """One combination: what its fine-tunes block."""

    name: str
    side: str
    rank: int
    control: bool
    """Blocks random directions: what the same cut costs and brings without having found anything."""


@dataclass(frozen=True)
class Trial:
    """One fine-tune of a sweep and its evaluation."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed-{self.seed}"

    @property
    def tasks(self) -> tuple[str, str]:
        """Names of its tasks in the run, in order."""
        return f"project/{self.arm}/seed-{self.seed}", f"evaluate/{self.arm}/seed-{self.seed}"


def expand(config: RunConfig) -> RunConfig:
    """The run that a configuration with `tune` stands for; one without is returned as it is.

    Raises `InputError` as `every_combination` does, and for a search, whose arms are not known before it has run.
    """
    if config.tune is None:
        return config
    if config.tune.search != "grid":
        raise InputError(
            f"tune.search is {config.tune.search!r}, which chooses each combination by what those before it reached, "
            "so its jobs cannot be planned ahead; use --tune.search grid, or `grasp-dist sweep`"
        )
    return every_combination(config)


def every_combination(config: RunConfig) -> RunConfig:
    """The run that has an arm for every side and rank of `tune`, which must be there.

    The varied arm's basis, training, gradient and pin stay. So do an unprotected full fine-tune beside full ones, which
    are compared with it, and controls on data of their own. `detect` is raised to the largest rank and to every side,
    and nothing is checked and made again. Raises `InputError` if the detection cannot find so many directions.
    """
    tune = config.tune
    assert tune is not None
    name = _varied(config, tune)
    template = config.project.arms[name]
    sides = tune.side or [config.project.side or config.detect.side]
    largest = max(tune.rank)

    def arm(side: str, rank: int, basis: str) -> dict[str, Any]:
        return {**template.model_dump(), "basis": basis, "side": side, "rank": rank}

    ranks = sorted(tune.rank)
    arms = {f"{side}-k{rank}": arm(side, rank, template.basis) for side in sides for rank in ranks}
    for side in sides:
        for rank in ranks if tune.controls == "every" else [largest]:
            arms[f"random-{side}-k{rank}"] = arm(side, rank, "random")
    if config.arm_training(name).method == "full":
        for other, settings in config.project.arms.items():
            if settings.basis == "none" and config.arm_training(other).method == "full":
                arms[other] = settings.model_dump()
    for other, settings in config.project.arms.items():
        if settings.data is not None and settings.basis == "none" and settings.alternative is None:
            arms[other] = settings.model_dump()
    tree = config.model_dump()
    tree["tune"] = None
    tree["training"]["seeds"] = tune.seed or config.training.seeds
    # With a side of null the ablation beside the arms takes every side that was found.
    # An arm that is checked and made again has other ranks than its own.
    tree["project"] |= {"arms": arms, "rank": largest, "check": None}
    tree["detect"] |= _detection(config, template, largest, sides)
    return _checked(tree)


def arms_of(config: RunConfig) -> list[Arm]:
    """The combinations among the arms of an expanded configuration, controls last."""
    settings = {name: RunGraph(config).arm_settings(name) for name in config.project.arms}
    arms = [
        Arm(name, own["side"], own["rank"], own["basis"] == "random")
        for name, own in settings.items()
        if own["basis"] != "none" and own["side"] is not None and own["rank"] is not None
    ]
    return sorted(arms, key=lambda arm: arm.control)


def trials_of(config: RunConfig) -> list[Trial]:
    """Every fine-tune of an expanded configuration's arms; the first seed of all before the second of any."""
    return [Trial(arm, seed) for seed in config.training.seeds for arm in config.project.arms]


def shared_tasks(config: RunConfig) -> list[str]:
    """Names of what is done once, before the trials: naive, detection, and the evaluation of all but the arms."""
    trials = {task for trial in trials_of(config) for task in trial.tasks}
    graph = RunGraph(config)
    return [task.name for task in graph.tasks(("naive", "detect", "evaluate")) if task.name not in trials]


def restrict(config: RunConfig, arms: Collection[str]) -> RunConfig:
    """An expanded configuration with these of its arms alone."""
    tree = config.model_dump()
    tree["project"]["arms"] = {name: arm for name, arm in tree["project"]["arms"].items() if name in arms}
    return _checked(tree)


def _varied(config: RunConfig, tune: TuneConfig) -> str:
    arms = config.project.arms
    if tune.arm is not None:
        if tune.arm not in arms:
            raise InputError(f"tune.arm is {tune.arm!r}, which is none of project.arms: {', '.join(arms)}")
        if arms[tune.arm].basis in ("random", "none"):
            raise InputError(
                f"tune.arm is {tune.arm!r}, whose basis is {arms[tune.arm].basis!r}: a sweep varies an arm that blocks "
                "what was found, and sets random controls beside it by itself; choose another"
            )
        return tune.arm
    found = next((name for name, arm in arms.items() if arm.basis not in ("random", "none")), None)
    if found is None:
        raise InputError(
            "a sweep varies the rank and side of an arm, but every one of project.arms has basis `random` or `none`; "
            "add one, e.g. `grasp: {}`"
        )
    return found


def _detection(config: RunConfig, template: ArmConfig, largest: int, sides: Collection[str]) -> dict[str, Any]:
    """The settings of `detect` that have to be others, so that one basis serves every arm."""
    detect = config.detect
    together = {detect.side, *sides}
    # The sweep is over the number of directions, so all of them have to be found.
    changed: dict[str, Any] = {"side": detect.side if together == {detect.side} else "both", "stop_gain": None}
    if "one_shot" in (detect.method, template.basis):
        lora = config.training.lora.rank
        if largest > lora and not detect.adapter:
            raise InputError(
                f"tune.rank goes up to {largest}, but one-shot detection reads a LoRA update of rank {lora}, which has "
                f"{lora} directions; sweep ranks up to {lora}, or raise training.lora.rank"
            )
        changed["rank"] = max(detect.rank, largest)
    rounds, each = detect.rounds, detect.directions_per_round
    if detect.method in ("warm", "restarted") and rounds * each < largest:
        raise InputError(
            f"tune.rank goes up to {largest}, but {detect.method} deflation will find {rounds * each} directions per "
            f"weight and side (detect.rounds {rounds}, detect.directions_per_round {each}); set detect.rounds to "
            f"{-(-largest // each)}, or sweep ranks up to {rounds * each}"
        )
    return changed


def _checked(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(explain(error, RunConfig)) from None
