"""What several processes of one run do together."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed


T = TypeVar("T")


def on_main(function: Callable[..., T], *args: Any) -> T:
    """Call a function on the main process alone; all return, or raise, what it does there."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [function(*args)]
        except (
            Exception
        ) as error:  # raised on every process, not on the main one alone, for which the others would wait
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


_kept: list[Any] = []


def keep_to_the_end(thing: Any) -> None:
    """Keep the trainers of a run of several processes alive until :func:`end_process`."""
    if distributed.is_initialized():
        _kept.append(thing)


def end_process(status: int | str | None = 0) -> NoReturn:
    """End a process as ``sys.exit`` does; one of several without Python's shutdown.

    A gloo thread that drops the tensors of the last collective needs the interpreter's lock. At shutdown it aborts the
    process; and whoever drops the last trainer joins the thread with that lock in hand, and waits for ever.
    """
    if not _kept:
        sys.exit(status)
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
