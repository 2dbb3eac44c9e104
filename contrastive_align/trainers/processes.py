"""What several processes of one run do together."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

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


def leave_process_group() -> None:
    """End a run of several processes in order, once no local variable holds its trainer any more.

    All arrive before one leaves, so that none ends while another still talks to it. The threads of the group are joined
    when it is collected: a gloo thread that drops its last tensors while Python shuts down aborts the process.
    """
    if distributed.is_initialized():
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    gc.collect()
