"""What `benchmarks/detection_study.py` measures, a module each: `measure(place, world, modules)` gives rows, and
`show(rows, place)` a table, and where it helps a picture.

stopping.py    where deflation stops, and the check on the final run
clean.py       how often a factor is found where there is none
phase.py       strength of the correlation against complexity of the task
ablation.py    detectors, sides, ranks, closure, and the two halves of the projector
ranks.py       whether the directions are those of another LoRA rank, seed or machine
"""

from studies import ablation, clean, phase, ranks, stopping

STUDIES = {"stopping": stopping, "clean": clean, "phase": phase, "ablation": ablation, "ranks": ranks}
