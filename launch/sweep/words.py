"""What a sweep's figures say, in sentences: the recommendation with its reason, the controls, and what is lacking.

The bars are those of the report (`grasp_dist.evaluation.verdict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from grasp_dist.evaluation.verdict import CONTROL, PARTLY, REMOVED, WORST, Verdict, number
from grasp_dist.launch.sweep.results import drifted

__all__ = ["RULE", "state"]

RULE = (
    "Rule: of the combinations that keep the task (no more than {tolerance} below naive), those with the least drift, "
    "to within one standard error of what seeds alone make; of these the smallest rank, and one side before both. "
    "Scatter is pooled over the combinations that are compared. So one that is not on the Pareto front, but no "
    "further from it than seeds make, may be recommended."
)


def state(found: Mapping[str, Any]) -> Verdict:
    """The recommendation on the results of `gather`, and why."""
    choice, references = found["choice"], found["references"]
    rows = {row["name"]: row for row in found["combinations"]}
    lacking = _lacking(found)
    naive, base = references.get("naive"), references["base"]
    if naive is None:
        return Verdict("void", "Nothing to compare with", "No naive fine-tune has finished yet.", lacking)
    if any(model[axis] is None for model in (naive, base) for axis in ("task", "drift")):
        whose = "naive fine-tune" if None not in (base["task"], base["drift"]) else "base model"
        return Verdict(
            "void", "Nothing to compare with", f"No finite figures were measured of the {whose}: it diverged.", lacking
        )
    if not drifted(references):
        return Verdict(
            "void",
            "No drift to remove",
            f"The naive fine-tune hardly moved {found['drift']['name']} ({number(base['drift']['mean'])} in the base, "
            f"{number(naive['drift']['mean'])} after it), so no rank can be told from another.",
            lacking,
        )
    if choice is None:
        return Verdict("void", "Nothing to choose from", "No trial has finished with finite figures yet.", lacking)
    row = rows[choice["name"]]
    apostrophe = "\N{RIGHT SINGLE QUOTATION MARK}"
    headline = (
        f"{_called(row)}: drift from {number(naive['drift']['mean'])} to {number(row['drift']['mean'])} (base "
        f"{number(base['drift']['mean'])}), task {number(row['task']['mean'])} against naive{apostrophe}s "
        f"{number(naive['task']['mean'])}."
    )
    inert, about_control = _controls(found, row)
    level, label = _level(row, choice, inert)
    notes = [*_why(found, rows), about_control, *_edge(found, row), *lacking]
    return Verdict(level, label, headline, [note for note in notes if note])


def _level(
    row: Mapping[str, Any], choice: Mapping[str, Any], inert: bool
) -> tuple[Literal["good", "mixed", "bad", "void"], str]:
    left, worst = row["remaining"], row["worst_remaining"]
    if not choice["keeps_task"]:
        return "bad", "No rank keeps the task"
    if left is None or left > PARTLY:
        return "bad", "No rank removes the drift"
    several = row["drift"]["n"] > 1
    label = f"Recommended: {row['side']}, rank {row['rank']}"
    if left <= REMOVED and worst <= WORST and inert and several:
        return "good", label
    return "mixed", label if several else f"{label} (one seed)"


def _why(found: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    choice = found["choice"]
    row = rows[choice["name"]]
    if choice["keeps_task"]:
        notes = [
            f"{_called(row)} keeps the task (at most {number(found['tolerance'])} below naive), and "
            f"{_share(row)} of the naive drift is left."
        ]
    else:
        notes = [
            "No combination keeps the task, so this is the one with the least drift among those with the "
            "best task: blocking so many directions costs what was to be learnt."
        ]
    if choice["tied"]:
        least = rows[choice["least"]]
        more = row["distance"] - least["distance"]
        notes.append(
            f"{_called(least)} has less drift still ({number(least['drift']['mean'])}), but by {number(more)} only, "
            f"which is within one standard error of what seeds alone make ({number(choice['noise'])}): the smaller "
            "one does as well, and takes less away."
        )
    else:
        smaller = [
            other
            for other in found["combinations"]
            if other["name"] in choice["compared"]
            and (other["rank"], other["side"] == "both") < (row["rank"], row["side"] == "both")
        ]
        if smaller:
            next_best = min(smaller, key=lambda other: other["distance"])
            more = f"{number(next_best['distance'] - row['distance'])} more"
            if choice["noise"] is not None:
                more += f", where one standard error of the seeds' scatter is {number(choice['noise'])}"
            notes.append(
                f"Of the smaller ones {_called(next_best, first=False)} comes nearest, with {_share(next_best)} of the "
                f"drift left: {more}."
            )
    return notes


def _controls(found: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the random control beside the chosen one is inert, and the sentence about it."""
    controls = [c for c in found["combinations"] if c["control"] and c["remaining"] is not None]
    same = [c for c in controls if c["side"] == row["side"] and c["rank"] >= row["rank"]]
    if not same:
        return False, (
            "No random basis of this side has finished, so it is not shown that the effect belongs to the directions "
            "that were found."
        )
    control = min(same, key=lambda c: c["rank"])
    task = control["task"] and control["task"]["mean"]
    what = f"A random basis ({control['side']}, rank {control['rank']})"
    if abs(1 - control["remaining"]) < CONTROL:
        return True, (
            f"{what} leaves {_share(control)} of the drift and a task of {number(task)}: the effect "
            "belongs to the directions that were found."
        )
    return False, (
        f"{what} changes the drift as well ({_share(control)} of it left): part of the effect does not belong to the "
        "directions that were found."
    )


def _edge(found: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    ranks = [other["rank"] for other in found["combinations"] if not other["control"]]
    if row["rank"] == max(ranks) and len(set(ranks)) > 1:
        return [f"Rank {row['rank']} is the largest that was tried; a larger one may leave less."]
    return []


def _lacking(found: Mapping[str, Any]) -> list[str]:
    notes = []
    if len(found["seeds"]) < 2:
        notes.append(
            "One seed shows no scatter, so any difference counts; results of single seeds have reversed. Run at least "
            "two (--tune.seed 0,1)."
        )
    diverged = {row["name"]: row["diverged"] for row in found["combinations"] if row["diverged"]}
    if diverged:
        some = ", ".join(f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in diverged.items())
        notes.append(f"Diverged, so not recommended whatever their other seeds reached: {some}.")
    if found["missing"]:
        some = ", ".join(name.removeprefix("evaluate/") for name in found["missing"][:6])
        more = f" and {len(found['missing']) - 6} more" if len(found["missing"]) > 6 else ""
        notes.append(f"Not finished, and left out: {some}{more}. The same command goes on with them.")
    return notes


def _called(row: Mapping[str, Any], *, first: bool = True) -> str:
    side = {"write": "write side", "read": "read side", "both": "both sides"}[row["side"]]
    return f"{side.capitalize() if first else side}, rank {row['rank']}"


def _share(row: Mapping[str, Any]) -> str:
    return "an unknown share" if row["remaining"] is None else f"{row['remaining']:.0%}"
