"""Read what a finished run left in its folder, for the report. Everything but the scores may be missing."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grasp_dist.errors import InputError

__all__ = ["RunRecord", "gain_share", "naive_losses", "read_run", "read_runs", "too_short"]

SHORT_ROUNDS = 0.1
"""Of naive's gain: where no round of a search gains as much, its rounds were too short to take the routes of the
fine-tune. Ours (docs/detection.md)."""


@dataclass
class RunRecord:
    """One run directory. Keys of `curves` and `work`: (model, seed), ("detection", None) for the search."""

    name: str
    folder: Path
    config_text: str
    config: dict[str, Any]
    probes: list[dict[str, Any]]
    models: list[dict[str, Any]]
    curves: dict[tuple[str, int | None], list[tuple[int, float]]] = field(default_factory=dict)
    work: dict[tuple[str, int | None], dict[str, Any]] = field(default_factory=dict)
    """Manifest of each fine-tune and of the search: metrics, versions, world size, when it was finished."""
    spectra: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By naive seed: {"weight", "values", "leading", "stable_rank", "effective_rank"} for each weight."""
    found: list[dict[str, Any]] = field(default_factory=list)
    """The detected basis: {"weight", "side", "rank", "values"} for each weight and side."""
    gain_share: float | None = None
    """What the best round of the search gained, as a share of naive's gain (`gain_share`)."""
    screen: dict[str, Any] | None = None
    """What the screening said (`grasp_dist.evaluation.screening`), where the run has one."""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Every run, under names that differ. Raises `InputError` for a folder without readable scores."""
    if not folders:
        raise InputError("a report needs at least one run directory")
    records = [read_run(Path(folder)) for folder in folders]
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        for record in records:
            record.name = "/".join(record.folder.absolute().parts[-2:])
    for number, record in enumerate(records):
        if record.name in [other.name for other in records[:number]]:
            record.name = f"{record.name} ({number + 1})"
    return records


def read_run(folder: Path) -> RunRecord:
    """One run directory. Raises `InputError` if evaluate/scores.json is missing or is no scores file."""
    scores = _scores(folder)
    text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    record = RunRecord(
        name=folder.absolute().name,
        folder=folder,
        config_text=text,
        config=config if isinstance(config, dict) else {},
        probes=scores["probes"],
        models=scores["models"],
    )
    for row in record.models:
        model, seed = row["model"], row.get("seed")
        if model not in ("base", "ablation") and seed is not None:
            stage = folder / ("naive" if model == "naive" else f"project/{model}") / f"seed-{seed}"
            record.curves[model, seed] = _curve(stage / "metrics.jsonl")
            record.work[model, seed] = _manifest(stage)
            if model == "naive":
                record.spectra[seed] = _spectra(stage / "adapter")
    record.curves["detection", None] = _curve(folder / "detect" / "metrics.jsonl")
    record.work["detection", None] = _manifest(folder / "detect")
    record.curves = {key: curve for key, curve in record.curves.items() if curve}
    record.spectra = {seed: rows for seed, rows in record.spectra.items() if rows}
    record.found, gains = _found(folder / "detect" / "basis.safetensors")
    record.gain_share = gain_share(gains, naive_losses(folder))
    if (record.config.get("detect") or {}).get("screen"):
        record.screen = _json(folder / "screen" / "screen.json") or None
    return record


def naive_losses(folder: Path) -> list[list[float]]:
    """The training losses of the naive fine-tunes of a run directory, by seed, so far."""
    curves = [_curve(path) for path in sorted(folder.glob("naive/seed-*/metrics.jsonl"))]
    return [[loss for _, loss in curve] for curve in curves if curve]


def gain_share(gains: Sequence[float], naive: Sequence[Sequence[float]]) -> float | None:
    """The best of these gains of a search's rounds, as a share of how far naive fine-tunes bring their losses down (the
    last quarter of the steps against the first step; mean over them). None where either is not known, or naive gains
    nothing."""
    from grasp_dist.detection.deflation import round_gain

    if not gains or not naive:
        return None
    gained = statistics.fmean(round_gain(losses, len(losses)) for losses in naive)
    return max(gains) / gained if gained > 0 else None


def too_short(share: float | None) -> str | None:
    """What is said of a search whose best round has this `gain_share`; None where its rounds were long enough, or that
    is not known."""
    if share is None or share >= SHORT_ROUNDS:
        return None
    return (
        f"no round of the search brought the loss further down than {max(share, 0):.0%} of what naive does: its rounds "
        f"were too short to take the fine-tune's ways; give detect.steps_per_round, twice as many steps for a start"
    )


def _scores(folder: Path) -> dict[str, Any]:
    path = folder / "evaluate" / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give finished run directories, or run `grasp-dist evaluate` first"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); run `grasp-dist evaluate` again") from None
    well_formed = isinstance(scores, dict) and scores.get("format") == 1
    if not well_formed or not isinstance(scores.get("probes"), list) or not isinstance(scores.get("models"), list):
        raise InputError(f"{path} is not a scores file of format 1; run `grasp-dist evaluate` with this version again")
    return scores


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _manifest(folder: Path) -> dict[str, Any]:
    return _json(folder / "manifest.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _curve(path: Path) -> list[tuple[int, float]]:
    """(step, training loss); lines that are cut off or hold no loss are passed over."""
    curve = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
            curve.append((int(row["step"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError):
            continue
    return [(step, loss) for step, loss in curve if math.isfinite(loss)]


def _spectra(adapter: Path) -> list[dict[str, Any]]:
    if not adapter.is_dir():
        return []
    from grasp_dist.detection.adapter import read_adapter
    from grasp_dist.detection.svd import low_rank_svd, spectrum

    try:
        update = read_adapter(adapter)
    except InputError:
        return []
    rows = []
    for weight, factors in update.weights.items():
        values = low_rank_svd(factors.A, factors.B, factors.scale)[1]
        shape = spectrum(values)
        rows.append(
            {
                "weight": weight,
                "values": values.tolist(),
                "leading": shape.leading,
                "stable_rank": shape.stable_rank,
                "effective_rank": shape.effective_rank,
            }
        )
    return rows


def _found(path: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of `RunRecord.found`, and the gains of the rounds that found them."""
    if not path.is_file():
        return [], []
    from grasp_dist.basis import SpuriousBasis

    try:
        basis = SpuriousBasis.load(path)
    except InputError:
        return [], []
    rows = []
    for weight in basis.weights:
        for side in basis.sides(weight):
            values = basis.singular_values(weight, side)
            rank = basis.basis_rank(weight, side)
            shown = None if values is None else values[:rank].tolist()
            rows.append({"weight": weight, "side": side, "rank": rank, "values": shown})
    gains = basis.provenance.get("gains")
    if not isinstance(gains, list) or not all(isinstance(gain, (int, float)) for gain in gains):
        gains = []  # a basis that was brought may say anything there
    return rows, gains
