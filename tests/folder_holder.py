"""Another process that holds a folder, as a second run would."""

import contextlib
import multiprocessing
import time

from contrastive_align.data.folder_lock import folder_held


def _hold(folder, held):
    with folder_held(folder):
        held.set()
        time.sleep(100)


@contextlib.contextmanager
def held_by_another(folder):
    """Give the process, which is killed at the end; forked, so that nothing is imported again."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(folder, held), daemon=True)
    process.start()
    try:
        assert held.wait(20)
        yield process
    finally:
        process.kill()
        process.join()
