"""One process of a torchrun group: `python -m grasp_dist.worker CONFIG STAGE... [--only TASK ...]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from grasp_dist.config_files import load_config
from grasp_dist.errors import PREEMPTED, InputError, Preempted
from grasp_dist.graph import STAGES
from grasp_dist.process import set_up_process
from grasp_dist.stages import work

__all__ = ["main", "run_worker"]


def run_worker(do: Callable[[], None]) -> None:
    """Do the work, `do`, as one of the group's processes, and end the process.

    A signal that asks to stop ends it with code 75, when the state is saved. An `InputError` ends it with code 2, at
    once, since the others may be waiting for it in a collective; the first of the machine to have one prints it. The
    others then end silently, whatever their broken connections raise.
    """
    group = "-".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
    said = Path(tempfile.gettempdir()) / f"grasp-dist-error-{group.replace('/', '_')}"
    if os.environ.get("LOCAL_RANK") == "0":
        said.unlink(missing_ok=True)
    try:
        do()
    except InputError as error:
        if _first(said):
            print(f"error: {error}", file=sys.stderr, flush=True)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr, flush=True)
        os._exit(PREEMPTED)
    except KeyboardInterrupt:
        os._exit(130)  # the process that started the group says so
    except Exception:
        if not said.exists():
            raise
    else:
        # Not sys.exit: a thread of gloo that is still there when the interpreter ends aborts the process now and then
        # (seen with torch 2.13), and finished work would look failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os._exit(2)


def _first(said: Path) -> bool:
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def main() -> None:
    """Entry point of each process."""
    set_up_process()
    parser = argparse.ArgumentParser(prog="python -m grasp_dist.worker", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--only", nargs="+", metavar="TASK", help="these tasks alone, e.g. project/grasp/seed-0")
    options = parser.parse_args()
    config = load_config(options.config)
    run_worker(lambda: work(config, tuple(options.stages), only=options.only))


if __name__ == "__main__":
    main()
