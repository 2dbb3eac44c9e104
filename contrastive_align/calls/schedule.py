"""Jobs that may have to wait before they are tried again, a bounded number at once."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar


Job = TypeVar("Job")

FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds, of waits that the server does not set
SPREAD = 0.1  # of a wait that it sets
BEGUN_PER_WORKER = 4
_JITTER = random.Random()  # not the global one, whose seed is the user's


def backoff(faults: int, retry_after: float | None) -> float:
    """Seconds to wait after so many faults in a row: twice as long each time, less up to half of it by chance.

    A server's ``Retry-After`` is the least that is waited; at most a tenth is added, so that not all come back at once.

    >>> 1.0 <= backoff(4, None) <= 2.0 and 10.0 <= backoff(1, retry_after=10) <= 10.25
    True
    """
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (faults - 1)) * _JITTER.uniform(0.5, 1.0)
    return wait if retry_after is None else retry_after + min(wait, SPREAD * retry_after)


def run_jobs(jobs: Iterable[Job], work: Callable[[Job], float | None], *, concurrency: int) -> None:
    """Call ``work(job)`` until each job is done, in at most ``concurrency`` threads.

    A job that waits occupies no thread. Jobs whose wait is over go before new ones, and no more than
    ``4 * concurrency`` are begun at a time: a server that refuses everything is not shown every job.

    Args:
        work: None when the job is done, else the seconds after which it must be called again.

    Raises:
        what ``work`` raises first; jobs in work are brought to the end of their call, no other is begun.
    """
    queue = _Queue(iter(jobs), BEGUN_PER_WORKER * concurrency)
    threads = [threading.Thread(target=_serve, args=(queue, work), daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the workers must not go on asking
        queue.stop(error)
        raise
    if queue.error is not None:
        raise queue.error


def _serve(queue: _Queue, work: Callable[[Job], float | None]) -> None:
    while (job := queue.next()) is not _END:
        try:
            queue.put_back(job, work(job))
        except BaseException as error:
            queue.stop(error)


_END = object()


class _Queue:
    def __init__(self, fresh: Iterable[Job], most_begun: int) -> None:
        self.error: BaseException | None = None
        self._fresh, self._most_begun = fresh, most_begun
        self._begun, self._exhausted = 0, False
        self._waiting: list[tuple[float, int, Job]] = []  # when, a tie-breaker, what
        self._number = itertools.count()
        self._changed = threading.Condition()

    def next(self) -> Job | object:
        """A job to do now, or the end; waits for either."""
        with self._changed:
            while self.error is None:
                wait = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._waiting)[-1]
                if self._begun < self._most_begun and not self._exhausted:
                    job = next(self._fresh, _END)
                    if job is not _END:
                        self._begun += 1
                        return job
                    self._exhausted = True
                if self._exhausted and not self._begun:
                    break
                self._changed.wait(wait)
            return _END

    def put_back(self, job: Job, wait: float | None) -> None:
        with self._changed:
            if wait is None:
                self._begun -= 1
            else:
                heapq.heappush(self._waiting, (time.monotonic() + wait, next(self._number), job))
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
