"""Ranks that can be killed: real processes, forked from one that has imported everything, so that a start is cheap."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.forks import CONTEXT

__all__ = ["Group", "progress"]

_progress = -1
"""File descriptor of this rank's progress, in a process of a group."""


class Group:
    """One start of `function(*arguments)` on `world_size` gloo ranks. A context manager: nothing is left behind.

    A rank ends as the product's worker does: code 75 when it was preempted, 2 for an `InputError`, which it prints, and
    2 for whatever it meets when another has printed one. What it prints and returns is kept in `scratch`, a new folder.
    """

    def __init__(self, scratch: Path, function: Callable[..., Any], world_size: int, *arguments: Any) -> None:
        self.scratch, self.world_size = scratch, world_size
        scratch.mkdir(parents=True)
        self._processes = [
            CONTEXT.Process(target=_main, args=(rank, world_size, scratch, function, arguments))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
            process.close()

    def send(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal, if the rank is still there."""
        process = self._processes[rank]
        if process.exitcode is None and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def ended(self) -> bool:
        """Whether any rank has ended."""
        return any(process.exitcode is not None for process in self._processes)

    def wait(self, *, timeout: float = 120.0, grace: float = 3.0) -> list[int | None]:
        """Exit codes by rank, negative for signals. As with torchrun, when one has failed, the others have `grace`
        seconds to end by themselves; None for those that did not. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout
        failed = False
        while any(process.exitcode is None for process in self._processes):
            if not failed and any(process.exitcode for process in self._processes):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                if failed:
                    break
                raise TimeoutError(f"not finished in {timeout:.0f} s:\n{self.last_words()}")
            time.sleep(0.005)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return codes

    def results(self, *, timeout: float = 300.0) -> list[Any]:
        """What the ranks returned. Raises `AssertionError`, with what they said, if one did not end well."""
        codes = self.wait(timeout=timeout)
        assert not any(codes), f"exit codes {codes}:\n{self.last_words()}"
        return [pickle.loads((self.scratch / f"result-{rank}").read_bytes()) for rank in range(self.world_size)]

    def said(self, rank: int | None = None) -> str:
        """What a rank, or all of them, printed so far."""
        ranks = range(self.world_size) if rank is None else [rank]
        paths = [self.scratch / f"said-{rank}" for rank in ranks]
        return "".join(path.read_text() for path in paths if path.exists())

    def last_words(self) -> str:
        """The end of what each rank printed, for a message."""
        return "\n".join(f"rank {rank}: ...{self.said(rank)[-800:]}" for rank in range(self.world_size))

    def steps(self, rank: int | None = None) -> list[int]:
        """The steps that a rank has done in this start; of all ranks, those of the furthest."""
        if rank is None:
            return max((self.steps(rank) for rank in range(self.world_size)), key=lambda steps: steps[-1:])
        path = self.scratch / f"progress-{rank}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def progress(step: int) -> None:
    """Note, where SIGKILL cannot take it back, that this rank has done a step."""
    os.write(_progress, f"{step}\n".encode())


def _main(rank: int, world_size: int, scratch: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _progress
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    said = os.open(scratch / f"said-{rank}", flags)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _progress = os.open(scratch / f"progress-{rank}", flags)
    code = 1
    try:
        code = _run(rank, world_size, scratch, function, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(rank: int, world_size: int, scratch: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    import torch.distributed as dist

    from grasp_dist.errors import PREEMPTED, InputError, Preempted

    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        store = dist.FileStore(str(scratch / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result = function(*arguments)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    except InputError as error:
        (scratch / "an-error-was-printed").touch()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        if (scratch / "an-error-was-printed").exists():
            return 2
        raise
    (scratch / f"result-{rank}").write_bytes(pickle.dumps(result))
    if world_size > 1:
        dist.barrier()
    return 0
