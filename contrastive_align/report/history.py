"""What a run logged: ``log.jsonl`` and its curves, in a memory that does not grow with the number of steps."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


LOG_FILE = "log.jsonl"  # one JSON object for each entry of the trainer's log
MOST_POINTS = 240  # of a curve in a picture, whose width is about as many pixels
_NOT_METRICS = ("step", "epoch", "total_flos")


@dataclass
class Point:
    """Consecutive values of a metric: their number, mean, extent and the steps they were logged at."""

    first: float
    last: float
    n: int
    mean: float
    low: float
    high: float

    @property
    def step(self) -> float:
        """The middle of the steps."""
        return (self.first + self.last) / 2

    def join(self, other: Point) -> Point:
        """Return the point of both."""
        n = self.n + other.n
        mean = self.mean + (other.mean - self.mean) * other.n / n
        return Point(self.first, other.last, n, mean, min(self.low, other.low), max(self.high, other.high))


class Curve:
    """A metric over the steps, kept as at most ``2 * MOST_POINTS`` points of equally many values.

    >>> curve = Curve()
    >>> for step in range(100_000):
    ...     curve.add(step, float(step % 2))
    >>> len(curve.points) <= 2 * MOST_POINTS, curve.n, curve.points[0].mean, curve.points[0].high
    (True, 100000, 0.5, 1.0)
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.n = 0
        self.not_finite = 0
        self.ends_finite = True  # whether the last value is
        self._size = 1  # values of a full point

    def add(self, step: float, value: float) -> None:
        """Append a value; one that is not finite is counted only."""
        self.ends_finite = math.isfinite(value)
        if not self.ends_finite:
            self.not_finite += 1
            return
        self.n += 1
        new = Point(step, step, 1, value, value, value)
        if self.points and self.points[-1].n < self._size:
            self.points[-1] = self.points[-1].join(new)
            return
        self.points.append(new)
        if len(self.points) > 2 * MOST_POINTS:
            halves = [a.join(b) for a, b in zip(self.points[::2], self.points[1::2], strict=False)]
            self.points = halves + self.points[len(self.points) // 2 * 2 :]
            self._size *= 2

    @property
    def first(self) -> float:
        """The mean of the first point, which is the first value of a short curve."""
        return self.points[0].mean

    @property
    def last(self) -> float:
        """The mean of the last point."""
        return self.points[-1].mean

    @property
    def lowest(self) -> float:
        """The lowest mean of a point."""
        return min(point.mean for point in self.points)

    @property
    def highest(self) -> float:
        """The highest mean of a point."""
        return max(point.mean for point in self.points)

    def end(self, share: float = 0.2) -> float:
        """Return the mean of the last part of the values, at least of one point.

        >>> curve = Curve()
        >>> for step, value in enumerate([9.0, 9.0, 9.0, 1.0, 3.0]):
        ...     curve.add(step, value)
        >>> curve.end(0.4)
        2.0
        """
        points = self.points[-max(1, math.ceil(share * len(self.points))) :]
        return sum(p.mean * p.n for p in points) / sum(p.n for p in points)


class History:
    """The curves of a run: name of a metric -> :class:`Curve`."""

    def __init__(self, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        self.curves: dict[str, Curve] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add one entry of the trainer's log, in which null stands for a value that is not finite."""
        step = entry.get("step", 0)
        for name, value in entry.items():
            value = math.nan if value is None else value
            if name not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool):
                self.curves.setdefault(name, Curve()).add(step, value)

    def __contains__(self, name: str) -> bool:
        return name in self.curves and bool(self.curves[name].points)

    def __getitem__(self, name: str) -> Curve:
        return self.curves[name]

    @property
    def last_step(self) -> float:
        """The last step at which a finite value was logged; 0 where none was."""
        return max((curve.points[-1].last for curve in self.curves.values() if curve.points), default=0)

    def names(self, prefix: str = "") -> list[str]:
        """Return the metrics that begin so and have a finite value."""
        return [name for name in self.curves if name.startswith(prefix) and name in self]


def read_history(folder: str | os.PathLike) -> History:
    """Read ``log.jsonl`` of a run or, where no command wrote it, the last checkpoint's ``trainer_state.json``.

    Raises:
        ValueError: a ``trainer_state.json`` that is cut.
    """
    folder = Path(folder)
    if (folder / LOG_FILE).is_file():
        return History(read_entries(folder / LOG_FILE))
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: in_order(path.parent.name))
    states = [read_json(path) for path in (*checkpoints[-1:], *folder.glob("trainer_state.json"))]
    last = max(states, key=lambda state: state.get("global_step") or 0, default={})
    return History(entry for entry in last.get("log_history", []) if isinstance(entry, dict))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: it is cut, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is cut or no JSON ({error}), expected the file of a run. Make the run again, or move the file "
            "away to see the rest."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, expected a mapping, as a run writes it. Move the file away to see "
            "the rest."
        )
    return found


def in_order(name: str) -> list[Any]:
    """Return a key that sorts names by the numbers in them.

    >>> sorted(["rank_10", "rank_2"], key=in_order)
    ['rank_2', 'rank_10']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log; a last line that an interruption cut is left out."""
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
