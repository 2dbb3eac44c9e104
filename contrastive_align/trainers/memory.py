"""Freed memory stays with the process: on a CPU, fresh pages for every activation cost up to a quarter of a step.

glibc gives every block of some megabytes back to the kernel when it is freed, which clears its pages anew when the next
one is asked for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # big blocks from the heap, too, and its end is never given back
# glibc's own, where its thresholds arrive by themselves once blocks as big as a layer's activations have been freed.
_AS_BEFORE = {_MMAP_MAX: 2**16, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}

_holders = 0  # who want it kept at present


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed for the next block, from now on. True where it was asked.

    For programs, which own their process. What is kept is the process's peak; nothing else changes. Where the
    environment already tells malloc what to do (``MALLOC_...``, ``GLIBC_TUNABLES``, another allocator in
    ``LD_PRELOAD``), or on other systems, nothing is asked.
    """
    global _holders
    asked = _ask(_KEEP)
    _holders += asked
    return asked


@contextmanager
def freed_memory_kept(device_type: str, *, hand_back: bool = True) -> Iterator[None]:
    """The same for a while, if ``device_type`` is ``"cpu"``; then malloc is as it was, and all is handed back.

    Args:
        hand_back: ``False`` leaves it, but for the end of the heap, to the next time, as a step's to the next step.
    """
    global _holders
    asked = device_type == "cpu" and _ask(_KEEP)
    _holders += asked
    try:
        yield
    finally:
        _holders -= asked
        if asked and not _holders:
            _ask(_AS_BEFORE)
            if hand_back:
                ctypes.CDLL(None).malloc_trim(0)


class KeepsFreedMemory:
    """For a trainer: on a CPU its activations come on pages that the process has already, until training ends."""

    def train(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type, hand_back=False):  # in a loop of somebody's own, too
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        with freed_memory_kept(self.args.device.type):
            return super().evaluation_loop(*args, **kwargs)


def _ask(options: dict[int, int]) -> bool:
    told = "LD_PRELOAD" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows
        return False
    return all([mallopt(option, value) for option, value in options.items()])
