"""What several processes of one run do together."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed
from transformers import TrainerCallback


T = TypeVar("T")


def on_main(function: Callable[..., T], *args: Any) -> T:
    """Call a function on the main process alone; all return, or raise, what it does there."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [function(*args)]
        except Exception as error:  # all raise it: the others would wait for the main process
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


_kept: list[Any] = []


def keep_to_the_end(thing: Any) -> None:
    """Keep the trainers of a run of several processes alive until :func:`end_one_of_several`."""
    if distributed.is_initialized():
        _kept.append(thing)


def end_one_of_several(status: int | str | None = 0) -> None:
    """End this process as ``sys.exit`` does, without Python's shutdown; return where it is the only one.

    A gloo thread that drops the tensors of the last collective needs the interpreter's lock. At shutdown it aborts the
    process; and whoever drops the last trainer joins the thread with that lock in hand, and waits for ever.
    """
    if not _kept:
        return
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class EndsWorkers(TrainerCallback):
    """End the workers of the training loader with their process, however it ends.

    After a SIGKILL, a worker of torch's that has large batches to hand over waits for ever for someone to read them.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Tell the loader, before it starts its workers."""
        if getattr(train_dataloader, "num_workers", 0):
            train_dataloader.worker_init_fn = partial(end_with_parent, train_dataloader.worker_init_fn)


def end_with_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """Have this process killed when its parent ends, on Linux; then do what else a worker begins with."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if then is not None:
        then(worker)
