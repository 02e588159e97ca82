"""The report's main table as CSV and as markdown, for papers and READMEs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from grasp_dist.evaluation.verdict import number

__all__ = ["as_csv", "as_markdown"]


def as_csv(report: dict[str, Any]) -> str:
    """A row for each model, run, seed and probe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "run", "seed", "probe", "role", "kind", "value", "final_loss", "seconds"])
    for row in report["rows"]:
        for probe in report["probes"]:
            value = row["probes"].get(probe["name"], {}).get("value")
            own = [row["model"], row["run"], row["seed"], probe["name"], probe["role"], probe["kind"], value]
            writer.writerow([_plain(cell) for cell in (*own, row["final_loss"], row["seconds"])])
    return out.getvalue()


def as_markdown(report: dict[str, Any]) -> str:
    """A row for each model: its measures, what of the drift is left, and how it stands beside the headline's."""
    probes = report["probes"]
    beside = report["beside"]
    rows = {row["model"]: row for row in beside["rows"]} if beside else {}
    head = ["model", "n", *(probe["name"] for probe in probes)]
    if report["drift"]:
        head.append("drift left")
    if beside:
        head += [f"{axis} minus {beside['label']}'s" for axis in ("task", "drift")] + ["on the front"]
    head.append("seconds")
    lines = [_line(head), _line(["---"] * len(head))]
    for model in report["models"]:
        cells = [model["label"], str(model["n"])]
        cells += [_measure(model["probes"].get(probe["name"])) for probe in probes]
        if report["drift"]:
            cells.append(_left(model["drift_cuts"].get(report["drift"], {}).get("summary")))
        if beside:
            row = rows.get(model["model"], {})
            cells += [_difference(row.get(axis)) for axis in ("task", "drift")]
            cells.append("yes" if row.get("front") else "")
        cells.append("" if model["seconds"] is None else f"{model['seconds']:.0f}")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _plain(cell: Any) -> Any:
    """No cell that a spreadsheet would run."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _measure(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return number(found["mean"]) + ("" if found["sd"] is None else f" ± {number(found['sd'])}")


def _left(cut: dict[str, Any] | None) -> str:
    if cut is None:
        return ""
    interval = cut["interval"]
    return f"{cut['remaining']:.0%}" + (
        "" if interval is None else f" ({interval['remaining'][0]:.0%} to {interval['remaining'][1]:.0%})"
    )


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = found["interval"]
    return f"{found['mean']:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})")
