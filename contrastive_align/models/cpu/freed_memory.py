"""Keep freed memory in the process, so that activations reuse pages instead of getting fresh ones.

glibc returns every block of some megabytes to the kernel when it is freed, and the kernel clears the pages again for
the next block. Keeping them saves a tenth to a quarter of a training step on a CPU at K = 16.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # serve large blocks from the heap, too, and never shrink it
# glibc adapts its thresholds to these values once blocks as large as a layer's activations have been freed.
_RESTORE = {_MMAP_MAX: 2**16, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}

_requests = 0  # how many callers want freed memory kept at present


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory from now on, and return whether it was told.

    For programs, which own their process. The process then stays at its peak memory; nothing else changes. The
    environment takes precedence (``MALLOC_...``, ``GLIBC_TUNABLES``, another allocator in ``LD_PRELOAD``). Other
    systems than glibc's are left alone.
    """
    global _requests
    told = _set_malloc_options(_KEEP)
    _requests += told
    return told


@contextmanager
def freed_memory_kept(device_type: str, *, hand_back: bool = True) -> Iterator[None]:
    """Keep freed memory inside the ``with`` block if ``device_type`` is ``"cpu"``, then restore malloc's options.

    ``hand_back`` returns it to the kernel at the end. Without, all but the end of the heap is left to the next block.
    """
    global _requests
    told = device_type == "cpu" and _set_malloc_options(_KEEP)
    _requests += told
    try:
        yield
    finally:
        _requests -= told
        if told and not _requests:
            _set_malloc_options(_RESTORE)
            if hand_back:
                ctypes.CDLL(None).malloc_trim(0)


def _set_malloc_options(options: dict[int, int]) -> bool:
    """Call ``mallopt`` unless the environment configures malloc, and return whether all options were set."""
    configured = "LD_PRELOAD" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if configured or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows
        return False
    return all([mallopt(option, value) for option, value in options.items()])
