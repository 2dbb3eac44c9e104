"""Which curves a page shows: of one run several metrics in a chart, of several runs one metric in each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from contrastive_align.report.charts import COLOURS, Chart, Line
from contrastive_align.report.history import Curve, History, Point, in_order


LONG = 40  # points from which on neighbours are joined


@dataclass(frozen=True)
class View:
    """A chart's title, what it shows, and its metrics; one that ends in ``*`` stands for all that begin so."""

    title: str
    about: str
    metrics: tuple[tuple[str, str], ...]  # metric -> label
    x: str = "step"
    most: float = math.inf  # that a value can be
    otherwise: tuple[tuple[str, str], ...] = ()  # a metric -> what the chart shows of runs that logged it

    def about_run(self, history: History) -> str:
        """Say what the chart shows of this run."""
        return next((about for metric, about in self.otherwise if metric in history), self.about)


OWN_GROUPS = "round/resampled"  # logged by runs that are trained on groups of their own samples
ANEW = "A round that has a reference of its own begins anew."
RANKS = (("rewards/rank_*", "rank "),)
VIEWS = (
    View(
        "Loss",
        "Training and evaluation should fall together.",
        (("loss", "training"), ("eval_loss", "evaluation"), ("nll", "likelihood term"), ("kl", "KL term")),
        otherwise=(
            ("kl_target", "Only its gradient means something: that of the divergence. Its value need not fall."),
            (OWN_GROUPS, f"It should fall within a round. {ANEW}"),
            ("nll", "The likelihood term and the KL term, less the entropy bonus. It should fall."),
        ),
    ),
    View(
        "Implied rewards by rank",
        "Beta times the log-ratio to the reference. Rank 0, the best score, should be on top and the order kept.",
        RANKS,
    ),
    View(
        "Log-probs since the reference",
        "In nats. The best should not fall; the others should.",
        (
            ("logps/best_delta", "best"),
            ("logps/rest_delta", "others"),
            ("eval_logps/best_delta", "best, evaluation"),
            ("eval_logps/rest_delta", "others, evaluation"),
        ),
        otherwise=((OWN_GROUPS, f"In nats. Within a round the best should not fall; the others should. {ANEW}"),),
    ),
    View(
        "Margin",
        "The implied reward of the best less the mean of the others. It should open.",
        (("rewards/margins", "training"), ("eval_rewards/margins", "evaluation")),
        otherwise=((OWN_GROUPS, f"The implied reward of the best less the mean of the others. {ANEW}"),),
    ),
    View(
        "Accuracy",
        "How often the best-scored completion has the highest implied reward, and how many pairs are in order.",
        (
            ("rewards/accuracies", "best is highest"),
            ("rewards/pair_accuracies", "best beats another"),
            ("rewards/kendall_tau", "Kendall's tau"),
            ("eval_rewards/accuracies", "best is highest, evaluation"),
        ),
        most=1.0,
    ),
    View(
        "Moments",
        "Means of the features over samples. They should reach the dotted line.",
        (("moment/*", ""),),
    ),
    View(
        "Divergences",
        "In nats (TV: 0 to 1). Those from the target should fall towards 0; KL(pi || base) is the way gone.",
        (
            ("kl_target", "KL(p || pi)"),
            ("reverse_kl_target", "KL(pi || p)"),
            ("js_target", "JS"),
            ("tv_target", "TV"),
            ("kl_base", "KL(pi || base)"),
        ),
    ),
    View(
        "Effective sample size",
        "How many of a step's samples count, weighted towards the target or the policy. Low is noisy.",
        (("moment/target/ess", "towards the target"), ("reverse_kl_target/ess", "towards the policy")),
    ),
    View(
        "Reward of new samples",
        "The mean reward of the samples of a round, and its spread. It should rise.",
        (
            ("round/mean_reward", "new samples"),
            ("round/best_of_k", "the best of each prompt"),
            ("round/reward_q*", "quantile "),
        ),
    ),
    View(
        "Prompts without signal",
        "The share of a round's prompts whose completions all score the same: nothing is learned from them.",
        (("round/no_signal", "share"),),
        most=1.0,
    ),
    View(
        "The pool by condition",
        "The mean reward of the pool's samples under each condition. The order should be kept.",
        (("round/reward/*", ""),),
    ),
    View(
        "Rewards given a condition",
        "The mean reward of samples asked for under each condition, on the evaluation split.",
        (("eval_reward_given/*", ""), ("reward_given/*", "")),
    ),
    View("Entropy", "In nats per token. A fall to 0 is a collapse.", (("entropy", "policy"),)),
    View(
        "Length of samples",
        "In tokens. Growth without reason is a way to please a reward.",
        (
            ("samples/length", "held-out prompts"),
            ("completions/mean_length", "training samples"),
            ("round/mean_length", "samples of a round"),
        ),
    ),
    View(
        "Share of samples that end",
        "Samples should end by themselves (EOS).",
        (
            ("samples/eos_rate", "held-out prompts"),
            ("completions/eos_rate", "training samples"),
            ("round/finished", "samples of a round"),
        ),
        most=1.0,
    ),
    View(
        "Repetition",
        "Share of tokens that are in a 3-gram (held-out prompts) or alone (training samples) a repetition.",
        (("samples/repetition", "held-out prompts"), ("repetition", "training samples")),
        most=1.0,
    ),
    View(
        "KL from the reference",
        "Of samples, in nats per sample.",
        (("samples/kl", "held-out prompts"), ("round/kl_start", "samples of a round, from the start")),
    ),
    View(
        "Tokens a second",
        "Of sampling and of training, round by round.",
        (("round/sampling_tokens_per_second", "sampling"), ("round/training_tokens_per_second", "training")),
    ),
    View("Gradient norm", "Peaks say that steps are too large.", (("grad_norm", "norm"),)),
    View("Learning rate", "The schedule.", (("learning_rate", "rate"),)),
)


def charts_of_run(history: History, wanted: Mapping[str, float | None] | None = None) -> list[Chart]:
    """Return the charts of one run, those of which nothing was logged left out.

    Args:
        history: its curves.
        wanted: of features, by name: their moments under the target.
    """
    charts = []
    for view in VIEWS:
        lines, levels = [], []
        for name, label in _expand(view, history):
            line = Line.of(label, _with_errors(history, name), len(lines))
            goal = (wanted or {}).get(name.removeprefix("moment/"))
            if name.startswith("moment/") and goal is not None:
                levels.append((f"wanted: {goal:g}", goal, line.colour))
            lines.append(line)
        if any(len(line.points) > 1 for line in lines):  # a single measurement is in the table
            about = view.about_run(history)
            charts.append(Chart(view.title, about, lines, wanted=levels, x=view.x, most=view.most))
    return charts


def charts_of_runs(
    histories: Mapping[str, History], wanted: Mapping[str, Mapping[str, float | None]] | None = None
) -> list[Chart]:
    """Return a chart for each metric that at least one of several runs logged more than once, with a line for each run.

    Args:
        histories: run -> its curves.
        wanted: run -> of features, by name: their moments under the run's target.
    """
    charts, places = [], {run: place for place, run in enumerate(histories)}
    for view in VIEWS:
        names = dict.fromkeys(pair for history in histories.values() for pair in _expand(view, history))
        if view.metrics == RANKS:  # the best of many
            names = dict.fromkeys(list(names)[:1])
        for name, label in names:
            logged = {run: history for run, history in histories.items() if name in history}
            lines = [Line.of(run, _with_errors(history, name), places[run]) for run, history in logged.items()]
            if all(len(line.points) < 2 for line in lines):  # single measurements are in the table
                continue
            title = view.title if len(names) == 1 else f"{view.title}: {label}"
            about = _about_runs({run: view.about_run(history) for run, history in logged.items()})
            goals = {run: (wanted or {}).get(run, {}).get(name.removeprefix("moment/")) for run in logged}
            levels = _wanted_of_runs(goals, places) if name.startswith("moment/") else []
            charts.append(Chart(title, about, lines, wanted=levels, x=view.x, most=view.most))
    return charts


def _about_runs(said: Mapping[str, str]) -> str:
    """Join what a chart shows of several runs: once where it is the same of all."""
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return " ".join(f"{run}: {about}" for run, about in said.items())


def _wanted_of_runs(goals: Mapping[str, float | None], places: Mapping[str, int]) -> list[tuple[str, float, int]]:
    """Return the dotted lines of several runs: one for each wanted value, in the colour of its first run."""
    runs: dict[float, list[str]] = {}
    for run, goal in goals.items():
        if goal is not None:
            runs.setdefault(goal, []).append(run)
    levels = []
    for goal, names in runs.items():
        by = f" by {', '.join(names)}" if len(runs) > 1 else ""
        levels.append((f"wanted{by}: {goal:g}", goal, places[names[0]] % COLOURS))
    return levels


def acceptance_charts_of_runs(tradeoffs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Chart]:
    """Return the chart of :func:`acceptance_chart` for each run that estimated it."""
    charts = {run: acceptance_chart(tradeoff) for run, tradeoff in tradeoffs.items()}
    return [replace(chart, title=f"{chart.title}: {run}") for run, chart in charts.items() if chart is not None]


def acceptance_chart(tradeoff: Sequence[Mapping[str, float]]) -> Chart | None:
    """Return the divergence of quasi-rejection sampling over its acceptance rate; None where none was estimated."""
    rows = sorted((row for row in tradeoff if row["rate"] > 0), key=lambda row: row["rate"])
    if len(rows) < 2:
        return None
    lines = []
    for place, (name, label) in enumerate((("tvd", "TVD(p, p_beta)"), ("kl", "KL(p || p_beta), nats"))):
        points = [
            Point(100 * row["rate"], 100 * row["rate"], 1, row[name], *_ends(row[name], row[f"{name}_se"]))
            for row in rows
        ]
        lines.append(Line(label, points, place % COLOURS))
    about = "Quasi-rejection sampling with the trained model: fewer accepted samples are nearer to the target."
    return Chart("Acceptance and divergence", about, lines, x="accepted samples, %")


def _ends(value: float, se: float) -> tuple[float, float]:
    return max(0.0, value - 1.96 * se), value + 1.96 * se


def _expand(view: View, history: History) -> list[tuple[str, str]]:
    pairs = []
    for metric, label in view.metrics:
        if not metric.endswith("*"):
            pairs += [(metric, label)] if metric in history else []
            continue
        prefix = metric[:-1]
        names = [n for n in history.names(prefix) if not n.endswith(("/se", "/ess", "/target"))]
        if len({re.sub(r"\d+", "", name) for name in names}) == 1:  # they differ in a number alone
            names.sort(key=in_order)
        pairs += [(name, f"{label}{name.removeprefix(prefix)}") for name in names]
    return pairs


def _with_errors(history: History, name: str) -> Curve:
    """Return a curve whose band is its 95% interval where standard errors were logged beside it.

    Otherwise neighbouring values of a long curve are joined, and the band is their extent.
    """
    curve, errors = history[name], history.curves.get(f"{name}/se")
    drawn = Curve()
    drawn.n, drawn.not_finite = curve.n, curve.not_finite
    if errors is not None and len(errors.points) == len(curve.points):
        floor = 0.0 if min(p.low for p in curve.points) >= 0 else -math.inf
        for p, e in zip(curve.points, errors.points, strict=True):
            drawn.points.append(
                Point(p.first, p.last, p.n, p.mean, max(floor, p.low - 1.96 * e.mean), p.high + 1.96 * e.mean)
            )
        return drawn
    size = max(3, len(curve.points) // 60 + 1) if len(curve.points) >= LONG else 1
    for i in range(0, len(curve.points), size):
        point = curve.points[i]
        for other in curve.points[i + 1 : i + size]:
            point = point.join(other)
        drawn.points.append(point)
    return drawn


def wanted_moments(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the moments that an f-DPG run trains towards, by the name of their feature."""
    prefix = "moment/"
    found = {
        n: m for n, m in summary.get("metrics", {}).items() if n.startswith(prefix) and m.get("target") is not None
    }
    return {name.removeprefix(prefix): change["target"] for name, change in found.items()}
