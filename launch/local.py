"""Run a command as N processes of one torchrun group on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from types import FrameType

__all__ = ["free_port", "run_local"]


def free_port() -> int:
    """A port of this machine at which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_local(arguments: list[str], *, nproc: int) -> int:
    """Run `python ARGUMENTS` in `nproc` processes with the environment that torchrun gives, and wait for them.

    Returns the exit code: 0, or that of the process that failed first. The others are stopped. SIGTERM, SIGUSR1 and
    SIGUSR2 are passed on to the processes, which save and end by themselves. The children's own
    words on standard error are the message; torchrun's summary of them is left out.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    # torchrun would end its processes on SIGTERM, and kill them 30 seconds later.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    before = {number: signal.signal(number, _pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:  # Ctrl-C, or a scheduler's signal: torchrun has stopped the children
        return 128 + int(error.sigval)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
