"""The table of f-DPG: base, target, tuned and tuned + QRS side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from contrastive_align.report.summary import Change, Summary, table


COLUMNS = ("base", "target", "tuned", "tuned+QRS")


@dataclass(frozen=True)
class Number:
    """A measured value; ``se`` is its standard error; None where it is exact, NaN or None where it is not known."""

    value: float
    se: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        digits = 4 if abs(self.value) < 10 else 2
        shown = f"{round(self.value, digits) + 0.0:.{digits}f}"  # never -0.0000
        return shown if self.se is None or math.isnan(self.se) else f"{shown} +- {self.se:.{digits}f}"


@dataclass
class TargetChange(Change):
    """A number under base, tuned model, target and QRS.

    Args:
        target: what is wanted; of a divergence to the base, that of the target itself.
        qrs: the same number with quasi-rejection sampling, None without; qrs_se its standard error.
        n: samples of each; ``se`` is taken over ``prompts``.
    """

    target: float | None = None
    qrs: float | None = None
    qrs_se: float | None = None
    prompts: int | None = None


@dataclass
class TargetSummary(Summary):
    """A :class:`Summary` with what was measured of each distribution: column -> row -> number."""

    distributions: dict[str, dict[str, Number]] = field(default_factory=dict)

    def closing(self) -> str:
        """Return the table after training."""
        lines = [f"measured on {self.metrics_on}", table(distribution_rows(self.distributions), numbers=True)]
        if not self.distributions:
            lines = []
        if self.state:
            lines.append(self.state)
        return "\n".join([*lines, table(list(self.saved.items()))])


def distribution_rows(distributions: Mapping[str, Mapping[str, Number]]) -> list[tuple[str, ...]]:
    """Return the cells of the table, header first; cells without a measurement are empty.

    >>> distribution_rows({"base": {"moment/x": Number(0.1, 0.01)}, "tuned": {"moment/x": Number(0.5)}})
    [('', 'base', 'tuned'), ('moment/x', '0.1000 +- 0.0100', '0.5000')]
    """
    columns = [name for name in COLUMNS if name in distributions]
    names = list(dict.fromkeys(name for column in columns for name in distributions[column]))
    cells = [
        (name, *(str(distributions[c][name]) if name in distributions[c] else "" for c in columns)) for name in names
    ]
    return [("", *columns), *cells]
