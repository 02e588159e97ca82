"""sweep.html, sweep.json and sweep.csv of a sweep: one table, two pictures, and which rank to use."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_dist.config import RunConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation import pictures as report_pictures
from grasp_dist.evaluation.svg import series_colour, variable_names
from grasp_dist.evaluation.templates import page_environment
from grasp_dist.evaluation.verdict import LEVEL_MARKS, number
from grasp_dist.launch.sweep.pictures import SIDE_COLOURS, by_rank_picture, front_picture
from grasp_dist.launch.sweep.results import gather
from grasp_dist.launch.sweep.words import RULE, state
from grasp_dist.manifest import write_json

__all__ = ["build_page"]


def build_page(config: RunConfig, folder: Path, *, commands: list[str]) -> dict[str, Any]:
    """Write the three files into `folder` and return what sweep.json holds.

    config: expanded; what of it is finished is shown, and what is not is named. commands: how to run it again. Raises
    `InputError` as `gather` does, and for a folder that cannot be written.
    """
    found = gather(config)
    found |= {
        "verdict": asdict(state(found)),
        "rule": RULE.format(tolerance=number(found["tolerance"])),
        "commands": commands,
    }
    write_json(folder / "sweep.json", found)
    _write(folder / "sweep.csv", _table(found))
    _write(folder / "sweep.html", _render(found))
    return found


def _table(found: Mapping[str, Any]) -> str:
    """One line per combination, then per reference; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["name", "side", "rank", "control", "seeds"]
    columns += [f"{axis}_{figure}" for axis in ("task", "drift") for figure in ("mean", "sd", "worst")]
    columns += ["drift_left", "worst_drift_left", "on_front", "recommended", "seconds"]
    writer.writerow(columns)
    chosen = found["choice"] and found["choice"]["name"]
    rows = [*found["combinations"], *({"name": name, **row} for name, row in found["references"].items())]
    for row in rows:
        figures = [(row[axis] or {}).get(key) for axis in ("task", "drift") for key in ("mean", "sd", "worst")]
        swept = row.get("control") is False
        writer.writerow(
            [
                *(row["name"], row.get("side"), row.get("rank"), row.get("control"), (row["task"] or {}).get("n")),
                *figures,
                *(row["remaining"], row["worst_remaining"]),
                *((row["on_front"], row["name"] == chosen) if swept else (None, None)),
                row["seconds"],
            ]
        )
    return text.getvalue()


def _render(found: Mapping[str, Any]) -> str:
    environment = page_environment(Path(__file__).parent)
    variables = variable_names()
    colours = {side: variables[colour] for side, colour in SIDE_COLOURS.items()}
    colours |= {name: variables[series_colour(name, ())] for name in ("random", "naive", "base")}
    css = Path(report_pictures.__file__).with_name("report.css").read_text(encoding="utf-8")
    return environment.get_template("sweep.html.j2").render(
        sweep=found,
        css=css,
        colours=colours,
        sides=_by_side(found["combinations"]),
        controls=[row for row in found["combinations"] if row["control"]],
        chosen=found["choice"] and found["choice"]["name"],
        mark=LEVEL_MARKS[found["verdict"]["level"]],
        measures=report_pictures.MEASURES,
        pictures={"front": front_picture(found), "ranks": by_rank_picture(found)},
        tiles=_tiles(found),
        replicated=len(found["seeds"]) > 1,
    )


def _by_side(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The swept combinations by side, in order of rank."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if not row["control"]), key=lambda row: row["rank"]):
        sides.setdefault(row["side"], []).append(row)
    return {side: sides[side] for side in ("write", "read", "both") if side in sides}


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that a reader takes away."""
    row = next(
        (row for row in found["combinations"] if found["choice"] and row["name"] == found["choice"]["name"]), None
    )
    naive = found["references"].get("naive")
    if row is None or naive is None or naive["drift"] is None or naive["task"] is None:
        return []
    base = found["references"]["base"]
    spread = f" \N{PLUS-MINUS SIGN} {number(row['drift']['sd'])}" if row["drift"]["sd"] is not None else ""
    tiles = [
        {
            "name": "recommended",
            "value": f"{row['side']}, rank {row['rank']}",
            "more": f"{sum(not other['control'] for other in found['combinations'])} combinations tried",
        },
        {
            "name": "drift",
            "value": number(row["drift"]["mean"]) + spread,
            "more": f"naive {number(naive['drift']['mean'])}, base {number(base['drift']['mean'])}",
        },
        {"name": "task", "value": number(row["task"]["mean"]), "more": f"naive {number(naive['task']['mean'])}"},
    ]
    if row["remaining"] is not None:
        worst = "" if row["worst_remaining"] is None else f"worst seed {row['worst_remaining']:.0%}"
        tiles.insert(2, {"name": "drift left", "value": f"{row['remaining']:.0%}", "more": worst})
    return tiles


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another run_dir") from None
