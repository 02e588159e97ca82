"""What a sweep's finished trials say, gathered from their folders: figures per combination, the front, the choice."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.pareto import pareto_front
from grasp_dist.evaluation.runs import RunRecord
from grasp_dist.evaluation.summary import summarise_runs
from grasp_dist.evaluation.verdict import NO_DRIFT, TASK_POINTS, TASK_SHARE
from grasp_dist.graph import RunGraph
from grasp_dist.launch.sweep.grid import Trial, arms_of, trials_of
from grasp_dist.launch.sweep.pareto import Outcome, recommend

__all__ = ["gather", "objectives"]


def gather(config: RunConfig) -> dict[str, Any]:
    """Everything that the sweep's page says in figures, as plain JSON; docs/sweeps.md describes it.

    config: expanded. Trials that are not finished are named under "missing" and left out of the means. Raises
    `InputError` while there is no probe of each role, or neither base nor a single trial.
    """
    graph = RunGraph(config)
    models, missing = [], []
    probes: list[dict[str, Any]] = []
    for task in graph.tasks(("evaluate",)):
        if graph.is_stale(task):
            missing.append(task.name)
            continue
        row = json.loads(task.path.read_text(encoding="utf-8"))
        probes = row.pop("probe_kinds")
        models.append(row)
    if not probes:
        raise InputError(f"no evaluation in {graph.root} is finished, so there is nothing to show yet")
    record = RunRecord(graph.root.absolute().name, graph.root, "", {}, probes, models)
    summary = summarise_runs([record], task=config.report.task, drift=config.report.drift)
    task_probe, drift_probe = (_probe(summary, role) for role in ("task", "drift"))
    by_name = {model["model"]: model for model in summary["models"]}
    if "base" not in by_name:
        raise InputError(f"the base model's evaluation in {graph.root} is not finished; run the same command again")
    references = {name: _row(by_name[name], summary) for name in ("base", "naive") if name in by_name}
    combinations = [
        {**asdict(arm), **_row(by_name[arm.name], summary)} for arm in arms_of(config) if arm.name in by_name
    ]
    outcomes = [outcome(row, references["base"], task_probe) for row in combinations if not row["control"]]
    front = pareto_front([one.task for one in outcomes], [one.drift for one in outcomes])
    on_front = {one.name for one, kept in zip(outcomes, front, strict=True) if kept}
    for row in combinations:
        row["distance"] = _distance(row, references["base"])
        row["on_front"] = row["name"] in on_front
        row["diverged"] = _diverged(row)
    tolerance = _tolerance(task_probe, references)
    naive = references.get("naive", {}).get("task")
    choice = recommend(outcomes, naive=naive and _turned(naive["mean"], task_probe), tolerance=tolerance)
    if not drifted(references):
        choice = None
        for row in combinations:
            row["remaining"] = row["worst_remaining"] = None
    return {
        "format": 1,
        "run": str(graph.root),
        "title": config.report.title,
        "task": task_probe,
        "drift": drift_probe,
        "seeds": config.training.seeds,
        "references": references,
        "combinations": combinations,
        "tolerance": tolerance,
        "choice": choice and asdict(choice),
        "missing": missing,
        "num_trials": len(trials_of(config)),
        "detection": summary["detection"],
    }


def objectives(config: RunConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """{"task": higher is better, "drift": distance from the base} of one arm's finished trials, means over their seeds;
    NaN where nothing finite was measured."""
    found = gather(config)
    seeds = {trial.seed for trial in trials}
    row = next((row for row in found["combinations"] if row["name"] == trials[0].arm), None)
    points = [one for one in row["seeds"] if one["seed"] in seeds] if row else []
    base = found["references"]["base"]["drift"]
    values: dict[str, list[float]] = {axis: [one[axis] for one in points] for axis in ("task", "drift")}
    if not points or base is None or None in [*values["task"], *values["drift"]]:
        return {"task": math.nan, "drift": math.nan}
    return {
        "task": _turned(statistics.fmean(values["task"]), found["task"]),
        "drift": abs(statistics.fmean(values["drift"]) - base["mean"]),
    }


def drifted(references: Mapping[str, Any]) -> bool:
    """Whether the naive fine-tune moved the drift; else there is nothing to remove, and no combination to prefer. True
    while that is not known."""
    naive, base = (references.get(name, {}).get("drift") for name in ("naive", "base"))
    return naive is None or base is None or abs(naive["mean"] - base["mean"]) >= NO_DRIFT


def outcome(row: Mapping[str, Any], base: Mapping[str, Any], task_probe: Mapping[str, Any]) -> Outcome:
    """A combination's figures as the choice looks at them; NaN if any of its seeds diverged."""
    distance = _distance(row, base)
    lost = distance is None or row["task"] is None or bool(_diverged(row))
    task, drift = row["task"], row["drift"] or {"sd": None, "n": 0}
    return Outcome(
        name=row["name"],
        side=row["side"],
        rank=row["rank"],
        task=math.nan if lost else _turned(task["mean"], task_probe),
        drift=math.nan if lost or distance is None else distance,
        seeds=max(1, drift["n"]),
        drift_sd=None if lost else drift["sd"],
    )


def _diverged(row: Mapping[str, Any]) -> list[int]:
    """The seeds that were evaluated, and of which something is not finite."""
    return [one["seed"] for one in row["seeds"] if None in (one["task"], one["drift"])]


def _distance(row: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    if row["drift"] is None or base["drift"] is None:
        return None
    return abs(row["drift"]["mean"] - base["drift"]["mean"])


def _turned(value: float, probe: Mapping[str, Any]) -> float:
    """So that more is better: a loss is a task measure of which less is."""
    return -value if probe["worst_is_high"] else value


def _probe(summary: Mapping[str, Any], role: str) -> dict[str, Any]:
    name = summary[role]
    found = next((probe for probe in summary["probes"] if probe["name"] == name), None)
    if found is None:
        raise InputError(
            f"a sweep compares task and drift, but evaluate.probes has no probe of role {role}; docs/probes.md shows "
            "how to add one"
        )
    return found


def _row(model: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """One model's figures on the two axes, and each seed's."""
    task, drift = summary["task"], summary["drift"]
    cut = model["drift_cuts"].get(drift, {}).get("summary")
    seeds = [
        {"seed": row["seed"], "task": _value(row, task), "drift": _value(row, drift)}
        for row in summary["rows"]
        if row["model"] == model["model"]
    ]
    return {
        "label": model["label"],
        "task": model["probes"].get(task),
        "drift": model["probes"].get(drift),
        "remaining": cut and cut["remaining"],
        "worst_remaining": cut and cut["worst_remaining"],
        "seconds": model["seconds"],
        "residual": model["residual"],
        "seeds": seeds,
    }


def _value(row: Mapping[str, Any], probe: str) -> float | None:
    return row["probes"].get(probe, {}).get("value")


def _tolerance(probe: Mapping[str, Any], references: Mapping[str, Any]) -> float:
    """How far below naive the task still counts as kept: the report's own bar."""
    if probe["kind"] == "completion":
        return TASK_POINTS
    base, naive = (references.get(name, {}).get("task") for name in ("base", "naive"))
    return (1 - TASK_SHARE) * abs(naive["mean"] - base["mean"]) if base and naive else 0.0
