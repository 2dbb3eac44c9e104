"""``report.html``: a run, or several side by side, in one file without scripts, fonts or network."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from contrastive_align.data.atomic import atomic_write
from contrastive_align.report.charts import Chart, swatch
from contrastive_align.report.curves import (
    acceptance_chart,
    acceptance_charts_of_runs,
    charts_of_run,
    charts_of_runs,
    wanted_moments,
)
from contrastive_align.report.doctor import RULES, Diagnosis, diagnose
from contrastive_align.report.history import History, read_history, read_json
from contrastive_align.report.summary import SUMMARY_FILE, UNFINISHED_FILE, Change, TargetChange, show, with_notes
from contrastive_align.report.texts import clean
from contrastive_align.report.words import interval


PAGE = "report.html"
SAMPLES_FILE = "samples.json"
MOST_PAIRS = 20_000  # of equal words in two texts that are compared word by word


@dataclass
class RunView:
    """A run as the page shows it."""

    name: str
    summary: Mapping[str, Any]
    history: History = field(default_factory=History)
    samples: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""  # as it was given; empty for a run that is going on

    @classmethod
    def read(cls, folder: str | os.PathLike) -> RunView:
        """Read a run's folder, or that of a checkpoint or of a trainer without a command.

        Raises:
            FileNotFoundError: it holds neither ``summary.json`` nor ``unfinished.json`` nor a log.
            ValueError: a file that is cut, or not one of a run.
        """
        path = Path(folder)
        history = read_history(path)
        file = next((path / name for name in (SUMMARY_FILE, UNFINISHED_FILE) if (path / name).is_file()), None)
        summary = _read_parts(file, _SUMMARY) if file else {}
        if written := re.fullmatch(r"(\d+) of (\d+)", summary.get("unfinished", "")):  # the log may go on after it
            summary["unfinished"] = f"{max(int(written[1]), history.last_step):g} of {written[2]}"
        if not summary and not history.curves:
            raise FileNotFoundError(
                f"{folder} holds no run: expected summary.json, log.jsonl or a checkpoint's trainer_state.json."
            )
        samples = path / SAMPLES_FILE
        found = _read_parts(samples, _SAMPLES) if samples.is_file() else {}
        return cls(path.resolve().name, summary, history, found, str(folder))

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """What the doctor says."""
        return diagnose(self.summary, self.history)

    @property
    def words(self) -> list[str]:
        """What the run's own measurements say."""
        return [line for line in self.summary.get("state", "").splitlines() if line]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What ran: the rows of the table."""
        found, rows = self.summary, []
        for name in ("method", "model"):
            if found.get(name):
                rows.append((name, found[name]["line"]))
        if found.get("reference"):
            rows.append(("reference", found["reference"]))
        for split, report in found.get("data", {}).items():
            rows.append((f"{split} data", with_notes(report["line"], report["notes"])))
        if found.get("engine"):
            rows.append(("engine", found["engine"]["line"]))
        if found.get("training"):
            steps, seconds = found["training"].get("steps"), found["training"].get("seconds")
            rows.append(("training", f"{steps} steps in {seconds} s"))
        if found.get("versions"):
            rows.append(("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items())))
        if found.get("command"):
            rows.append(("command", found["command"]))
        return rows

    @property
    def metrics(self) -> list[tuple[str, ...]]:
        """The rows of the table of metrics: before, after, change, 95% interval, n."""
        known = {"before", "after", "se", "n", "before_se", "after_se", "prompts"}
        rows = []
        for name, found in {**self.summary.get("metrics", {}), **_prefixed(self.summary.get("samples", {}))}.items():
            values = {key: math.nan if value is None else value for key, value in found.items() if key in known}
            change = TargetChange(**values) if "prompts" in values else Change(**values)
            low, high = interval(change)
            between = f"{show(low)} to {show(high)}" if math.isfinite(low) else "not known"
            moved = show(change.after - change.before)
            rows.append((name, show(change.before), show(change.after), moved, between, str(change.n)))
        return rows

    @property
    def distributions(self) -> list[list[str]]:
        """The table of base, target, tuned model and quasi-rejection sampling (f-DPG)."""
        return self.summary.get("table", []) if self.summary.get("distributions") else []

    @property
    def charts(self) -> list[Any]:
        """The charts of this run alone."""
        charts = charts_of_run(self.history, wanted_moments(self.summary))
        tradeoff = acceptance_chart(self.summary.get("tradeoff", []))
        return charts if tradeoff is None else [*charts, tradeoff]

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """The times at which the held-out prompts were sampled: first, up to two between, and last."""
        found = self.samples.get("stages", [])
        if len(found) <= 4:
            return found
        return [found[0], found[len(found) // 3], found[2 * len(found) // 3], found[-1]]


def _prefixed(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"samples/{name}": change for name, change in changes.items()}


@dataclass(frozen=True)
class _Part:
    """What the page expects of a part of a file: its type, its keys, and those of each mapping inside."""

    kind: type
    keys: frozenset[str] = frozenset()
    each: frozenset[str] | None = None

    def describes(self, value: Any) -> bool:
        inner = value.values() if isinstance(value, dict) else value
        return (
            isinstance(value, self.kind)
            and (not self.keys or self.keys <= value.keys())
            and (self.each is None or all(isinstance(one, dict) and self.each <= one.keys() for one in inner))
        )

    def __str__(self) -> str:
        keys = self.keys if self.each is None else self.each
        of = "" if self.each is None else " of mappings"
        return {dict: "a mapping", list: "a list", str: "a text"}[self.kind] + of + f" with {sorted(keys)}" * bool(keys)


_MAPPING, _LINE = _Part(dict), _Part(dict, frozenset({"line"}))
_CHANGES = _Part(dict, each=frozenset({"before", "after", "se", "n"}))
_STAGE = frozenset({"name", "step", "texts", "rewards", "lengths", "ended"})
# Each part may be left out.
_SUMMARY = {
    **dict.fromkeys(("method", "model", "engine"), _LINE),
    **dict.fromkeys(("training", "versions", "preflight", "facts", "settings", "distributions"), _MAPPING),
    **dict.fromkeys(("state", "metrics_on", "reference", "command", "unfinished", "stopped"), _Part(str)),
    **dict.fromkeys(("metrics", "samples"), _CHANGES),
    "data": _Part(dict, each=frozenset({"line", "notes"})),
    "table": _Part(list),
    "tradeoff": _Part(list, each=frozenset({"rate", "kl", "tvd", "kl_se", "tvd_se"})),
}
_SAMPLES = {
    **dict.fromkeys(("about", "reward_name"), _Part(str)),
    "prompts": _Part(list),
    "moved": _MAPPING,
    "stages": _Part(list, each=_STAGE),
}
_AWAY = "Give the output_dir of a run, or move this file away to see the rest."


def _read_parts(path: Path, parts: Mapping[str, _Part]) -> dict[str, Any]:
    """Read a file of a run, without the parts that are empty, and check what the page reads of it.

    Raises:
        ValueError: it is cut, or not of a run.
    """
    found = {name: value for name, value in read_json(path).items() if value not in (None, {}, [])}
    for name, part in parts.items():
        if name in found and not part.describes(found[name]):
            shown = _plain(found[name])[:80]
            raise ValueError(f"{path} is not that of a run: expected '{name}' to be {part}, found {shown}. {_AWAY}")
    if "stages" in parts and "stages" in found:
        missing = [name for name in ("about", "prompts", "reward_name") if name not in found]
        if missing:
            raise ValueError(f"{path} is not that of a run: it has samples, but lacks '{missing[0]}'. {_AWAY}")
        n = len(found["prompts"])
        for stage in found["stages"]:
            sizes = {len(stage[key]) for key in ("texts", "rewards", "lengths", "ended")}
            if sizes != {n}:
                raise ValueError(
                    f"{path} is not that of a run: expected {n} samples in stage '{stage['name']}', one for each "
                    f"prompt, found {min(sizes)}. {_AWAY}"
                )
    return found


def write_page(runs: Sequence[RunView], path: str | os.PathLike) -> Path:
    """Write the page of one run, or of several side by side, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(render(runs).encode("utf-8"))
    return path


def render(runs: Sequence[RunView]) -> str:
    """Return the page as HTML. Every text of users, models and judges is escaped by the template."""
    names = unique_names([run.name for run in runs])
    template = _environment().get_template("page.html.jinja")
    several = len(runs) > 1
    charts = charts_beside(dict(zip(names, runs, strict=True))) if several else runs[0].charts
    differing = settings_that_differ([run.summary for run in runs]) if several else []
    return template.render(
        runs=list(zip(names, runs, strict=True)),
        several=several,
        charts=charts,
        differing=differing,
        aligned=align_samples(runs) if several else [],
        rules=RULES,
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
    )


def charts_beside(runs: Mapping[str, RunView]) -> list[Chart]:
    """Return the charts of several runs, by name."""
    histories = {name: run.history for name, run in runs.items()}
    charts = charts_of_runs(histories, {name: wanted_moments(run.summary) for name, run in runs.items()})
    return charts + acceptance_charts_of_runs({name: run.summary.get("tradeoff", []) for name, run in runs.items()})


def unique_names(names: Sequence[str]) -> list[str]:
    """Add a number to names that stand for more than one run.

    >>> unique_names(["a", "b", "a"])
    ['a', 'b', 'a (3)']
    """
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


def settings_that_differ(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ, with each run's value.

    >>> settings_that_differ([{"method": {"beta": 0.1, "seed": 1}}, {"method": {"beta": 0.5, "seed": 1}}])
    [('method beta', ['0.1', '0.5'])]
    """
    parts = ("method", "model", "settings", "engine", "versions")
    flat = [
        {f"{part} {key}": value for part in parts for key, value in summary.get(part, {}).items() if key != "line"}
        for summary in summaries
    ]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [_plain(one.get(name, "(not given)")) for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def align_samples(runs: Sequence[RunView]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the prompts that several runs sampled at their end, with each run's sample and reward."""
    last: list[dict[str, Any]] = [{} for _ in runs]
    for found, run in zip(last, runs, strict=True):
        for stage in run.stages[-1:]:
            found.update(zip(run.samples["prompts"], zip(stage["texts"], stage["rewards"], strict=True), strict=True))
    prompts = dict.fromkeys(prompt for one in last for prompt in one)
    shared = [prompt for prompt in prompts if sum(prompt in one for one in last) > 1]
    return [(prompt, [one.get(prompt, ("", None)) for one in last]) for prompt in shared[:10]]


def marked(before: str, after: str) -> Markup:
    """Return a text, escaped, in which the words that another one lacks are marked.

    >>> print(marked("a plain <b> answer", "a better <b> answer"))
    a <ins>better</ins> &lt;b&gt; answer
    """
    old, new = (re.findall(r"\S+\s*|\s+", clean(text)) for text in (before, after))
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    known = Counter(old)
    if sum(known[word] for word in new) > MOST_PAIRS:  # a text that repeats itself, whose comparison takes long
        matcher = difflib.SequenceMatcher(a=["".join(old)], b=["".join(new)])
        new = ["".join(new)]
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        text = "".join(new[start:end])
        said = text.rstrip()
        space = text[len(said) :]
        parts.append(f"<ins>{escape(said)}</ins>{space}" if kind in ("replace", "insert") and said else escape(text))
    return Markup("".join(parts))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("contrastive_align.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "number": _number, "breakable": breakable}
    environment.globals |= {"marked": marked, "swatch": swatch}
    return environment


def breakable(name: str) -> Markup:
    """Return a metric's name, escaped, that a narrow table breaks between its parts.

    >>> print(breakable("moment/contains:please"))
    moment/<wbr>contains:<wbr>please
    """
    return Markup("<wbr>").join(re.split(r"(?<=[/:_])(?=.)", clean(name)))


def _number(value: Any) -> str:
    return "" if value is None else show(float(value))
