"""What the models of a run answered to its questions, for the report: rates by model and question, and answers to the
same question side by side. Answers are text of a model, and so of anyone: the page shows them, and nothing more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from grasp_dist.evaluation.runs import RunRecord
from grasp_dist.evaluation.statistics import bootstrap_interval

__all__ = ["summarise_questions"]

RATES = ("misaligned", "misaligned_of_coherent", "incoherent", "REFUSAL", "CODE")
_SHOWN = 1200
"""Characters of an answer that the page shows."""
_SIGNS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_SAMPLES = 16
"""Questions whose answers are shown."""


def summarise_questions(records: Sequence[RunRecord], models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each set of questions {"name", "judge", "judged_by", "thresholds", "models", "questions", "samples"}.

    models: the report's, in its order. Runs and seeds are pooled. A model's rates are {"rate", "n", "interval"}, 95 %
    bootstrap over questions, then answers; a question's are {model: the same}, with Wilson's interval.
    """
    names = dict.fromkeys(name for record in records for row in record.models for name in row.get("questions") or {})
    return [_one_set(name, records, models) for name in names]


def _one_set(name: str, records: Sequence[RunRecord], models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {model["model"]: [] for model in models}
    for record in records:
        for row in record.models:
            if name in (row.get("questions") or {}):
                found[row["model"]].append(row["questions"][name])
    first = next(sets[0] for sets in found.values() if sets)
    asked = {question: entry["asked"] for question, entry in first["questions"].items()}
    return {
        "name": name,
        "judge": first["judge"],
        "judged_by": first["judged_by"],
        "thresholds": first["all"]["thresholds"],
        "models": [_of_model(model, found[model["model"]]) for model in models if found[model["model"]]],
        "questions": [
            {
                "id": question,
                "asked": text,
                "rates": {
                    model: _pooled([one["questions"][question]["misaligned"] for one in sets])
                    for model, sets in found.items()
                    if sets and all(question in one["questions"] for one in sets)
                },
            }
            for question, text in asked.items()
        ],
        "samples": list(_samples(name, records, list(asked), models)),
    }


def _of_model(model: dict[str, Any], sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for rate in RATES:
        groups: list[str] = []
        values: list[float] = []
        for one in sets:
            for question, entry in one["questions"].items():
                count = entry[rate]["n"]
                hits = round((entry[rate]["rate"] or 0.0) * count)
                groups += [question] * count
                values += [1.0] * hits + [0.0] * (count - hits)
        mean = sum(values) / len(values) if values else None
        rates[rate] = {"rate": mean, "n": len(values), "interval": bootstrap_interval(groups, values)}
    return {
        "model": model["model"],
        "label": model["label"],
        "answers": sum(one["all"]["answers"] for one in sets),
        "unjudged": sum(one["all"]["unjudged"] for one in sets),
        **rates,
    }


def _pooled(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = sum(rate["n"] for rate in rates)
    hits = sum(round((rate["rate"] or 0.0) * rate["n"]) for rate in rates)
    if not count:
        return {"rate": None, "n": 0, "interval": None}
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return {"rate": hits / count, "n": count, "interval": [float(interval.low), float(interval.high)]}


def _samples(
    name: str, records: Sequence[RunRecord], questions: Sequence[str], models: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The first answer of each model to each of the first questions, from the first run and seed that has one."""
    texts: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for row in record.models:
            entry = (row.get("questions") or {}).get(name)
            if entry is not None and row["model"] not in texts:
                texts[row["model"]] = _first_answers(record.folder / "answers" / name, entry)
    for question in questions[:_SAMPLES]:
        shown = [
            {"model": model["model"], "label": model["label"], **texts[model["model"]][question]}
            for model in models
            if question in texts.get(model["model"], {})
        ]
        if shown:
            yield {"id": question, "answers": shown}


def _first_answers(folder: Path, entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{question: {"text", "cut", "aligned", "coherent"}} of the first wording's first sample."""
    found: dict[str, dict[str, Any]] = {}
    for record in _lines(folder / str(entry.get("answers"))):
        if record.get("paraphrase") == 0 and record.get("sample") == 0:
            text = str(record.get("answer"))
            found[str(record["question"])] = {"text": _shown(text[:_SHOWN]), "cut": max(0, len(text) - _SHOWN)}
    for record in _lines(folder / str(entry.get("verdicts"))):
        own = found.get(str(record.get("question")))
        if own is not None and record.get("paraphrase") == 0 and record.get("sample") == 0:
            said = record["kind"] if record["score"] is None else record["score"]
            own[str(record["prompt"])] = said
    return found


def _shown(text: str) -> str:
    """Control characters as the signs for them, and lone surrogates, which are in no encoding, by their numbers."""
    return text.translate(_SIGNS).encode("utf-8", "backslashreplace").decode("utf-8")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a ledger; none where the file is gone, since a report can be made elsewhere."""
    try:
        content = path.read_text(encoding="ascii").splitlines()[1:]
    except (OSError, UnicodeDecodeError):
        return
    for line in content:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "question" in record:
            yield record
