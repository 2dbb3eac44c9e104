"""How the command imports torch and what stands on it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def wait_briefly() -> None:
    """Let OpenMP's threads (GNU's, as in torch for Linux) spin 20,000 times before they sleep; call it before torch.

    They meet at the end of each operation. By default one that waits for the other spins for milliseconds, on a core
    that the other may need: beside six busy processes on two cores, f-DPG's first line came after 65 s, and comes
    after 7 to 10. On two free cores the demo takes as long as before (12 s; threads that sleep at once: 16 to 20).
    Either variable of the user's own stays in force.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


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
