"""The report's pictures, each as an inline SVG made of one summary: trade-off, spectra, training curves, shift."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grasp_dist.evaluation.labels import Label, label_ends, label_points
from grasp_dist.evaluation.runs import RunRecord
from grasp_dist.evaluation.svg import INK, MUTED, SURFACE, figure, series_colour, to_svg
from grasp_dist.evaluation.verdict import number

__all__ = ["axis_label", "curves_picture", "shift_picture", "spectra_picture", "trade_off_picture"]

MARKERS = {"base": "s", "naive": "X", "grasp": "o", "random": "D", "ablation": "P", "one_shot": "^", "full": "v"}
_MORE_MARKERS = ("h", "p", "<", ">")
MEASURES = {
    "completion": "probability",
    "pair": "log-likelihood difference per token",
    "loss": "loss",
    "kl": "KL, nats",
    "misalignment": "share misaligned",
    "choice": "lean, -1 to 1",
    "harness": "lm-eval",
}
_POINTS = 300
_PANELS = 9


def trade_off_picture(summary: Mapping[str, Any]) -> str | None:
    """Task across, drift up: a small mark per model and seed, a large one for the mean, with an ellipse from three
    fine-tunes on (see `_ellipse`), else standard deviations; and the Pareto front of the means."""
    task, drift = summary["task"], summary["drift"]
    shown = [model for model in summary["models"] if {task, drift} <= model["probes"].keys()]
    if task is None or drift is None or not shown:
        return None
    names = [model["model"] for model in summary["models"]]
    with figure(6.2, 4.3) as (made, axes):
        ax = axes[0, 0]
        ax.grid(visible=True)
        means, labels, ellipses = {}, [], []
        for model in shown:
            name, colour = model["model"], series_colour(model["model"], names)
            points = [
                (row["probes"][task]["value"], row["probes"][drift]["value"])
                for row in summary["rows"]
                if row["model"] == name
                and all(row["probes"].get(axis, {}).get("value") is not None for axis in (task, drift))
            ]
            marker = _marker(name, names)
            if len(points) > 1:
                ax.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, alpha=0.4, linewidths=0)
            x, y = model["probes"][task], model["probes"][drift]
            drawn = _ellipse(points, colour)
            if drawn is not None:
                ellipses.append(drawn)
            bars = {"xerr": x["sd"], "yerr": y["sd"]} if drawn is None else {}
            ax.errorbar(
                x["mean"], y["mean"], **bars, color=colour, marker=marker, markersize=10.5,
                elinewidth=1.4, capsize=0, zorder=5, **_edge(model, colour),
            )  # fmt: skip
            means[name] = (x["mean"], y["mean"])
            labels.append(Label(model["label"], colour, means[name], _reach(points, means[name])))
        ax.margins(0.09)
        front = [row["model"] for row in (summary.get("beside") or {}).get("rows", []) if row["front"]]
        if len(front) > 1:
            path = sorted(means[name] for name in front if name in means)
            ax.plot(*zip(*path, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
        ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # what the marks need: an ellipse may be larger than the picture
        for drawn in ellipses:
            ax.add_patch(drawn)
        if {"base", "naive"} <= means.keys():
            ax.axhline(means["base"][1], color=MUTED, linewidth=1, linestyle=(0, (1, 2.5)), zorder=1)
            ax.axvline(means["naive"][0], color=MUTED, linewidth=1, linestyle=(0, (1, 2.5)), zorder=1)
        probes = {probe["name"]: probe for probe in summary["probes"]}
        ax.set_xlabel(axis_label(probes[task], "task"))
        ax.set_ylabel(axis_label(probes[drift], "drift"))
        label_points(made, ax, labels)
        words = "; ".join(
            f"{label.text}: task {number(label.point[0])}, drift {number(label.point[1])}" for label in labels
        )
        return to_svg(made, "trade", f"{drift} against {task}, by model", f"Means. {words}.")


def curves_picture(records: Sequence[RunRecord], summary: Mapping[str, Any]) -> str | None:
    """Training loss by step: the mean over runs and seeds, thin lines for each."""
    names = [model["model"] for model in summary["models"]]
    labels = {model["model"]: model["label"] for model in summary["models"]} | {"detection": "detection"}
    by_model: dict[str, list[list[tuple[int, float]]]] = {}
    for record in records:
        for (model, _), curve in record.curves.items():
            by_model.setdefault(model, []).append(_thinned(curve))
    if not by_model:
        return None
    order = [name for name in [*names, "detection"] if name in by_model]
    with figure(6.2, 3.6) as (made, axes):
        ax = axes[0, 0]
        ax.grid(visible=True, axis="y")
        ends = []
        losses = [loss for curves in by_model.values() for curve in curves for _, loss in curve]
        for name in order:
            colour = MUTED if name == "detection" else series_colour(name, names)
            style = (0, (4, 2)) if name == "detection" else "-"
            curves = by_model[name]
            if len(curves) > 1:
                for curve in curves:
                    ax.plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.25)
            mean = _mean_curve(curves)
            ax.plot(*zip(*mean, strict=True), color=colour, linewidth=1.8, linestyle=style)
            ends.append(Label(labels[name], colour, mean[-1]))
        if min(losses) > 0 and max(losses) > 30 * min(losses):
            _log_axis(ax.yaxis)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("training loss" + (" (log scale)" if ax.get_yscale() == "log" else ""))
        label_ends(made, ax, ends)
        words = "; ".join(f"{end.text} ends at {number(end.point[1])}" for end in ends)
        return to_svg(made, "curves", "Training loss by step", f"{words}.")


def spectra_picture(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Singular values of one naive update, one panel for each kind of module, one line for each layer."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(row["weight"].removesuffix(".weight").rpartition(".")[2], []).append(row)
    shown = dict(list(panels.items())[:_PANELS])
    values = [value for some in shown.values() for row in some for value in row["values"]]
    largest = max(values, default=0.0)
    if not largest > 0:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    with figure(6.2, 0.4 + 2.3 * lines, lines, columns, sharey=True, sharex=True) as (made, axes):
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, (leaf, some) in zip(axes.flat, shown.items(), strict=False):
            ax.set_title(leaf)
            ax.grid(visible=True, axis="y")
            for place, row in enumerate(some):
                strength = 0.3 + 0.7 * place / max(1, len(some) - 1) if len(some) > 1 else 1.0
                # Values that are rounding of zero would stretch the scale beyond use.
                kept = [(i + 1, value) for i, value in enumerate(row["values"]) if value > 1e-6 * largest]
                if kept:
                    ax.plot(
                        *zip(*kept, strict=True), color=series_colour("naive", []), alpha=strength, linewidth=1.5,
                        marker="o", markersize=3,
                    )  # fmt: skip
            _log_axis(ax.yaxis)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[-1]:
            ax.set_xlabel("direction")
        for ax in axes[:, 0]:
            ax.set_ylabel("singular value")
        words = "; ".join(
            f"{leaf}: {statistics.fmean(row['leading'] for row in some):.0%} of the energy in the first direction"
            for leaf, some in shown.items()
        )
        return to_svg(made, "spectra", "Singular values of the naive update", f"Means over layers. {words}.")


def shift_picture(summary: Mapping[str, Any]) -> str | None:
    """How many times further the activations moved along the basis than along random directions."""
    shown = [model for model in summary["models"] if model["shift"]]
    if not shown:
        return None
    names = [model["model"] for model in summary["models"]]
    with figure(6.2, 0.9 + 0.34 * len(shown)) as (made, axes):
        ax = axes[0, 0]
        ax.grid(visible=True, axis="x")
        ax.axvline(1, color=INK, linewidth=1)
        for place, model in enumerate(shown):
            colour, marker = series_colour(model["model"], names), _marker(model["model"], names)
            ratios = model["shift"]["ratios"]
            if len(ratios) > 1:
                ax.scatter(ratios, [place] * len(ratios), s=22, color=colour, marker=marker, alpha=0.4, linewidths=0)
            mean, interval = model["shift"]["ratio"]["mean"], model["shift"]["ratio"]["interval"]
            if interval is not None:
                ax.plot(interval, [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=4)
            ax.scatter([mean], [place], s=90, color=colour, marker=marker, edgecolor=SURFACE, zorder=5)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.7), max(high, 1.5))
        _log_axis(ax.xaxis)
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set_yticks(range(len(shown)), [model["label"] for model in shown])
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("shift along the basis / along random directions (log)")
        words = "; ".join(f"{model['label']}: {number(model['shift']['ratio']['mean'])}" for model in shown)
        return to_svg(
            made, "shift", "Shift of the activations along the basis, relative to random directions", f"{words}."
        )


def _ellipse(points: Sequence[tuple[float, float]], colour: str) -> Any:
    """95 % of single fine-tunes, if they are normally distributed with the covariance that is seen (chi-squared, two
    degrees of freedom); None for fewer than three."""
    if len(points) < 3:
        return None
    import numpy as np
    from matplotlib.patches import Ellipse

    covariance = np.cov(np.array(points).T)
    values, vectors = np.linalg.eigh(covariance)
    width, height = 2 * np.sqrt(5.991 * np.clip(values, 0, None))
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    centre = np.mean(points, axis=0)
    return Ellipse(
        (float(centre[0]), float(centre[1])),
        width,
        height,
        angle=angle,
        facecolor=(colour, 0.16),
        edgecolor=(colour, 0.55),
        linewidth=0.9,
        zorder=1.5,
    )


def _reach(points: Sequence[tuple[float, float]], mean: tuple[float, float]) -> tuple[float, float]:
    """How far the single points are from their mean at most."""
    return max(abs(x - mean[0]) for x, _ in points), max(abs(y - mean[1]) for _, y in points)


def _edge(model: Mapping[str, Any], colour: str) -> dict[str, Any]:
    """The random control lies on naive if it does nothing: it is drawn hollow, so that both are seen."""
    if model["basis"] == "random":
        return {"markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 1.8}
    return {"markeredgecolor": SURFACE, "markeredgewidth": 1.2}


def _marker(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in MARKERS]
    return MARKERS.get(name) or _MORE_MARKERS[others.index(name) % len(_MORE_MARKERS)]


def axis_label(probe: Mapping[str, Any], role: str) -> str:
    """What stands at an axis: the probe, its measure, and which way is better."""
    if role == "task":
        arrow = "\N{LEFTWARDS ARROW}" if probe["kind"] in ("loss", "kl") else "\N{RIGHTWARDS ARROW}"
    else:
        arrow = "\N{UPWARDS ARROW}" if probe["kind"] == "loss" else "\N{DOWNWARDS ARROW}"
    name = role if probe["name"] == role else f"{role}: {probe['name']}"
    return f"{name}, {MEASURES[probe['kind']]}   ({arrow} better)"


def _log_axis(axis: Any) -> None:
    """A log scale whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("log")
    low, high = sorted(axis.get_view_interval())
    narrow = low > 0 and high / low < 30
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_POINTS` points, each the mean of its stretch of steps."""
    width = -(-len(curve) // _POINTS)
    parts = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in parts]


def _mean_curve(curves: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Mean over the curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables))) or sorted(tables[0])
    return [(step, statistics.fmean(table[step] for table in tables if step in table)) for step in common]
