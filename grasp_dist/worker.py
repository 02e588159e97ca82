"""One process of a torchrun group: `python -m grasp_dist.worker CONFIG STAGE...`."""

from __future__ import annotations

import os
import sys
import time

from grasp_dist.config import load_config
from grasp_dist.errors import InputError
from grasp_dist.stages import work

__all__ = ["main"]

_PATIENCE = 3.0


def main() -> None:
    """Run the stages; an `InputError` becomes one message and exit code 2, of rank 0 where it is seen there."""
    config_path, *stages = sys.argv[1:]
    try:
        work(load_config(config_path), tuple(stages))
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE)  # rank 0 mostly fails alike; its exit ends this process before it repeats the message
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: the process group may be waiting for a rank that has failed.
        os._exit(2)


if __name__ == "__main__":
    main()
