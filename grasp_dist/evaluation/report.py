"""The report of one run or of several pooled ones: report.html, one file that loads nothing, and what it shows as
report.json, report.csv (every run and seed) and report.md (the main table)."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grasp_dist.errors import InputError
from grasp_dist.evaluation.pictures import (
    MEASURES,
    curves_picture,
    shift_picture,
    spectra_picture,
    trade_off_picture,
)
from grasp_dist.evaluation.runs import RunRecord, read_runs
from grasp_dist.evaluation.summary import headline_arm, summarise_runs
from grasp_dist.evaluation.tables import as_csv, as_markdown
from grasp_dist.evaluation.templates import page_environment
from grasp_dist.evaluation.verdict import BARS, LEVEL_MARKS, judge, number
from grasp_dist.manifest import write_json

__all__ = ["build_report"]


def build_report(
    run_dirs: Sequence[Path],
    out_dir: Path,
    *,
    name: str = "report",
    title: str = "GRASP report",
    task: str | None = None,
    drift: str | None = None,
) -> dict[str, Any]:
    """Write report.html, .json, .csv and .md into `out_dir` and return what report.json holds. name: of the files.

    Needs each run's evaluate/scores.json; whatever else is missing is left out and named on the page. Models of one
    name are pooled over runs and seeds. task, drift: probes on the axes of the picture; None: the first of that role.
    Raises `InputError` for a folder without scores, a probe that no run has, and a folder that cannot be written.
    """
    records = read_runs(run_dirs)
    summary = summarise_runs(records, task=task, drift=drift)
    verdict = judge(summary)
    report = {
        **summary,
        "name": name,
        "title": title,
        "verdict": {
            "level": verdict.level,
            "label": verdict.label,
            "headline": verdict.headline,
            "notes": verdict.notes,
        },
        "spectra": {r.name: {str(seed): rows for seed, rows in r.spectra.items()} for r in records if r.spectra},
        "found": {record.name: record.found for record in records if record.found},
        "made_with": _made_with(records),
        "commands": _commands(records, out_dir),
    }
    page = _render(records, report)
    write_json(out_dir / f"{name}.json", report)
    try:
        for ending, text in (("html", page), ("csv", as_csv(report)), ("md", as_markdown(report))):
            temporary = out_dir / f".{name}.{ending}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out_dir / f"{name}.{ending}")
    except OSError as error:
        raise InputError(f"cannot write the report into {out_dir}: {error.strerror}; choose another folder") from None
    return report


def _render(records: Sequence[RunRecord], report: dict[str, Any]) -> str:
    environment = page_environment(Path(__file__).parent)
    environment.filters["duration"] = _duration
    environment.filters["rank"] = lambda ranks: ", ".join(f"{side} {rank}" for side, rank in (ranks or {}).items())
    environment.filters["hours"] = _hours
    environment.filters["small_percent"] = lambda share: f"{100 * share:.2g} %"
    environment.filters["said"] = lambda verdict: verdict if isinstance(verdict, str) else number(verdict)
    environment.globals["css_name"] = _css_name
    spectra_run = next((record for record in records if record.spectra), None)
    spectra_seed = min(spectra_run.spectra) if spectra_run else None
    spectra = spectra_run.spectra[spectra_seed] if spectra_run and spectra_seed is not None else []
    pictures = {
        "trade_off": trade_off_picture(report),
        "curves": curves_picture(records, report),
        "spectra": spectra_picture(spectra),
        "shift": shift_picture(report),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        css=(Path(__file__).parent / "report.css").read_text(encoding="utf-8"),
        pictures=pictures,
        tiles=_tiles(report),
        headline=(headline_arm(report["models"]) or {}).get("model"),
        mark=LEVEL_MARKS[report["verdict"]["level"]],
        bars=BARS,
        measures=MEASURES,
        spectra=spectra,
        spectra_of=(spectra_run.name, spectra_seed) if spectra_run else None,
        configs=_configs(records),
        missing=_missing(report, pictures),
        replicated=max((model["n"] for model in report["models"]), default=0) > 1,
    )


def _tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    """The few figures that a reader takes away."""
    models = {model["model"]: model for model in report["models"]}
    arm, drift, task = headline_arm(report["models"]), report["drift"], report["task"]
    tiles = []
    if arm and drift and "naive" in models and drift in arm["probes"]:
        cut = arm["drift_cuts"].get(drift, {}).get("summary")
        if cut:
            times = f"{cut['cut']:.1f}\N{MULTIPLICATION SIGN}" if cut["cut"] else "all"
            worst = f"{cut['worst_cut']:.1f}\N{MULTIPLICATION SIGN}" if cut["worst_cut"] else "all"
            tiles.append({"name": "drift cut", "value": times, "more": f"worst run {worst}"})
        arrow = "\N{RIGHTWARDS ARROW}"
        means = [number(models[name]["probes"][drift]["mean"]) for name in ("naive", arm["model"])]
        base = f"base {number(models['base']['probes'][drift]['mean'])}" if "base" in models else ""
        tiles.append(
            {
                "name": "drift" if drift == "drift" else f"drift: {drift}",
                "value": f" {arrow} ".join(means),
                "more": base,
            }
        )
    if arm and task and "naive" in models and task in arm["probes"]:
        value, naive = (number(models[name]["probes"][task]["mean"]) for name in (arm["model"], "naive"))
        tiles.append({"name": "task" if task == "task" else f"task: {task}", "value": value, "more": f"naive {naive}"})
    for model in report["models"]:
        cut = model["drift_cuts"].get(drift, {}).get("summary") if drift else None
        if model["basis"] == "random" and cut:
            tiles.append(
                {"name": f"drift left by {model['label']}", "value": f"{cut['remaining']:.0%}", "more": "control"}
            )
            break
    return tiles


def _missing(report: dict[str, Any], pictures: dict[str, str | None]) -> list[str]:
    """What a reader might look for in vain, and why."""
    lines = []
    if pictures["trade_off"] is None:
        lines.append("No trade-off picture: it needs a probe of role task and one of role drift.")
    if pictures["spectra"] is None:
        lines.append("No spectra: the naive stage left no LoRA adapter in the run directories.")
    if pictures["curves"] is None:
        lines.append("No training curves: there is no metrics.jsonl in the run directories.")
    if pictures["shift"] is None:
        lines.append("No shift of activations: it was not measured (evaluate.shift).")
    if not any(model["model"] == "ablation" for model in report["models"]):
        lines.append("No ablation at inference: it was not measured (evaluate.ablation).")
    sides = {row["side"] for rows in report["found"].values() for row in rows}
    if sides == {"write"}:
        lines.append("No read side: the basis has write directions only (detect.side).")
    return lines


def _configs(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The first run's configuration whole, the others as what differs from it."""
    configs = []
    first = records[0].config_text.splitlines()
    for number_, record in enumerate(records):
        text, kind = record.config_text, "config.yaml"
        if number_ and text:
            changes = difflib.unified_diff(first, text.splitlines(), lineterm="", n=0)
            lines = [line for line in changes if not line.startswith(("---", "+++", "@@"))]
            text, kind = "\n".join(lines) or "(the same)", f"config.yaml, lines that differ from {records[0].name}"
        configs.append({"run": record.name, "kind": kind, "text": text or "(no config.yaml in the run directory)"})
    return configs


def _made_with(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Versions, world sizes, hardware-free facts of the manifests; differing values side by side."""
    versions: dict[str, set[str]] = {}
    worlds: set[int] = set()
    finished: list[str] = []
    for record in records:
        for manifest in record.work.values():
            for package, version in (manifest.get("versions") or {}).items():
                versions.setdefault(str(package), set()).add(str(version))
            if isinstance(manifest.get("world_size"), int):
                worlds.add(manifest["world_size"])
            if isinstance(manifest.get("finished"), str):
                finished.append(manifest["finished"])
    return {
        "versions": {package: sorted(found) for package, found in sorted(versions.items())},
        "world_sizes": sorted(worlds),
        "finished": max(finished, default=None),
    }


def _commands(records: Sequence[RunRecord], out_dir: Path) -> list[str]:
    commands = [f"grasp-dist run {shlex.quote(str(record.folder / 'config.yaml'))}" for record in records]
    if len(records) > 1:
        folders = " ".join(shlex.quote(str(record.folder)) for record in records)
        commands.append(f"grasp-dist report --out {shlex.quote(str(out_dir))} {folders}")
    return commands


def _css_name(model: str, models: Sequence[dict[str, Any]]) -> str:
    """The CSS variable of a model's colour, as the pictures use it."""
    from grasp_dist.evaluation.svg import series_colour, variable_names

    return variable_names()[series_colour(model, [other["model"] for other in models])]


def _hours(found: dict[str, Any] | None) -> str:
    return "\N{EN DASH}" if found is None else f"{found['mean']:.3g} ({found['device']})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
