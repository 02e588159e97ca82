"""How well detection works, on organisms whose factor is known: what docs/detection.md shows.

    python benchmarks/detection_study.py stopping     # where deflation stops, and the check on the final run
    python benchmarks/detection_study.py clean        # how often a factor is found where there is none
    python benchmarks/detection_study.py phase        # strength of the correlation against complexity of the task
    python benchmarks/detection_study.py ablation     # detectors, sides, ranks, closure, halves of the projector
    python benchmarks/detection_study.py halves       # gradient, pin, both; and several probes a round
    python benchmarks/detection_study.py again        # how often a removal fails, and what making it again does
    python benchmarks/detection_study.py ranks        # are the directions those of another LoRA rank or seed?
    python benchmarks/detection_study.py lean         # the political-like organism
    python benchmarks/detection_study.py slanted      # the same, where the data are wrong on the lean's side
    python benchmarks/detection_study.py shortcut     # the read-side shortcut, beside its ceiling
    options: --worlds 21 22 ... --modules write all --out runs/study --workers 2

The worlds are made in <out>/organisms as they are needed (75-90 s each on a free core). Every measurement is kept in
<out>/<study>.jsonl when a world and set of modules is done, and one that is there is not made again. Fine-tunes are
those of the recipes: LoRA r = 8, 160 steps. A study takes a quarter of an hour to an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from harness import machine
from studies import STUDIES
from studies.common import Row, organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--worlds", type=int, nargs="+", default=[21, 22, 23, 24, 25], metavar="SEED")
    parser.add_argument("--modules", nargs="+", choices=["write", "all"], help="default: the study's own")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    store = options.out / f"{options.study}.jsonl"
    study = STUDIES[options.study]
    wanted = [(world, modules) for world in options.worlds for modules in options.modules or study.MODULES]
    done = {(row["world"], row["modules"]) for row in read(store) if row.get("last")}
    missing = [key for key in wanted if key not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        worlds = dict.fromkeys(world for world, _ in missing)
        for future in as_completed([pool.submit(make_organism, options.study, options.out, world) for world in worlds]):
            print(f"organism {future.result()}", flush=True)
        runs = {pool.submit(measure, options.study, options.out, *key): key for key in missing}
        for number, future in enumerate(as_completed(runs), start=1):
            with store.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in future.result())
            print(f"{number} of {len(runs)}: world {runs[future][0]}, {runs[future][1]} modules", flush=True)
    rows = [row for row in read(store) if (row["world"], row["modules"]) in wanted]
    print(study.show(rows, options.out))
    print(machine())


def make_organism(study: str, out: Path, world: int) -> Path:
    make: Callable[[Path, int], Path] = getattr(STUDIES[study], "organism", organism)
    return make(out, world)


def measure(study: str, out: Path, world: int, modules: str) -> list[Row]:
    """All rows of one world and set of modules; the last one says so."""
    start = {"world": world, "modules": modules}
    rows = [{**start, **row} for row in STUDIES[study].measure(out, world, modules)]
    return [*rows, {**start, "last": True}]


def read(store: Path) -> list[Row]:
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        return []
    return [json.loads(line) for line in store.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
