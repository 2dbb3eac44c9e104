"""How the command imports torch and what stands on it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def wait_briefly() -> None:
    """Let OpenMP's threads (GNU's, as in torch for Linux) spin 1,000 times before they sleep; call it before torch.

    They meet at the end of each operation. By default one that waits for the other spins for milliseconds, on a core
    that the other may need: beside two busy processes on two cores that takes twice as long. On two free cores threads
    that sleep at once take half as long again (benchmarks/waiting_threads.py). Either variable of the user's own stays
    in force.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, and keep it from what the first import made: 1 s of 5 is walking it.

    The objects are handed back to it at exit, as libraries of C++ (triton's bindings) report what it leaves over.
    """
    collecting, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            atexit.register(gc.unfreeze)
        if collecting:
            gc.enable()
