"""What reward functions log by ``log_metric`` and ``log_extra``, until the trainer logs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging


logger = logging.get_logger(__name__)


class RewardLog:
    """The numbers and columns that reward functions have logged on this process.

    Args:
        has_table: whether completions are logged as a table, which the columns belong to. Without one a column is named
            and not kept.

    >>> log = RewardLog()
    >>> log.keywords["log_metric"]("share", 0.25), log.keywords["log_metric"]("share", 0.75)
    (None, None)
    >>> log.take_metrics()
    {'share': 0.5}
    """

    def __init__(self, *, has_table: bool = True) -> None:
        self.has_table = has_table
        self._numbers: dict[str, list[float]] = defaultdict(list)
        self._columns: dict[str, list[Any]] = defaultdict(list)

    @property
    def keywords(self) -> dict[str, Callable]:
        """The arguments of these names that TRL gives a reward function."""
        return {
            "log_metric": lambda name, value: self._numbers[name].append(float(value)),
            "log_extra": self._add_column,
        }

    def _add_column(self, column: str, values: Sequence[Any]) -> None:
        if self.has_table:
            self._columns[column].extend(values)
        else:
            logger.warning_once(
                f"log_extra({column!r}) is not kept: a run in rounds logs no table of completions. They are in the "
                "pool, each with its score; log numbers by log_metric."
            )

    def take_metrics(self) -> dict[str, float]:
        """Return the mean of each metric over all processes, and forget them. To be called on every process."""
        everywhere, found = gather_object([dict(self._numbers)]), {}
        for name in sorted({name for part in everywhere for name in part}):
            values = [value for part in everywhere for value in part.get(name, ())]
            found[name] = sum(values) / len(values)
        self._numbers.clear()
        return found

    def take_columns(self, n: int) -> dict[str, list[Any]]:
        """Return each column for the n completions of every process, None where there is no value, and forget them."""
        everywhere = gather_object([(n, dict(self._columns))])
        names = sorted({name for _, columns in everywhere for name in columns})
        self._columns.clear()
        return {
            name: [v for size, columns in everywhere for v in (columns.get(name, []) + [None] * size)[:size]]
            for name in names
        }
