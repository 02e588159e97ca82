"""Names written into a picture, beside what they name, so that no legend has to be decoded (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Label", "label_ends", "label_points"]

# (dx, dy) in points from the mark, and which part of the text stands there.
_OFFSETS = (
    (10, 0, "left", "center"),
    (-10, 0, "right", "center"),
    (0, 10, "center", "bottom"),
    (0, -10, "center", "top"),
    (8, 8, "left", "bottom"),
    (-8, 8, "right", "bottom"),
    (8, -8, "left", "top"),
    (-8, -8, "right", "top"),
)
_REACHES = (1, 1.8, 3, 4.5, 6)


@dataclass(frozen=True)
class Label:
    """A name for the mark at `point`, whose error bars reach `spread` to either side; data coordinates."""

    text: str
    colour: str
    point: tuple[float, float]
    spread: tuple[float, float] = (0.0, 0.0)


def label_points(made: Any, ax: Any, labels: Sequence[Label]) -> None:
    """A name beside each mark, as near as it can be without covering another name, a mark or an error bar."""
    made.canvas.draw()
    renderer = made.canvas.get_renderer()
    inside = ax.get_window_extent(renderer)
    size = made.dpi / 72
    taken = [box for label in labels for box in _cross(ax, label, size)]
    offsets = [(dx * reach, dy * reach, side, edge) for reach in _REACHES for dx, dy, side, edge in _OFFSETS]
    for label in labels:
        for dx, dy, side, edge in offsets:
            note = _note(ax, label, (dx, dy), ha=side, va=edge)
            box = note.get_window_extent(renderer)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        else:
            box = _note(ax, label, (10, 0), va="center").get_window_extent(renderer)
        taken.append(box)


def label_ends(made: Any, ax: Any, ends: Sequence[Label]) -> None:
    """Names to the right of where lines end, pushed apart."""
    made.canvas.draw()
    height = 14 * made.dpi / 72
    order = sorted(ends, key=lambda end: ax.transData.transform(end.point)[1])
    wanted = [ax.transData.transform(end.point)[1] for end in order]
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + height) if places else y)
    excess = sum(places) / len(places) - sum(wanted) / len(wanted)
    excess = min(excess, places[0] - ax.get_window_extent().y0 - height / 2)
    right = max(end.point[0] for end in ends)
    for end, y in zip(order, places, strict=True):
        value = ax.transData.inverted().transform((0, y - excess))[1]
        _note(ax, Label(end.text, end.colour, (right, value)), (8, 0), va="center")


def _note(ax: Any, label: Label, offset: tuple[float, float], **align: Any) -> Any:
    style = {"color": label.colour, "fontweight": "bold", "zorder": 6, "annotation_clip": False}
    return ax.annotate(label.text, label.point, offset, textcoords="offset points", **style, **align)


def _cross(ax: Any, label: Label, size: float) -> list[Any]:
    """The pixels of a mark and of its error bars, as boxes."""
    from matplotlib.transforms import Bbox

    (x, y), (dx, dy) = label.point, label.spread
    (left, bottom), (x, y), (right, top) = ax.transData.transform([(x - dx, y - dy), (x, y), (x + dx, y + dy)])
    mark, thin = 6 * size, 2 * size
    return [
        Bbox.from_extents(x - mark, y - mark, x + mark, y + mark),
        Bbox.from_extents(left, y - thin, right, y + thin),
        Bbox.from_extents(x - thin, bottom, x + thin, top),
    ]
