"""What the figures say, in sentences: honest also when the method failed, the control moved, or data is short.

The bars are ours and printed with the verdict, so that a reader can disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grasp_dist.evaluation.runs import too_short
from grasp_dist.evaluation.summary import headline_arm

__all__ = ["BARS", "LEVEL_MARKS", "SHIFT_SHARE", "Verdict", "judge", "number"]

NO_DRIFT = 0.02
REMOVED, PARTLY, WORST = 0.25, 0.75, 0.5
TASK_POINTS, TASK_SHARE = 0.02, 0.95
CONTROL = 0.2
OVERSHOOT = -0.25
SHIFT_SHARE = 0.25
"""Of naive's shift on prompts without labels: a final run above it has failed (docs/detection.md)."""

BARS = (
    f"Bars: drift counts as removed when at most {REMOVED:.0%} of it remains in the mean and at most {WORST:.0%} in "
    f"every run; the task as kept when it is within {TASK_POINTS:g} of naive (probabilities) or {TASK_SHARE:.0%} of "
    f"what naive gained remains (other measures); the random control as inert when it changes the drift by less than "
    f"{CONTROL:.0%}."
)


LEVEL_MARKS = {"good": "\N{CHECK MARK}", "mixed": "\N{ALMOST EQUAL TO}", "bad": "\N{MULTIPLICATION X}", "void": "?"}


@dataclass
class Verdict:
    """level: "good" (every bar met), "mixed", "bad" (drift not removed, or task lost), "void" (nothing can be said)."""

    level: Literal["good", "mixed", "bad", "void"]
    label: str
    headline: str
    notes: list[str] = field(default_factory=list)


def number(value: float | None) -> str:
    """A figure with three sensible digits; an en dash for None."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.0005:
        return f"{value:.0e}".replace("e-0", "e-")
    text = f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def judge(summary: Mapping[str, Any]) -> Verdict:
    """The verdict on a summary of `summarise_runs`."""
    models = {model["model"]: model for model in summary["models"]}
    arm, drift = headline_arm(summary["models"]), summary["drift"]
    if not {"base", "naive"} <= models.keys() or arm is None or drift is None:
        lacking = [name for name in ("base", "naive") if name not in models]
        lacking += [] if arm else ["a protected fine-tune"]
        lacking += [] if drift else ["a drift probe"]
        return Verdict(
            "void", "Nothing to compare", f"These runs lack {_join(lacking)}, so there is no effect to report."
        )
    if lost := [name for name in ("base", "naive", arm["model"]) if drift not in models[name]["probes"]]:
        return Verdict("void", "Nothing to compare", f"No finite value of {drift} was measured for {_join(lost)}.")
    base, naive = (models[name]["probes"][drift]["mean"] for name in ("base", "naive"))
    screens = summary.get("screens") or {}
    if screens and len(screens) == len(summary["runs"]) and not any(found["found"] for found in screens.values()):
        return _nothing_found(list(screens.values()), drift, base, naive)
    cut = arm["drift_cuts"].get(drift, {}).get("summary")
    if cut is None or abs(naive - base) < NO_DRIFT:
        return Verdict(
            "void",
            "No drift to remove",
            f"The naive fine-tune hardly moved {drift} ({number(base)} in the base, {number(naive)} after it), so "
            "these runs say nothing about removing it.",
            _task_note(summary, arm),
        )
    return _judge_effect(summary, models, arm, cut)


def _nothing_found(screens: list[Mapping[str, Any]], drift: str, base: float, naive: float) -> Verdict:
    shared = max(screen["shared_shift"] for screen in screens)
    headline = (
        f"Fine-tunes on the two halves of the data move at most {number(shared)} of the probability on unrelated "
        f"prompts alike (threshold {number(screens[0]['threshold'])}), so nothing was blocked: the naive fine-tune is "
        "kept as it is."
    )
    notes = [f"{drift} is {number(naive)} after it, and {number(base)} in the base."]
    if abs(naive - base) >= NO_DRIFT:
        notes.append(
            "That is a drift all the same. If the probe is right, lower detect.screen.threshold, or leave "
            "detect.screen out, and run again."
        )
    return Verdict("void", "No factor found", headline, notes)


def _judge_effect(
    summary: Mapping[str, Any], models: Mapping[str, Any], arm: Mapping[str, Any], cut: Mapping[str, Any]
) -> Verdict:
    drift, task = summary["drift"], summary["task"]
    label = arm["label"]
    base, naive, now = (models[name]["probes"][drift]["mean"] for name in ("base", "naive", arm["model"]))
    left = cut["remaining"]
    what = "the drift" if drift == "drift" else f"the drift ({drift})"
    figures = f"from {number(naive)} to {number(now)} (base {number(base)})"
    kept = _task_kept(summary, arm)
    if left > 1.05:
        level, headline = "bad", f"{label} made {what} worse, {figures}."
        verdict_label = "Drift made worse"
    elif left > PARTLY:
        level, headline = "bad", f"{label} did not remove {what}: {left:.0%} of it is left, {figures}."
        verdict_label = "Drift not removed"
    else:
        times = f"cut {what} {cut['cut']:.1f}-fold" if cut["cut"] else f"removed {what} altogether"
        level, headline = "mixed", f"{label} {times}, {figures}."
        verdict_label = "Drift removed" if left <= REMOVED else "Drift partly removed"
    if task is not None and kept is not None:
        means = [models[name]["probes"][task]["mean"] for name in (arm["model"], "naive")]
        words = "It kept the task" if kept else "It lost part of the task"
        headline += f" {words}: {number(means[0])} against naive\N{RIGHT SINGLE QUOTATION MARK}s {number(means[1])}."
        verdict_label += ", task kept" if kept else ", task not kept"
        if (arm["task_change"]["share_of_gain"] or 0) < PARTLY and not kept:
            level = "bad"
    control = _control(summary)
    notes = [
        _worst_note(summary, arm, cut),
        _shift_note(models["naive"], arm),
        control[1],
        *_other_notes(summary, models, arm),
    ]
    if left < OVERSHOOT:
        notes.insert(0, f"{label} went beyond the base, by {-left:.0%} of the naive drift: that is a drift of its own.")
    if cut["undrifted"]:
        notes.append(f"{cut['undrifted']} of the runs are left out of the cut, because naive did not drift there.")
    several = cut["n"] > 1
    if not several:
        verdict_label += " (one seed)"
        notes.insert(
            0, "One fine-tune seed proves nothing: results of single seeds have reversed. Run at least two seeds."
        )
    met = left <= REMOVED and cut["worst_remaining"] <= WORST and left >= OVERSHOOT and bool(kept) and control[0]
    gone = [f"seed {row['seed']} of {row['run']}" for row in summary["diverged"] if row["model"] == arm["model"]]
    if gone:
        level, verdict_label = "bad", "Diverged in part"
        notes.insert(0, f"{label} diverged with {_join(gone)}, which the figures leave out.")
    if level == "mixed" and met and several:
        level = "good"
    return Verdict(level, verdict_label, headline, [note for note in notes if note])  # type: ignore[arg-type]


def _task_kept(summary: Mapping[str, Any], arm: Mapping[str, Any]) -> bool | None:
    change = arm["task_change"]
    if change is None:
        return None
    kind = next(probe["kind"] for probe in summary["probes"] if probe["name"] == summary["task"])
    if kind == "completion" and change["mean"] >= -TASK_POINTS:
        return True
    return kind != "completion" and (change["share_of_gain"] or 0) >= TASK_SHARE


def _task_note(summary: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    kept = _task_kept(summary, arm)
    return [] if kept is None else [f"{arm['label']} {'kept' if kept else 'did not keep'} the task."]


def _control(summary: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the random control is inert, and the sentence about it."""
    found = [
        (model, cut)
        for model in summary["models"]
        if model["basis"] == "random" and (cut := model["drift_cuts"].get(summary["drift"], {}).get("summary"))
    ]
    if not found:
        return (
            False,
            "There is no random basis beside it, so it is not shown that the effect belongs to the directions.",
        )
    model, cut = found[0]
    change = 1 - cut["remaining"]
    if abs(change) < CONTROL:
        return True, (
            f"The {model['label']} of the same rank did nothing ({cut['remaining']:.0%} of the drift left): the effect "
            "belongs to the directions that were found."
        )
    return False, (
        f"The {model['label']} of the same rank changed the drift as well ({cut['remaining']:.0%} of it left): part of "
        "the effect does not belong to the directions that were found."
    )


def _worst_note(summary: Mapping[str, Any], arm: Mapping[str, Any], cut: Mapping[str, Any]) -> str:
    if cut["n"] < 2:
        return ""
    where = f"seed {cut['worst']['seed']}" + (f" of {cut['worst']['run']}" if len(summary["runs"]) > 1 else "")
    size = f"{cut['worst_cut']:.1f}-fold" if cut["worst_cut"] else "altogether"
    interval = cut["interval"]
    spread = ""
    if interval:
        low, high = (f"{x:.1f}" if x else "no bound" for x in interval["cut"])
        spread = f" The 95 % bootstrap interval of the cut is {low} to {high}."
    return f"In the worst of {cut['n']} fine-tunes ({where}) the drift was cut {size}.{spread}"


def _shift_note(naive: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """What can be said without drift probes: how far the model moved on prompts that nobody labelled."""
    before, after = naive.get("generic_shift"), arm.get("generic_shift")
    if not before or not after or not before["mean"]:
        return ""
    share, again = after["mean"] / before["mean"], arm.get("made_again")
    verdict = (
        "and so do removals that failed: look at its answers before using it"
        if share > SHIFT_SHARE
        else f"as removals do that worked (at most {SHIFT_SHARE:.0%})"
    )
    return (
        f"Without any label: on the prompts of {after['probe']} {arm['label']} moved {share:.0%} as far from the base "
        f"as naive (total variation {number(after['mean'])} against {number(before['mean'])}), {verdict}."
    ) + (f" {again} of {arm['n']} fine-tunes were made again, with what they had found blocked." if again else "")


def _other_notes(summary: Mapping[str, Any], models: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    drift, task = summary["drift"], summary["task"]
    notes = []
    if (other := models.get("ablation")) and {drift, task} <= other["probes"].keys():
        values = " and ".join(f"{name} {number(other['probes'][name]['mean'])}" for name in (drift, task))
        notes.append(f"Ablating the same directions from the naive model's activations instead gives {values}.")
    kept = [probe["name"] for probe in summary["probes"] if probe["role"] == "retention"]
    kept = [name for name in kept if all(name in models[who]["probes"] for who in ("base", "naive", arm["model"]))]
    if kept:
        figures = [
            "{} {} (base {}, naive {})".format(
                name, *(number(models[who]["probes"][name]["mean"]) for who in (arm["model"], "base", "naive"))
            )
            for name in kept
        ]
        notes.append(f"Pretrained behaviour that should stay: {'; '.join(figures)}.")
    steps = summary["detection"]["steps"]
    if steps["detection"] and steps["naive"]:
        notes.append(
            f"Finding the directions took {steps['detection']:.0f} training steps; a naive fine-tune takes "
            f"{steps['naive']:.0f}."
        )
    if said := too_short(summary["detection"]["gain_share"]):
        notes.append(f"In one of the runs {said}." if len(summary["runs"]) > 1 else f"{said[0].upper()}{said[1:]}.")
    if arm["residual"] is not None:
        notes.append(
            f"The protected parts of the weights moved by at most {number(arm['residual'])} of each weight's norm."
        )
    return notes


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
