"""How long a call is waited for: far longer than others took, so that one that hangs does not hold its place."""

from __future__ import annotations

import threading
from collections import deque


ENOUGH = 10  # answers to judge by
RECENT = 200
TIMES, LEAST = 4.0, 0.2  # the 95th percentile of recent answers; seconds
GROWTH = 2.0  # with every call of a job that was given up


class Patience:
    """Learns from the answers there were, late ones too.

    A call is given 4 times the 95th percentile of the last 200 answers' seconds, and twice as long with every call for
    the same job that was given up, up to the timeout. What is given up may still be answered: that answer is taken.

    Args:
        timeout: seconds, the longest patience, and the one of the first calls and of last tries.

    >>> patience = Patience(60.0)
    >>> patience.seconds(given_up=0)
    60.0
    >>> for _ in range(10):
    ...     patience.learn(0.5)
    >>> [patience.seconds(given_up) for given_up in range(6)]
    [2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def learn(self, seconds: float) -> None:
        """An answer came after so long."""
        with self._lock:
            self._recent.append(seconds)

    def seconds(self, given_up: int) -> float:
        """For a call of a job of which so many calls were given up."""
        with self._lock:
            recent = sorted(self._recent)
        if len(recent) < ENOUGH:
            return self._timeout
        usual = recent[int(0.95 * len(recent))]
        return min(self._timeout, max(LEAST, TIMES * usual) * GROWTH**given_up)
