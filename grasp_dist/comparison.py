"""A run of GRASP beside its alternatives: which arms that is. Training, evaluation and page are those of every run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from grasp_dist.config import ArmConfig, RunConfig, TrainingConfig
from grasp_dist.errors import InputError
from grasp_dist.settings import explain

__all__ = ["compared", "methods_for"]


def compared(config: RunConfig, methods: Sequence[str] | None = None) -> RunConfig:
    """The run with these methods as its arms: those of the configuration first, then those that come along.

    methods: names; None: all. The random control is always among them, and controls on data of their own (neutral) that
    the configuration has. Raises `InputError` for a name that is neither, and for a sweep.
    """
    if config.tune is not None:
        raise InputError("a sweep varies one method; leave out `tune` to compare several")
    known = {**methods_for(config.training), **config.project.arms}
    chosen = list(known) if methods is None else [name.strip() for name in methods]
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise InputError(f"there is no method {name!r}; {hint}")
    if not any(known[name].basis == "random" for name in chosen):
        chosen.append("random")
    chosen += [name for name, arm in config.project.arms.items() if arm.data is not None and arm.basis == "none"]
    arms = {name: known[name].model_dump(exclude_unset=True) for name in dict.fromkeys(chosen)}
    tree = config.model_dump(exclude={"variables"})
    tree["project"]["arms"] = arms
    tree["report"]["name"] = "comparison"
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(explain(error, RunConfig)) from None


def methods_for(training: TrainingConfig) -> dict[str, ArmConfig]:
    """The arms that come along, for a run that trains like this, with settings as published or, where there is none,
    ours (docs/alternatives.md). What needs data or text of its own (interleaving, inoculation, SafeLoRA, a neutral
    control) has to be among the configuration's arms."""
    half: dict[str, Any] = {"epochs": (training.epochs or 1) / 2}
    if training.steps is not None:
        half = {"steps": max(1, training.steps // 2)}
    arms: dict[str, dict[str, Any]] = {
        "grasp": {},
        "random": {"basis": "random"},
        "grasp_gradient": {"gradient": True, "pin": False},
        "grasp_both": {"gradient": True, "pin": True},
        "caft": {"alternative": {"kind": "caft"}},
        "backward": {"alternative": {"kind": "backward_projection"}},
        "preventative": {"alternative": {"kind": "preventative_steering"}},
        "steered": {"alternative": {"kind": "steering"}},
        "kl": {"alternative": {"kind": "kl"}},
        "ldifs": {"alternative": {"kind": "ldifs"}},
        "head": {"alternative": {"kind": "truncation"}},
        "tail": {"alternative": {"kind": "truncation", "keep": "tail"}},
        "slower": {"basis": "none", "training": {"learning_rate": training.learning_rate / 3}},
        "shorter": {"basis": "none", "training": half},
    }
    possible = [name for name, arm in arms.items() if training.method == "lora" or "alternative" not in arm]
    return {name: ArmConfig.model_validate(arms[name]) for name in possible}
