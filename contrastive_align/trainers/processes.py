"""What the processes of one run do together: act for all, stop in order on Ctrl-C or SIGTERM, and end."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy


T = TypeVar("T")

REPEATED = 2.0  # seconds within which the same signal counts once: a launcher hands on what the terminal sent already
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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


# ------------------------------------------------------------------------------------------------ stopping in order


class Stopped(SystemExit):
    """A signal ended the run: exit status 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class StopOnSignal(TrainerCallback):
    """Listen to signals, and end training after a step that all processes agree on.

    In training a first signal is kept until the step has ended: where checkpoints are saved, one is written. A second
    signal, and any outside of training, raises :class:`Stopped` at once. The processes agree by the largest signal
    that any of them had; it is asked for at the end of a step and read at the end of the next one, so that no step
    waits for it.

    Attributes:
        signal: the signal that training was ended by, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._heard = 0
        self._heard_at = 0.0
        self._training = False
        self._asked: _Agreement | None = None

    @contextmanager
    def listening(self, signals: Sequence[int]) -> Iterator[None]:
        """Take the place of the handlers of these signals inside the block, in the main thread."""
        is_main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._hear) for number in signals} if is_main_thread else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keep a signal until a step's end, inside the block."""
        self._training, self._heard, self.signal = True, 0, None
        try:
            yield
        finally:
            self._training, self._asked = False, None

    def _hear(self, number: int, frame: Any) -> None:
        if not self._training:
            raise Stopped(number)
        now = time.monotonic()
        if self._heard and now - self._heard_at > REPEATED:
            raise Stopped(number)
        if not self._heard:
            self._heard, self._heard_at = number, now
            if PartialState().is_main_process:
                print("\nStopping after this step. The same signal again stops at once.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training, with a checkpoint where checkpoints are saved, once all processes know of a signal."""
        number = self._heard
        if args.world_size > 1:
            number = 0 if self._asked is None else self._asked.read()
            self._asked = None if number else _Agreement(self._heard, args.device)
        if number:
            self.signal = number
        if number and not control.should_training_stop:  # else this was the last step
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a stop, nothing more is saved or evaluated."""
        if self.signal is not None:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in a signal of the last step; a collective that is left unread could meet another."""
        last = self._heard if args.world_size == 1 else 0 if self._asked is None else self._asked.read()
        self.signal, self._asked = self.signal or last or None, None


class _Agreement:
    """The largest of a number over all processes, asked for now and read later."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = torch.tensor([number], dtype=torch.int32, device=device)
        self.work = distributed.all_reduce(self.number, distributed.ReduceOp.MAX, async_op=True)
        self.event: torch.Event | None = None
        if device.type != "cpu":  # copied when it is there, without a wait
            self.work.wait()
            self.host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self.host.copy_(self.number, non_blocking=True)
            self.event = torch.Event(device)
            self.event.record()

    def read(self) -> int:
        if self.event is None:
            self.work.wait()
            return int(self.number)
        self.event.synchronize()
        return int(self.host)


# ------------------------------------------------------------------------------------------------------------- the end


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
