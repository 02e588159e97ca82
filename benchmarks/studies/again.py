"""The check behind fine-tunes: how often a removal fails, whether the check sees it, and what making it again does."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import table
from organism_bench import Bench

from grasp_dist.config import CheckConfig
from grasp_dist.detection.deflation import leading_directions
from studies.common import MODES, ROUNDS, Row, by_arm, cut, organism, paired, with_interval

MODULES = ("write", "all")
SEEDS = range(16)
FAILED = 4.0
"""A removal that cuts the drift less than so many times has failed."""
_CHECK = CheckConfig()


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    bench = Bench(organism(place, world), modules)
    yield {"base": bench.base}
    found = bench.deflate(**ROUNDS).basis
    for seed in SEEDS:
        bench.fit(seed)
        naive = bench.scores()
        yield {"arm": "naive", "seed": seed, **naive}
        basis = found
        for attempt in range(_CHECK.repeats + 1):
            bench.fit(seed, basis, **MODES["pin"])
            scores = bench.scores()
            share = scores["shift"] / naive["shift"]
            row = {"seed": seed, "share": share, "attempt": attempt, **scores}
            if attempt == 0:
                yield {"arm": "first", **row}
            if share <= _CHECK.threshold or attempt == _CHECK.repeats:
                break
            more = leading_directions(bench.model, side="both", count=1)
            assert more is not None
            basis = basis.union(more)
        yield {"arm": "checked", **row}


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    for modules, arm, own, cuts in by_arm(rows):
        if arm == "naive":
            continue
        lines.append(
            [
                modules,
                arm,
                len(own),
                sum(one < FAILED for one in cuts),
                sum(row["attempt"] > 0 for row, _, _ in own) if arm == "checked" else "",
                with_interval([(row, row["drift"]) for row, _, _ in own]),
                f"{max(row['drift'] for row, _, _ in own):.3f}",
                f"{statistics.mean(cuts):.1f} / {min(cuts):.1f}",
                with_interval([(row, 100 * (naive["task"] - row["task"])) for row, naive, _ in own], 1),
                with_interval([(row, row["good"]) for row, _, _ in own]),
            ]
        )
    head = ["modules", "fine-tunes", "runs", f"cut < {FAILED:g}", "made again", "drift (95 %)", "worst"]
    head += ["cut, mean / worst", "task lost, points (95 %)", "good"]
    return f"{table(head, lines)}\n\n{_by_check(rows)}"


def _by_check(rows: Sequence[Row]) -> str:
    """Of the first fine-tunes: whether the check and the drift agree."""
    first = [found for found in paired(rows) if found[0]["arm"] == "first"]
    lines: list[list[object]] = []
    for name, wanted in (("failed", True), ("worked", False)):
        shares = [row["share"] for row, naive, base in first if (cut(row, naive, base) < FAILED) == wanted]
        flagged = sum(share > _CHECK.threshold for share in shares)
        lines.append([name, len(shares), flagged, f"{min(shares):.2f}-{max(shares):.2f}" if shares else ""])
    return table(["removal", "fine-tunes", "flagged by the check", "share of naive's shift"], lines)
