"""`python -m tests.faults [--share 0.1] [--seed S] [--only NAME]`: inject the faults and print the table.

Exit code 1 if any bar fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KINDS = ("kills", "corruption", "bombs", "preemption", "disk", "resume", "resharding", "nonfinite")


def main(arguments: list[str] | None = None) -> int:
    """Run the kinds that were asked for; the exit code."""
    from tests.faults.program import make_model
    from tests.faults.table import Bench, Row, markdown

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the injections to make, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind; may be given several times")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grasp-dist-faults-") as folder:
        model = make_model(Path(folder) / "model")
        for name in options.only or KINDS:
            print(f"{name}:", flush=True)
            started = time.monotonic()
            bench = Bench(Path(folder) / name, model, share=options.share, seed=options.seed)
            try:
                rows += importlib.import_module(f"tests.faults.{name}").run(bench)
            except (AssertionError, TimeoutError) as error:  # the program did not even get to the fault
                rows.append(Row(f"{name}: could not be injected", lost=None, failures=[str(error)]))
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{markdown(rows)}\n\n{time.monotonic() - begun:.0f} s in all", flush=True)
    failures = [failure for row in rows for failure in row.failures]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
