"""From the scores of any number of runs to one table: per model means over runs and seeds, drift cuts, costs (ours)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from grasp_dist.errors import InputError
from grasp_dist.evaluation.answers import summarise_questions
from grasp_dist.evaluation.mechanism import update_shares
from grasp_dist.evaluation.pareto import pareto_front
from grasp_dist.evaluation.runs import RunRecord
from grasp_dist.evaluation.statistics import (
    Key,
    bootstrap_interval,
    compare,
    estimate,
    higher_is_worse,
    holm,
    paired_difference,
    remaining_shares,
    summarise,
)

__all__ = ["headline_arm", "summarise_runs"]

_LABELS = {"grasp": "GRASP", "random": "random basis", "one_shot": "one-shot", "ablation": "ablation"}


def summarise_runs(
    records: Sequence[RunRecord], *, task: str | None = None, drift: str | None = None
) -> dict[str, Any]:
    """Everything that the report says in figures, as plain JSON: docs/probes.md describes it.

    task, drift: the probes on the picture's axes; None: the first of that role, and None if there is none. Raises
    `InputError` for a probe that no run has, or one name used for two different measurements.
    """
    probes = _probes(records)
    task, drift = _axis(probes, task, "task"), _axis(probes, drift, "drift")
    entries: dict[str, list[tuple[Key | str, dict[str, Any]]]] = {}
    for record in records:
        for row in record.models:
            key = record.name if row["model"] == "base" else (record.name, int(row.get("seed") or 0))
            entries.setdefault(row["model"], []).append((key, row))
    values = {
        probe["name"]: {
            model: {key: value for key, row in rows if (value := _value(row, probe["name"])) is not None}
            for model, rows in entries.items()
        }
        for probe in probes
    }
    models = _ordered(
        [
            _model(name, rows, probes, values, reference=_reference(name, entries), task=task)
            | {
                "hours": _hours(records, name),
                "written": update_shares(records, name),
                "settings": _settings(records, name, [row for _, row in rows]),
            }
            for name, rows in entries.items()
        ]
    )
    _distinct_labels(models)
    beside = _beside(models, probes, values, task, drift)
    return {
        "format": 1,
        "runs": [{"name": record.name, "folder": str(record.folder)} for record in records],
        "seeds": sorted({key[1] for rows in entries.values() for key, _ in rows if isinstance(key, tuple)}),
        "probes": probes,
        "task": task,
        "drift": drift,
        "models": models,
        "beside": beside,
        "questions": summarise_questions(records, models),
        "detection": _detection(records),
        "screens": {record.name: record.screen for record in records if record.screen},
        "diverged": _diverged(records),
        "rows": [
            _row(record.name, row, [probe["name"] for probe in probes]) for record in records for row in record.models
        ],
    }


def _beside(
    models: list[dict[str, Any]],
    probes: list[dict[str, Any]],
    values: dict[str, dict[str, dict[Any, float]]],
    task: str | None,
    drift: str | None,
) -> dict[str, Any] | None:
    """Every fine-tune beside the headline's: paired differences (it minus the headline's), and who is on the Pareto
    front of the means (task, distance of the drift from the base). p-values are Holm's over all rows of a measure."""
    main = headline_arm(models)
    tuned = [model for model in models if model["model"] != "base"]
    if main is None or task is None or drift is None or len(tuned) < 2:
        return None
    base = next((model for model in models if model["model"] == "base"), None)
    if base is None or not all(name in model["probes"] for name in (task, drift) for model in (base, *tuned)):
        return None
    worse = {probe["name"]: probe["worst_is_high"] for probe in probes}
    front = pareto_front(
        [model["probes"][task]["mean"] * (-1 if worse[task] else 1) for model in tuned],
        [abs(model["probes"][drift]["mean"] - base["probes"][drift]["mean"]) for model in tuned],
    )
    rows = []
    for model, on_front in zip(tuned, front.tolist(), strict=True):
        own = model["model"] == main["model"]
        found = {
            axis: None if own else paired_difference(values[probe][model["model"]], values[probe][main["model"]])
            for axis, probe in (("task", task), ("drift", drift))
        }
        rows.append({"model": model["model"], "label": model["label"], "front": on_front, **found})
    for axis in ("task", "drift"):
        tested = [row[axis] for row in rows if row[axis] is not None]
        for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
            entry["p_holm"] = p
    return {"to": main["model"], "label": main["label"], "rows": rows}


def headline_arm(models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The arm that the headline is about: `grasp`, else the first with the detected basis, else with any but random."""
    arms = [model for model in models if model["model"] not in ("base", "naive", "ablation")]
    for chosen in (
        [arm for arm in arms if arm["model"] == "grasp"],
        [arm for arm in arms if arm["basis"] == "detected"],
        [arm for arm in arms if arm["basis"] not in ("random", "none", None)],
    ):
        if chosen:
            return chosen[0]
    return None


def _probes(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The probes of all runs in order of first appearance, sizes as a range."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for probe in record.probes:
            known = found.setdefault(probe["name"], {**probe, "n": []})
            if (known["kind"], known["role"]) != (probe["kind"], probe["role"]):
                raise InputError(
                    f"probe {probe['name']!r} is a {known['kind']} probe of role {known['role']} in one run and "
                    f"{probe['kind']} of role {probe['role']} in {record.folder}; report these runs apart"
                )
            known["n"].append(probe["n"])
    for probe in found.values():
        probe["n"] = sorted(set(probe["n"]))
        better = probe.pop("higher_is_better", None)  # tasks of lm-eval say it themselves
        probe["worst_is_high"] = higher_is_worse(probe["role"], probe["kind"]) if better is None else not better
    return list(found.values())


def _axis(probes: Sequence[dict[str, Any]], wanted: str | None, role: str) -> str | None:
    names = [probe["name"] for probe in probes]
    if wanted is not None and wanted not in names:
        raise InputError(
            f"report.{role} names the probe {wanted!r}, which no run has; choose one of {', '.join(names)}"
        )
    return wanted or next((probe["name"] for probe in probes if probe["role"] == role), None)


def _model(
    name: str,
    entries: list[tuple[Key | str, dict[str, Any]]],
    probes: list[dict[str, Any]],
    values: dict[str, dict[str, dict[Any, float]]],
    *,
    reference: str,
    task: str | None,
) -> dict[str, Any]:
    first = entries[0][1]
    summary = {
        probe["name"]: summarise(list(found.values()), worst_is_high=probe["worst_is_high"])
        for probe in probes
        if (found := values[probe["name"]][name])
    }
    cuts = {}
    if name not in ("base", reference) and reference in values[probes[0]["name"]]:
        for probe in probes:
            if probe["role"] == "drift":
                by_model = values[probe["name"]]
                rows = remaining_shares(by_model.get("base", {}), by_model[reference], by_model[name])
                cuts[probe["name"]] = {"summary": compare(rows), "rows": rows}
    return {
        "model": name,
        "label": _label(name, first),
        "method": first.get("method"),
        "basis": first.get("basis"),
        "basis_rank": first.get("basis_rank"),
        "n": len(entries),
        "reference": reference if cuts else None,
        "probes": summary,
        "drift_cuts": cuts,
        "task_change": _task_change(name, task, values),
        "shift": _shift(entries) if name != "base" else None,
        "generic_shift": _generic_shift(entries, probes) if name != "base" else None,
        "made_again": sum(number > 0 for number in _numbers(entries, "extensions")) if name != "ablation" else 0,
        "residual": max(_numbers(entries, "residual"), default=None),
        "final_loss": _mean(_numbers(entries, "final_loss")) if name != "ablation" else None,
        "seconds": _mean(_numbers(entries, "seconds")) if name != "ablation" else None,
        "steps": _mean(_numbers(entries, "steps")) if name != "ablation" else None,
    }


def _settings(records: Sequence[RunRecord], name: str, rows: Sequence[dict[str, Any]]) -> str:
    """What tells an arm that blocks nothing from the naive fine-tune: its alternative's settings, and training's."""
    arms = [((record.config.get("project") or {}).get("arms") or {}).get(name) or {} for record in records]
    found = {_told(row.get("alternative") or {}) for row in rows}, {_told(arm.get("training") or {}) for arm in arms}
    if any(len(texts - {""}) > 1 for texts in found):
        return "with settings that differ between runs"
    text = ", ".join(one for texts in found for one in texts if one)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _told(settings: dict[str, Any], within: str = "") -> str:
    """A mapping of settings in words."""
    words = [str(settings["kind"]).replace("_", " ")] if "kind" in settings else []
    for key, value in settings.items():
        if isinstance(value, dict):
            words.append(_told(value, f"{within}{key}."))
        elif key != "kind" and value is not None:
            words.append(f"{within}{key} {value:.3g}" if isinstance(value, float) else f"{within}{key} {value}")
    return ", ".join(words)


def _reference(name: str, entries: dict[str, list[tuple[Key | str, dict[str, Any]]]]) -> str:
    """Which unprotected fine-tune a model's drift is compared with: a full fine-tune of the same run for full ones that
    block something, where there is one; else naive."""
    first = entries[name][0][1]
    if first.get("method") == "full" and first.get("basis") not in (None, "none"):
        for other, rows in entries.items():
            if rows[0][1].get("method") == "full" and rows[0][1].get("basis") in (None, "none") and other != "naive":
                return other
    return "naive"


def _task_change(name: str, task: str | None, values: dict[str, dict[str, dict[Any, float]]]) -> dict[str, Any] | None:
    """Arm minus naive on the task probe, and the share of naive's gain over the base that the arm has."""
    if task is None or name in ("base", "naive") or "naive" not in values[task]:
        return None
    by_model = values[task]
    changes = {key: value - by_model["naive"][key] for key, value in by_model[name].items() if key in by_model["naive"]}
    if not changes:
        return None
    gained = compare(remaining_shares(by_model.get("base", {}), by_model["naive"], by_model[name]))
    return {
        "mean": statistics.fmean(changes.values()),
        "interval": bootstrap_interval([run for run, _ in changes], list(changes.values())),
        "share_of_gain": gained and gained["remaining"],
    }


def _shift(entries: list[tuple[Key | str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The pooled ratio of each fine-tune, their estimate, means of both lengths, and the ratio's estimate per side."""
    kept = [(key[0], row["shift"]) for key, row in entries if isinstance(row.get("shift"), dict)]
    pooled = [(run, shift["pooled"]) for run, shift in kept if (shift.get("pooled") or {}).get("ratio") is not None]
    if not pooled:
        return None
    sides = {
        side: [(run, ratio) for run, s in kept if (ratio := s.get("sides", {}).get(side, {}).get("ratio")) is not None]
        for side in sorted({side for _, shift in kept for side in shift.get("sides", {})}, reverse=True)
    }
    return {
        "ratio": estimate([(run, one["ratio"]) for run, one in pooled]),
        "ratios": [one["ratio"] for _, one in pooled],
        "basis": _mean([one["basis"] for _, one in pooled]),
        "random": _mean([one["random"] for _, one in pooled]),
        "sides": {side: estimate(own) for side, own in sides.items() if own},
    }


def _generic_shift(
    entries: list[tuple[Key | str, dict[str, Any]]], probes: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Mean total variation from the base on the first kl probe, whose prompts need no labels."""
    name = next((probe["name"] for probe in probes if probe["kind"] == "kl"), None)
    found = [row["probes"].get(name, {}).get("total_variation") for _, row in entries]
    kept = [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]
    return {"probe": name, "mean": _mean(kept), "largest": max(kept)} if kept else None


def _detection(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the search cost, beside a naive fine-tune: means over runs."""
    metrics = [record.work.get(("detection", None), {}).get("metrics", {}) for record in records]
    naive = [
        manifest.get("metrics", {}) for record in records for key, manifest in record.work.items() if key[0] == "naive"
    ]
    curves = [record.curves[("detection", None)] for record in records if ("detection", None) in record.curves]
    plain = [curve for record in records for key, curve in record.curves.items() if key[0] == "naive"]

    def both(name: str) -> dict[str, float | None]:
        return {
            who: _mean([float(m[name]) for m in source if isinstance(m.get(name), (int, float))])
            for who, source in (("detection", metrics), ("naive", naive))
        }

    return {
        "seconds": both("seconds"),
        "steps": {"detection": _mean([len(c) for c in curves]), "naive": _mean([len(c) for c in plain])},
        "hours": _hours(records, "detection"),
        "gain_share": min((one.gain_share for one in records if one.gain_share is not None), default=None),
    }


def _hours(records: Sequence[RunRecord], model: str) -> dict[str, Any] | None:
    """{"mean", "device"}: hours of all its processes together for one fine-tune, each process on a device of its own;
    None where nothing was trained."""
    found = [
        (float(seconds) * manifest["world_size"] / 3600, str(manifest["metrics"].get("device", "cpu")))
        for record in records
        for (name, _), manifest in record.work.items()
        if name == model and isinstance(seconds := (manifest.get("metrics") or {}).get("seconds"), (int, float))
    ]
    if not found:
        return None
    return {"mean": statistics.fmean(hours for hours, _ in found), "device": found[0][1]}


def _value(row: dict[str, Any], probe: str) -> float | None:
    """A probe's value; None where it was not measured or is not finite."""
    value = row["probes"].get(probe, {}).get("value")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _diverged(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Fine-tunes with a value that is not finite, which the means leave out."""
    return [
        {"run": record.name, "model": row["model"], "seed": row.get("seed")}
        for record in records
        for row in record.models
        if any(_value(row, name) is None for name in row["probes"])
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(run: str, row: dict[str, Any], probes: list[str]) -> dict[str, Any]:
    measured = {name: row["probes"][name] for name in probes if name in row["probes"]}
    return {
        "run": run,
        "model": row["model"],
        "seed": row.get("seed"),
        **{
            key: _finite(row.get(key)) for key in ("method", "basis", "basis_rank", "residual", "final_loss", "seconds")
        },
        "probes": {name: {k: _finite(v) for k, v in found.items() if k != "rows"} for name, found in measured.items()},
        "shift": (row.get("shift") or {}).get("pooled"),
    }


def _ordered(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """base, naive, the headline's arm, other arms, random controls, ablation."""
    arm = headline_arm(models)

    def place(model: dict[str, Any]) -> int:
        fixed = {"base": 0, "naive": 1, arm["model"] if arm else None: 2, "ablation": 5}
        return fixed.get(model["model"], 4 if model["basis"] == "random" else 3)

    return sorted(models, key=place)


def _label(name: str, row: dict[str, Any]) -> str:
    label = _LABELS.get(name, name.replace("_", " "))
    if row.get("method") == "full" and name == "full":
        return "GRASP, full fine-tune" if row.get("basis") == "detected" else "full fine-tune"
    return label


def _distinct_labels(models: list[dict[str, Any]]) -> None:
    labels = [model["label"] for model in models]
    for model in models:
        if labels.count(model["label"]) > 1:
            model["label"] = model["model"]


def _numbers(entries: list[tuple[Key | str, dict[str, Any]]], name: str) -> list[float]:
    return [float(row[name]) for _, row in entries if isinstance(_finite(row.get(name)), (int, float))]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
