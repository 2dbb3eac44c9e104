"""``summary.json``: what ran and what changed. The tables on the screen are views of it."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contrastive_align.data.atomic import atomic_write


TIMES = (
    "seconds",
    "seconds_measuring",
    "tokens_per_second",
)  # of ``training``: two runs of one command differ in nothing else
SUMMARY_FILE = "summary.json"
UNFINISHED_FILE = "unfinished.json"  # what is known of a run that goes on or was broken off, for its page
CONSOLE = 120  # characters of a line
SHORT = 32  # characters of what stands in the corner of a table
COLUMNS = ("base", "target", "tuned", "tuned+QRS")


@dataclass
class Change:
    """A number before and after training: means over the same ``n`` groups or prompts, with their standard errors."""

    before: float
    after: float
    se: float  # of after - before, paired over the n
    n: int
    before_se: float | None = None
    after_se: float | None = None

    @classmethod
    def paired(cls, before: Sequence[float], after: Sequence[float]) -> Change:
        """Build the change from one number per prompt or group before and after, in the same order.

        >>> Change.paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]).se
        0.5773502691896257
        """
        differences = [b - a for a, b in zip(before, after, strict=True)]
        return cls(_mean(before), _mean(after), _se(differences), len(before), _se(before), _se(after))

    @property
    def units(self) -> int:
        """How many independent measurements ``se`` is taken over."""
        return self.n


@dataclass
class TargetChange(Change):
    """A number under base, tuned model, target and QRS; ``n`` counts the samples of each distribution."""

    target: float | None = None  # the wanted value; for the divergence from the base, that of the target itself
    qrs: float | None = None  # the number with quasi-rejection sampling
    qrs_se: float | None = None
    prompts: int | None = None  # over which se is taken

    @property
    def units(self) -> int:
        """Prompts, or the samples of a single one."""
        return self.prompts if self.prompts and self.prompts > 1 else self.n


@dataclass(frozen=True)
class Number:
    """A measured value and its standard error ``se``: None if the value is exact, NaN if it is not known."""

    value: float
    se: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        digits = 4 if abs(self.value) < 10 else 2
        shown = f"{round(self.value, digits) + 0.0:.{digits}f}"  # never -0.0000
        return shown if self.se is None or math.isnan(self.se) else f"{shown} +- {self.se:.{digits}f}"


@dataclass
class Summary:
    """The contents of ``summary.json``."""

    method: dict[str, Any]
    model: dict[str, Any]
    reference: str
    data: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Change] = field(default_factory=dict)
    metrics_on: str = ""
    state: str = ""
    saved: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # the options that were given
    preflight: dict[str, str] = field(default_factory=dict)  # what was checked before the first step, in words
    facts: dict[str, Any] = field(default_factory=dict)  # numbers of the data and options that the doctor reads
    samples: dict[str, Any] = field(default_factory=dict)  # of held-out prompts: number -> Change as a dictionary
    doctor: list[dict[str, Any]] = field(default_factory=list)  # findings, see report/doctor.py
    verdict: list[str] = field(default_factory=list)  # the findings in words

    def write(self, output_dir: str | os.PathLike) -> Path:
        """Write ``summary.json`` atomically, remove ``unfinished.json``, and return the path. NaN becomes null."""
        path = Path(output_dir) / SUMMARY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(self.contents(), indent=2, ensure_ascii=False).encode() + b"\n")
        path.with_name(UNFINISHED_FILE).unlink(missing_ok=True)
        return path

    def contents(self) -> dict[str, Any]:
        """Return what the file holds."""
        return _finite({**asdict(self), "table": self.measured_rows()})

    def opening(self) -> str:
        """Return the table before training."""
        rows = [("method", self.method["line"]), ("model", self.model["line"]), ("reference", self.reference)]
        rows += [("engine", self.engine["line"])] if self.engine else []
        read = {}
        for name, report in self.data.items():
            counts, how, columns = report["line"].partition(", read as ")
            said = "" if read.setdefault(columns, name) != name else how + columns  # once
            text = with_notes(counts + said, report["notes"])
            beside = f"{rows[-1][1]}; {name} data: {text}"
            if name != next(iter(self.data)) and len(beside) <= CONSOLE - len("first step  "):  # both on one line
                rows[-1] = (rows[-1][0], beside)
            else:
                rows.append((f"{name} data", text))
        return wrapped_table([*rows, *self.preflight.items()])

    def measured_rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table of what was measured, the header first; none where nothing was."""
        rows = [("", "before", "after", "change", "+- se", "n")]
        for name, c in self.metrics.items():
            rows.append((name, show(c.before), show(c.after), show(c.after - c.before), show(c.se), str(c.n)))
        return rows if self.metrics else []

    def closing(self) -> str:
        """Return the tables after training."""
        rows = self.measured_rows()
        said = f"on {self.metrics_on}"
        if rows and len(said) <= SHORT:  # the header has room for it
            rows[0], measured = (said, *rows[0][1:]), []
        else:
            measured = wrap(f"measured {said}")
        measured = [*measured, table(rows, numbers=True)] if rows else []
        words = [line for text in [*self.state.splitlines(), *self.verdict] for line in wrap(text)]
        return "\n".join([*measured, *words, wrapped_table(list(self.saved.items()))])


@dataclass
class TargetSummary(Summary):
    """A :class:`Summary` with the measurements of each distribution: column -> row -> number."""

    distributions: dict[str, dict[str, Number]] = field(default_factory=dict)
    tradeoff: list[dict[str, float]] = field(default_factory=list)  # of quasi-rejection sampling: rate, kl, tvd by beta

    def measured_rows(self) -> list[tuple[str, ...]]:
        """Return base, target, tuned and tuned + QRS side by side."""
        return distribution_rows(self.distributions) if self.distributions else []


def table(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Align columns of text; with ``numbers`` all but the first are right-aligned.

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


def wrapped_table(rows: Sequence[tuple[str, str]]) -> str:
    """Align two columns, the second of which is wrapped so that no line is longer than a console's ``CONSOLE``.

    >>> print(wrapped_table([("model", "a"), ("x", "b")]))
    model  a
    x      b
    """
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, text in rows:
        wrapped = wrap(text, CONSOLE - width - 2) or [""]
        lines += [f"{name if i == 0 else '':{width}}  {line}".rstrip() for i, line in enumerate(wrapped)]
    return "\n".join(lines)


def with_notes(line: str, notes: Sequence[str]) -> str:
    """Join what is said of a split of the data; full stops between the parts are left out.

    >>> with_notes("4 groups", ["columns not read: a.", "5 completions cut"])
    '4 groups; columns not read: a; 5 completions cut'
    """
    *first, last = [line, *notes]
    return "; ".join([*(part.removesuffix(".") for part in first), last])


def wrap(text: str, width: int = 0) -> list[str]:
    """Break a text into lines of a console, or of a width; words, such as paths, stay whole."""
    return textwrap.wrap(text, width or CONSOLE, break_long_words=False, break_on_hyphens=False)


def distribution_rows(distributions: Mapping[str, Mapping[str, Number]]) -> list[tuple[str, ...]]:
    """Return the cells of the table, the header first; a number that was not measured is left empty.

    A number of samples that is the same everywhere is left out: it is said above the table.

    >>> distribution_rows({"base": {"moment/x": Number(0.1, 0.01)}, "tuned": {"moment/x": Number(0.5)}})
    [('', 'base', 'tuned'), ('moment/x', '0.1000 +- 0.0100', '0.5000')]
    """
    columns = [name for name in COLUMNS if name in distributions]
    names = list(dict.fromkeys(name for column in columns for name in distributions[column]))
    if len({str(distributions[c]["samples"]) for c in columns if "samples" in distributions[c]}) == 1:
        names.remove("samples")
    labels = {name: name for name in names}
    if {"acceptance", "beta"} <= set(names):  # of quasi-rejection sampling alone
        labels["acceptance"] = f"acceptance, beta {distributions[columns[-1]]['beta']}"
        names.remove("beta")
    rows = [(labels[name], *(str(distributions[c].get(name, "")) for c in columns)) for name in names]
    return [("", *columns), *rows]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _se(values: Sequence[float]) -> float:
    n, mean = len(values), _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else float("nan")


def show(value: float) -> str:
    """Write a number with four digits after the point, fewer where it is large."""
    if math.isnan(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
