"""From a matplotlib figure to an SVG that lives in a page: the page's font and colours, own ids, a name for readers.

Colours are drawn as stand-ins and then replaced by CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "SURFACE", "figure", "series_colour", "to_svg", "variable_names"]

INK, MUTED, SURFACE = "#0a0b01", "#0a0b02", "#0a0b03"
_ROLES = {INK: "--ink", MUTED: "--muted", SURFACE: "--card"}
_NAMED = ("base", "naive", "grasp", "random", "ablation", "one_shot", "full")
_SPARE = 4


def series_colour(model: str, models: Sequence[str]) -> str:
    """The stand-in colour of a model; those without a colour of their own take the spare ones in turn."""
    if model in _NAMED:
        return f"#0a0c{_NAMED.index(model):02x}"
    others = [name for name in models if name not in _NAMED]
    return f"#0a0d{others.index(model) % _SPARE if model in others else 0:02x}"


def variable_names() -> dict[str, str]:
    """{stand-in colour: CSS variable}."""
    named = {f"#0a0c{i:02x}": f"--m-{name.replace('_', '-')}" for i, name in enumerate(_NAMED)}
    return _ROLES | named | {f"#0a0d{i:02x}": f"--m-other-{i + 1}" for i in range(_SPARE)}


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of this size in inches and its array of axes, in the page's style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "grasp",
        # Names from files are drawn as they are, never as formulas.
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": MUTED,
        "grid.alpha": 0.2,
        "grid.linewidth": 0.8,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made, made.subplots(rows, columns, squeeze=False, **shared)


def to_svg(made: Figure, name: str, title: str, description: str) -> str:
    """The figure as an inline <svg>. name: unique prefix of its ids; title, description: for screen readers."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"font: (?:(bold|\d{3}) )?([\d.]+)px [^;\"]*", _font, text)
    for stand_in, variable in variable_names().items():
        text = text.replace(stand_in, f"var({variable})")
    box = re.search(r'viewBox="([^"]+)"', text)
    width = float(box.group(1).split()[2]) if box else 500
    head = (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{box.group(1) if box else ""}" '
        f'style="--natural: {width:.0f}px">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match.group(1)}; " if match.group(1) else ""
    return f"{weight}font-size: {match.group(2)}px"
