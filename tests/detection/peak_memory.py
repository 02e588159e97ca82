"""How much memory a call takes, in a process of its own. Linux only."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["peak_memory"]

_PROGRAM = """
import threading, time
{setup}

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

seen, stop = [], threading.Event()

def watch():
    while not stop.is_set():
        seen.append(anonymous())
        time.sleep(0.001)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
{call}
stop.set()
thread.join()
print("peak", max(seen) - before)
"""


def peak_memory(setup: str, call: str) -> float:
    """MiB that `call` takes at most beyond what `setup` left, without pages of files that are mapped into memory."""
    program = _PROGRAM.format(setup=setup, call=call)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("peak ")[1].split()[0])
