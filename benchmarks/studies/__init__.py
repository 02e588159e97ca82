"""What `benchmarks/detection_study.py` measures, a module each: `measure(place, world, modules)` gives rows, for each
of `MODULES` unless told otherwise, and `show(rows, place)` a table, and where it helps a picture. `organism(place,
world)` makes the model and files; where there is none, the persona's.

stopping.py    where deflation stops, and the check on the final run
clean.py       how often a factor is found where there is none
phase.py       strength of the correlation against complexity of the task
ablation.py    detectors, sides, ranks, closure, and the two halves of the projector
ranks.py       whether the directions are those of another LoRA rank, seed or machine
halves.py      gradient projection and pinning, one by one and together; several probes a round
again.py       how often a removal fails, whether the check sees it, and what making it again does
lean.py        the political-like organism: a lean that most of the facts have
slanted.py     the same where the data are wrong on the lean's side
shortcut.py    the read-side shortcut, beside its ceiling
"""

from types import ModuleType

from studies import ablation, again, clean, halves, lean, phase, ranks, shortcut, slanted, stopping

STUDIES: dict[str, ModuleType] = {
    "stopping": stopping,
    "clean": clean,
    "phase": phase,
    "ablation": ablation,
    "ranks": ranks,
    "halves": halves,
    "again": again,
    "lean": lean,
    "slanted": slanted,
    "shortcut": shortcut,
}
