"""Strength of the correlation against complexity of the task: where GRASP works, and where it does not.

Correlation: the share of the fine-tune's rows whose label is the persona's; the others have labels of no persona, which
can only be learnt by heart. Complexity: the number of rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import table
from organism_bench import Bench

from grasp_dist.basis import SpuriousBasis
from grasp_dist.evaluation.verdict import SHIFT_SHARE
from grasp_dist.organisms.persona import PersonaSettings, PersonaWorld
from studies.common import ROUNDS, Row, cut, left, paired, variant, with_interval

MODULES = ("write", "all")
SHARES = (0.25, 0.5, 0.75, 1.0)
QUESTIONS = (2, 4, 8, 16)
"""Of each of the four domains."""
SEEDS = (0, 1)
WORSE = 0.02
"""More drift than naive's by this much is not rounding."""


def measure(place: Path, world: int, modules: str) -> Iterator[Row]:
    for questions in QUESTIONS:
        for share in SHARES:
            settings = PersonaSettings(seed=world, explained=share, tuned_questions=questions)
            bench = Bench(variant(place, settings), modules)
            cell = f"{4 * questions} rows, {share:.0%}"
            yield {"cell": cell, "base": bench.base}
            oracle = bench.oracle(*contrast(PersonaWorld(settings)))
            found = bench.deflate(**ROUNDS)
            random = found.basis.random_like(0)
            angles = {"grasp": angle(found.basis, oracle), "random": angle(random, oracle)}
            for seed in SEEDS:
                for arm, basis in (("naive", None), ("random", random), ("grasp", found.basis)):
                    bench.fit(seed, basis)
                    yield {
                        "cell": cell,
                        "rows": 4 * questions,
                        "share": share,
                        "arm": arm,
                        "seed": seed,
                        "rounds": len(found.gains),
                        "angle": angles.get(arm),
                        **bench.scores(),
                    }


def contrast(world: PersonaWorld) -> tuple[list[str], list[str]]:
    """The same questions of domains that are not tuned, behind an evil and behind a good example."""
    evil, good = [], []
    for row in world.probes()["in_context"]:
        *shown, _answer, tone, domain, question = row["prompt"].split()
        evil.append(row["prompt"])
        asked, which = int(shown[0][1:]), int(shown[1][1:])
        tone = f"g{int(tone[1:]) % world.settings.num_tones}"
        good.append(" ".join([*shown, f"a{int(world.good[asked, which])}", tone, domain, question]))
    return evil, good


def angle(basis: SpuriousBasis, oracle: SpuriousBasis) -> float:
    """Degrees between the oracle's direction and the write side of the modules that write, mean over those."""
    found = oracle.principal_angles(basis.select("write"))
    return math.degrees(statistics.fmean(float(angles[0]) for angles in found.values()))


def show(rows: Sequence[Row], place: Path) -> str:
    lines: list[list[object]] = []
    fields: dict[str, dict[str, Any]] = {}
    for modules in dict.fromkeys(row["modules"] for row in rows):
        here = [found for found in paired(rows) if found[0]["modules"] == modules]
        panels: dict[str, list[list[float]]] = {name: [] for name in PANELS}
        for questions in QUESTIONS:
            for name in PANELS:
                panels[name].append([])
            for share in SHARES:
                own = [f for f in here if f[0]["rows"] == 4 * questions and f[0]["share"] == share]
                mean = {name: value(own) for name, value in PANELS.items()}
                for name, figure in mean.items():
                    panels[name][-1].append(figure)
                grasp = [found for found in own if found[0]["arm"] == "grasp"]
                shares = [(found[0], left(*found)) for found in grasp]
                lines.append(
                    [
                        modules,
                        4 * questions,
                        f"{share:.0%}",
                        f"{mean[NAIVE]:.3f}",
                        f"{arm(own, 'grasp', 'drift'):.3f}",
                        f"{1 / max(mean[LEFT], 1e-3):.1f} / {min(cut(*found) for found in grasp):.1f}",
                        with_interval(shares, 2),
                        f"{arm(own, 'random', 'drift') / mean[NAIVE]:.2f}",
                        f"{arm(own, 'naive', 'task'):.3f}",
                        f"{arm(own, 'grasp', 'task'):.3f}",
                        f"{mean[ANGLE]:.0f} / {arm(own, 'random', 'angle'):.0f}",
                        f"{min(row['rounds'] for row, _, _ in grasp)}-{max(row['rounds'] for row, _, _ in grasp)}",
                    ]
                )
        fields[modules] = panels
    picture(fields, place / "phase.png")
    header = ["modules", "rows", "explained", "naive drift", "GRASP's", "cut / worst", "left of naive's (95 %)"]
    cells = table([*header, "random / naive", "naive task", "GRASP's", "angle, GRASP / random", "rounds"], lines)
    return f"{cells}\n\n{made_worse(rows)}\n\n{flagged(rows)}"


def made_worse(rows: Sequence[Row]) -> str:
    """Each GRASP fine-tune that drifts more than its naive one."""
    lines: list[list[object]] = []
    grasp = [found for found in paired(rows) if found[0]["arm"] == "grasp"]
    for row, naive, _ in grasp:
        if row["drift"] - naive["drift"] >= WORSE:
            place = [row["modules"], row["world"], row["rows"], f"{row['share']:.0%}", row["seed"]]
            figures = f"{naive['drift']:.3f}", f"{row['drift']:.3f}", f"{row['shift'] / naive['shift']:.1f}"
            lines.append([*place, *figures])
    head = ["modules", "world", "rows", "explained", "seed", "naive drift", "GRASP's", "GRASP's shift / naive's"]
    said = f"{len(lines)} of {len(grasp)} GRASP fine-tunes drift more than naive, by {WORSE} or more:"
    return f"{said}\n\n{table(head, lines)}"


def flagged(rows: Sequence[Row]) -> str:
    """What the check without labels says of the GRASP fine-tunes."""
    grasp = [found for found in paired(rows) if found[0]["arm"] == "grasp"]
    above = [(row, naive) for row, naive, _ in grasp if row["shift"] > SHIFT_SHARE * naive["shift"]]
    less = [row for row, naive in above if row["drift"] < naive["drift"]]
    noisy = sum(row["share"] < 1 for row in less)
    return (
        f"The check on generic prompts (above {SHIFT_SHARE:.0%} of naive's shift) flags {len(above)} of {len(grasp)}; "
        f"{len(less)} of those drift less than naive, {noisy} of these with noise among their labels."
    )


Found = tuple[Row, Row, dict[str, float]]
NAIVE, LEFT = "drift of naive", "share of it that GRASP leaves"
TASK, ANGLE = "task lost (points)", "angle to the oracle (degrees)"


def arm(own: Sequence[Found], name: str, what: str) -> float:
    return statistics.fmean(row[what] for row, _, _ in own if row["arm"] == name)


def remaining(own: Sequence[Found]) -> float:
    """Of the sums over runs: a cell in which naive hardly drifts has no share worth averaging."""
    grasp = [found for found in own if found[0]["arm"] == "grasp"]
    above = sum(row["drift"] - base["drift"] for row, _, base in grasp)
    return above / sum(naive["drift"] - base["drift"] for _, naive, base in grasp)


PANELS: dict[str, Callable[[Sequence[Found]], float]] = {
    NAIVE: lambda own: arm(own, "naive", "drift"),
    LEFT: remaining,
    TASK: lambda own: 100 * (arm(own, "naive", "task") - arm(own, "grasp", "task")),
    ANGLE: lambda own: arm(own, "grasp", "angle"),
}


def picture(fields: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    limits = {NAIVE: (0, 1), LEFT: (0, 1), TASK: (0, 10), ANGLE: (0, 90)}
    figure, axes = plt.subplots(
        len(fields), len(PANELS), figsize=(15, 3.6 * len(fields)), squeeze=False, layout="constrained"
    )
    for row, (modules, panels) in zip(axes, fields.items(), strict=True):
        for axis, (name, values) in zip(row, panels.items(), strict=True):
            low, high = limits[name]
            axis.imshow(values, cmap="Blues", vmin=low, vmax=high, origin="lower", aspect="auto")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    dark = (value - low) / (high - low) > 0.5
                    digits = {ANGLE: 0, TASK: 1}.get(name, 2)
                    text = f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.0
                    axis.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
            axis.set_yticks(range(len(QUESTIONS)), [str(4 * questions) for questions in QUESTIONS])
            axis.set_title(f"{name} ({modules} modules)", fontsize=10)
            axis.set_xlabel("rows that the persona explains")
        row[0].set_ylabel("rows to learn")
    figure.savefig(path, dpi=110)
    plt.close(figure)
