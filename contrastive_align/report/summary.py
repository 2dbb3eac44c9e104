"""``summary.json``: what ran and what it changed. The tables on the screen are views of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Change:
    """A number before and after training.

    Args:
        before, after: means over the same ``n`` groups or prompts.
        se: standard error of after - before, paired over the ``n``.
        n: how many.
        before_se, after_se: standard errors of the two means themselves, where they were measured.
    """

    before: float
    after: float
    se: float
    n: int
    before_se: float | None = None
    after_se: float | None = None

    @classmethod
    def paired(cls, before: Sequence[float], after: Sequence[float]) -> Change:
        """From one number per prompt or group, in the same order.

        >>> Change.paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]).se
        0.5773502691896257
        """
        differences = [b - a for a, b in zip(before, after, strict=True)]
        return cls(_mean(before), _mean(after), _se(differences), len(before), _se(before), _se(after))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _se(values: Sequence[float]) -> float:
    n, mean = len(values), _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else float("nan")


@dataclass
class Summary:
    """Everything ``summary.json`` holds."""

    method: dict[str, Any]
    model: dict[str, Any]
    reference: str
    data: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Change] = field(default_factory=dict)
    metrics_on: str = ""
    state: str = ""
    saved: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, output_dir: str | os.PathLike) -> Path:
        """Write ``summary.json`` whole or not at all. NaN becomes null."""
        path = Path(output_dir) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".json.incomplete")
        aside.write_text(json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)
        return path

    def opening(self) -> str:
        """Return the table before training."""
        rows = [("method", self.method["line"]), ("model", self.model["line"]), ("reference", self.reference)]
        for name, report in self.data.items():
            rows.append((f"{name} data", report["line"]))
            rows += [("", line) for line in report["notes"]]
        return table(rows)

    def closing(self) -> str:
        """Return the tables after training."""
        rows = [("", "before", "after", "change", "+- se", "n")]
        for name, c in self.metrics.items():
            rows.append((name, _show(c.before), _show(c.after), _show(c.after - c.before), _show(c.se), str(c.n)))
        lines = [f"measured on {self.metrics_on}", table(rows, numbers=True)] if self.metrics else []
        if self.state:
            lines.append(self.state)
        return "\n".join([*lines, table(list(self.saved.items()))])


def table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Aligned columns; with ``numbers`` all but the first are right-aligned.

    >>> print(table([("", "before"), ("x", "1.0")], numbers=True))
       before
    x     1.0
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) if numbers else c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _show(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
