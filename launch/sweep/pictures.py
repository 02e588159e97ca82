"""The sweep's pictures as inline SVG: task against drift with the Pareto front, and both by rank. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grasp_dist.evaluation.labels import Label, label_ends, label_points
from grasp_dist.evaluation.pictures import axis_label
from grasp_dist.evaluation.svg import INK, MUTED, SURFACE, figure, series_colour, to_svg
from grasp_dist.evaluation.verdict import number

__all__ = ["SIDE_COLOURS", "by_rank_picture", "front_picture"]

# Colours of the report's palette that are told apart in its light and its dark form.
SIDE_COLOURS = {
    side: series_colour(name, ()) for side, name in {"write": "grasp", "read": "one_shot", "both": "full"}.items()
}
_CONTROL, _NAIVE = series_colour("random", ()), series_colour("naive", ())
_DOTTED = (0, (1, 2.5))


def front_picture(found: Mapping[str, Any]) -> str | None:
    """Task across, drift up: a line of ranks per side, each seed a small mark, the front ringed and joined."""
    rows = [row for row in found["combinations"] if row["task"] and row["drift"]]
    swept = [row for row in rows if not row["control"]]
    if not swept:
        return None
    naive, base = (_means(found["references"].get(name)) for name in ("naive", "base"))
    chosen = found["choice"] and found["choice"]["name"]
    with figure(6.6, 4.6) as (made, axes):
        ax = axes[0, 0]
        ax.grid(visible=True)
        labels = []
        for side, line in _by_side(swept).items():
            colour = SIDE_COLOURS[side]
            ax.plot(*_xy(line), color=colour, linewidth=1.3, alpha=0.55, zorder=3)
            for place, row in enumerate(line):
                _mark(ax, row, colour, chosen=row["name"] == chosen)
                text = f"{side} {row['rank']}" if place == 0 or row["name"] == chosen else str(row["rank"])
                labels.append(Label(text, colour, _point(row), _spread(row)))
        for row in (row for row in rows if row["control"]):
            _mark(ax, row, _CONTROL, marker="D", hollow=True)
            labels.append(Label(f"random {row['side']} {row['rank']}", _CONTROL, _point(row), _spread(row)))
        if naive:
            _mark(ax, found["references"]["naive"], _NAIVE, marker="X")
            labels.append(Label("naive", _NAIVE, naive, _spread(found["references"]["naive"])))
            ax.axvline(naive[0], color=MUTED, linewidth=1, linestyle=_DOTTED, zorder=1)
        front = sorted((row for row in swept if row["on_front"]), key=lambda row: row["task"]["mean"])
        ax.step(*_xy(front), where="pre", color=INK, linewidth=1, alpha=0.75, zorder=2)
        ax.margins(0.1)
        if base:
            ax.axhline(base[1], color=MUTED, linewidth=1, linestyle=_DOTTED, zorder=1)
            ax.annotate(
                "base\N{RIGHT SINGLE QUOTATION MARK}s drift", (1, base[1]), (-2, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=MUTED,
            )  # fmt: skip
        ax.set_xlabel(axis_label(found["task"], "task"))
        ax.set_ylabel(axis_label(found["drift"], "drift"))
        label_points(made, ax, labels)
        words = "; ".join(
            f"{row['side']} {row['rank']}: task {number(row['task']['mean'])}, drift {number(row['drift']['mean'])}"
            for row in swept
        )
        return to_svg(made, "front", "Drift against task, by side and rank", f"Means. {words}.")


def by_rank_picture(found: Mapping[str, Any]) -> str | None:
    """Drift and task by rank, one panel each: lines per side, hollow marks for random bases."""
    rows = [row for row in found["combinations"] if row["task"] and row["drift"]]
    swept = [row for row in rows if not row["control"]]
    ranks = sorted({row["rank"] for row in rows})
    if len(ranks) < 2:
        return None
    with figure(6.6, 3.1, 1, 2) as (made, axes):
        for ax, axis in zip(axes[0], ("drift", "task"), strict=True):
            ax.grid(visible=True, axis="y")
            ends = []
            for side, line in _by_side(swept).items():
                heights = [row[axis]["mean"] for row in line]
                ax.errorbar(
                    [row["rank"] for row in line], heights, yerr=[row[axis]["sd"] or 0 for row in line],
                    color=SIDE_COLOURS[side], marker="o", markersize=6, markeredgecolor=SURFACE, linewidth=1.6,
                    elinewidth=1.1, capsize=0, zorder=4,
                )  # fmt: skip
                ends.append(Label(side, SIDE_COLOURS[side], (line[-1]["rank"], heights[-1])))
            for row in (row for row in rows if row["control"]):
                ax.plot(
                    row["rank"], row[axis]["mean"], marker="D", markersize=6, markerfacecolor="none",
                    markeredgecolor=_CONTROL, markeredgewidth=1.6, linestyle="", zorder=5,
                )  # fmt: skip
            for name in ("naive", "base"):
                means = _means(found["references"].get(name))
                if means and not (name == "base" and axis == "task"):
                    value = means[axis == "drift"]
                    ax.axhline(value, color=MUTED, linewidth=1, linestyle=_DOTTED, zorder=1)
                    ends.append(Label(name, MUTED, (ranks[-1], value)))
            ax.set_xscale("log", base=2)
            ax.set_xticks(ranks, [str(rank) for rank in ranks])
            ax.minorticks_off()
            ax.set_xlabel("rank")
            better = "lower" if found[axis]["worst_is_high"] else "higher"
            ax.set_title(f"{axis_label(found[axis], axis).partition('   ')[0]}   ({better} is better)")
            ax.margins(0.08)
            label_ends(made, ax, ends)
        engine = made.get_layout_engine()
        assert engine is not None
        engine.set(wspace=0.16)  # type: ignore[call-arg]  # the names behind the lines' ends need room
        words = "; ".join(f"{row['side']} {row['rank']}: {number(row['drift']['mean'])}" for row in swept)
        return to_svg(made, "ranks", "Drift and task by rank", f"Drift. {words}.")


def _mark(
    ax: Any, row: Mapping[str, Any], colour: str, *, marker: str = "o", hollow: bool = False, chosen: bool = False
) -> None:
    """A mean with its standard deviations and, small, each seed."""
    points = [(one["task"], one["drift"]) for one in row["seeds"] if None not in (one["task"], one["drift"])]
    if len(points) > 1:
        ax.scatter(*zip(*points, strict=True), s=16, color=colour, marker=marker, alpha=0.3, linewidths=0, zorder=2)
    (x, y), (dx, dy) = _point(row), _spread(row)
    ring = {"markeredgecolor": INK, "markeredgewidth": 1.4} if row.get("on_front") else {
        "markeredgecolor": SURFACE, "markeredgewidth": 1.1
    }  # fmt: skip
    if hollow:
        ring = {"markeredgecolor": colour, "markeredgewidth": 1.8, "markerfacecolor": "none"}
    ax.errorbar(
        x, y, xerr=dx or None, yerr=dy or None, color=colour, marker=marker, markersize=13 if chosen else 8,
        elinewidth=1, capsize=0, zorder=5, **ring,
    )  # fmt: skip
    if chosen:
        ax.plot(x, y, marker="*", markersize=8, color=SURFACE, linestyle="", zorder=6)


def _by_side(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    sides: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        sides.setdefault(row["side"], []).append(row)
    return sides


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["task"]["mean"], row["drift"]["mean"]


def _spread(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["task"]["sd"] or 0.0, row["drift"]["sd"] or 0.0


def _means(row: Mapping[str, Any] | None) -> tuple[float, float] | None:
    return _point(row) if row and row["task"] and row["drift"] else None


def _xy(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["task"]["mean"] for row in rows], [row["drift"]["mean"] for row in rows]
