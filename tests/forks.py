"""`CONTEXT`: processes forked from one that has imported everything, so that a start takes no seconds of a core."""

from __future__ import annotations

import multiprocessing

__all__ = ["CONTEXT"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
