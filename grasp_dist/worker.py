"""One process of a torchrun or srun group: `python -m grasp_dist.worker CONFIG STAGE...`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from grasp_dist.config import RunConfig, load_config
from grasp_dist.console import quiet_libraries
from grasp_dist.errors import InputError
from grasp_dist.stages import work

__all__ = ["main", "run_worker"]


def run_worker(config: RunConfig, stages: tuple[str, ...], *, prepared: bool = True, dry_run: bool = False) -> None:
    """Do the stages' work as one of the group's processes, and end the process.

    An `InputError` ends the process with code 2, at once, since the others may be waiting for it in a collective; the
    first of the machine to have one prints it. The others then end silently, whatever their broken connections raise.
    """
    group = "-".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
    said = Path(tempfile.gettempdir()) / f"grasp-dist-error-{group.replace('/', '_')}"
    if os.environ.get("LOCAL_RANK") == "0":
        said.unlink(missing_ok=True)
    try:
        work(config, stages, prepared=prepared, dry_run=dry_run)
    except InputError as error:
        if _first(said):
            print(f"error: {error}", file=sys.stderr, flush=True)
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
    quiet_libraries()
    path, *stages = sys.argv[1:]
    run_worker(load_config(path), tuple(stages))


if __name__ == "__main__":
    main()
