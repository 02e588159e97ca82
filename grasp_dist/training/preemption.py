"""Signals that ask to stop: SIGTERM, SIGUSR1 and SIGUSR2 set a flag, and nothing else happens in the handler.

The training loop shares the flag among the ranks at each step boundary, so the signal need reach only one of them; all
save the same step, and the process ends with code 75. If that takes longer than the scheduler waits before it kills,
a timer ends the process a little earlier, with code 76: what was saved before is whole, and a save that is not finished
has no marker.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from grasp_dist.errors import FORCED_OUT

__all__ = ["MARGIN", "SIGNALS", "StopSignals", "hold_signals", "stop_requested"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MARGIN = 0.1
"""The share of the lead time that is left for the process to end."""

_active: StopSignals | None = None


def stop_requested() -> bool:
    """Whether this process was asked to stop; False where no `StopSignals` is active."""
    return _active is not None and _active.requested is not None


def hold_signals() -> None:
    """Keep the signals back until a `StopSignals` is active, which then has them: for a process that still has to load
    what it needs to answer them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class StopSignals:
    """While active, the signals set `requested`; in the main thread only, elsewhere it does nothing.

    lead_seconds: how long the scheduler waits between its signal and SIGKILL; None: the process is never forced out. A
    second signal changes nothing.
    """

    def __init__(self, lead_seconds: float | None = None) -> None:
        self.requested: int | None = None
        """The first signal that came."""
        self._lead = lead_seconds
        self._before: dict[int, Any] = {}
        self._ears: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopSignals:
        global _active
        _active = self
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if self._lead is not None:
                self._ears = socket.socketpair()
                for end in self._ears:
                    end.setblocking(False)
                # Told at once, also while the main thread is inside one long call and runs no handler.
                signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(self._ears[0],), daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        _active = None
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
        if self._ears is not None:
            signal.set_wakeup_fd(-1)
            self._ears[1].close()  # ends the watching
            self._ears = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number

    def _watch(self, ear: socket.socket) -> None:
        assert self._lead is not None
        deadline: float | None = None
        name = ""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            if not select.select([ear], [], [], left)[0]:
                continue
            heard = ear.recv(64)
            if not heard:
                ear.close()
                return
            if deadline is None and (asked := [number for number in heard if number in SIGNALS]):
                deadline = time.monotonic() + self._lead * (1 - MARGIN)
                name = signal.Signals(asked[0]).name
        print(
            f"forced out shortly before the scheduler would kill this process ({name}, {self._lead:g} s ago); the last "
            "finished checkpoint is whole. Save more often (checkpoint.every), or ask for more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FORCED_OUT)
