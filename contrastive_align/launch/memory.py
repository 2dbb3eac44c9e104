"""Freed memory stays with the process: on a CPU, fresh pages for every activation cost a sixth of a training step.

For programs, which own their process; a library leaves the allocator alone.
"""

from __future__ import annotations

import ctypes
import os


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc to serve big blocks from its heap and to keep what is freed for the next one. True where it was asked.

    By default it gives every block of some megabytes back to the kernel, which clears its pages anew at the next step.
    What is kept is the process's peak; nothing else changes. Where the environment already tells malloc what to do
    (``MALLOC_...``, another allocator in ``LD_PRELOAD``), or on other systems, nothing is asked.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
