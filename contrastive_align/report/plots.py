"""Pictures of a run; matplotlib is imported when the first one is drawn.

Each function writes the file ``path``, whose ending matplotlib knows (.png, .svg, .pdf), makes its folder, and returns
the path. It raises ImportError if matplotlib is missing (``pip install "contrastive-align[report]"``).
"""

from __future__ import annotations

import gc
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from contrastive_align.data.atomic import atomic_write


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from contrastive_align.sampling import QRSEstimate

REWARD = "round/mean_reward"
BY_CONDITION = "round/reward/"
MOST_ROWS = 12

# Okabe and Ito's colours, told apart by colour-blind readers; a marker and a line style tell them apart in print.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b4538f", "#8a6d00", "#3a8fc4", "#4d4d4d")
MARKERS = "os^Dv<>"
WIDTH = 6.4  # inches: at 600 pixels the labels, 10 points high, are 13 pixels high

# Name in the log -> label, line.
DIVERGENCES = {
    "kl_target": ("KL(p || pi)", "-"),
    "reverse_kl_target": ("KL(pi || p)", "--"),
    "js_target": ("JS(pi, p)", ":"),
    "tv_target": ("TV(pi, p), 0 to 1", "-."),
    "kl_base": ("KL(pi || base)", (0, (7, 1, 1, 1, 1, 1))),
}


def plot_steps(
    log_history: Sequence[Mapping[str, Any]], wanted: Mapping[str, float | None], path: str | os.PathLike
) -> Path:
    """Plot a run towards a target over its steps: moments above, divergences below.

    A dotted line shows the ``wanted`` moment of a feature; for a reward, whose entry is None, that under the target.

    Raises:
        ValueError: nothing was logged.
    """
    rows = [row for row in log_history if "kl_base" in row]
    if not rows:
        raise ValueError("No step was logged, expected at least one. Lower logging_steps.")
    steps = [row["step"] for row in rows]
    marker = "o" if len(steps) == 1 else None
    figure = _figure(WIDTH, 7.4)
    left, right = figure.subplots(2, 1)
    for i, (name, moment) in enumerate(wanted.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "marker": marker}
        (line,) = left.plot(steps, _values(rows, f"moment/{name}"), label=_shorten(name), **style)
        dotted = {"linestyle": ":", "color": line.get_color()}
        if moment is None:
            left.plot(steps, _values(rows, f"moment/{name}/target"), label="the same under the target", **dotted)
        else:
            left.axhline(moment, label=f"wanted: {moment:g}", **dotted)
    left.set(title="moments under the policy", ylabel="mean over the step's samples")
    for i, (key, (label, style)) in enumerate(DIVERGENCES.items()):
        values = _values(rows, key)
        if not all(map(math.isfinite, values)):
            label += " (gaps: infinite)" if any(map(math.isfinite, values)) else ": infinite"
        right.plot(steps, values, marker=marker, label=label, linestyle=style, color=PALETTE[i])
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    right.set(title="divergences: policy pi, target p", ylabel="nats")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=10, integer=True, steps=[1, 2, 5, 10])
        axes.grid(alpha=0.3)
        # Below the axes, where it hides no line; two columns fit the longest labels.
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)
    return _write_picture(figure, path, dpi=150)


def plot_tradeoff(estimates: Sequence[QRSEstimate], path: str | os.PathLike, *, title: str = "") -> Path:
    """Plot the divergence from the target against the acceptance rate, a point for each beta, with standard errors.

    Betas at which no sample shows a difference between p_beta and p are left out: their divergence is not known.

    Raises:
        ValueError: no estimates.
    """
    if not estimates:
        raise ValueError("There are no estimates to draw, expected those of at least one beta.")
    # A divergence of 0 means that no sample showed a difference; it has no place on a logarithmic axis.
    known = [estimate for estimate in estimates if estimate.clipped]
    rows = sorted(known or estimates, key=lambda estimate: estimate.acceptance_rate)
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    rate, rate_se = [e.acceptance_rate for e in rows], [e.acceptance_rate_se for e in rows]
    lines = (
        ("KL(p || p_beta), nats", "kl", "o-"),
        ("TVD(p, p_beta)", "tvd", "s-"),
        ("bound on the TVD", "tvd_bound", "^:"),
    )
    for label, name, style in lines:
        values, se = [getattr(e, name) for e in rows], [getattr(e, f"{name}_se") for e in rows]
        axes.errorbar(rate, values, xerr=rate_se, yerr=se, fmt=style, markersize=4, capsize=2, label=label)
    place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "bottom", "ha": "center", "fontsize": 7}
    for e in rows:
        axes.text(e.acceptance_rate, 1.01, f"{e.beta:.3g}", **place)
    axes.set(xlabel="acceptance rate (beta at the top)", ylabel="divergence from the target")
    axes.set_yscale("log" if known else "linear")
    axes.set_title(title, pad=28)
    axes.legend(frameon=False, loc="lower right")
    return _write_picture(figure, path, dpi=150)


def plot_round(
    label: NDArray, score: NDArray, length: NDArray, *, names: Sequence[str], path: str | os.PathLike, title: str = ""
) -> Path:
    """Plot histograms of reward (if there is one) and length in the pool, one row for each label, the best first.

    Of more than 12 labels the first 6 and the last 6 are shown, and the title says so.

    Args:
        label: (N,) the label of each sample, -1 for none, whose names are ``names``.
        score: (N,) rewards, NaN for none.
        length: (N,) tokens.
    """
    present = [i for i in np.unique(label) if i >= 0]
    if (between := len(present) - MOST_ROWS) > 0:
        present = present[: MOST_ROWS // 2] + present[-MOST_ROWS // 2 :]
        title += f" ({between} in the middle are not shown)"
    columns = [(score, "reward (line: mean)")] if not np.isnan(score[label >= 0]).all() else []
    columns.append((length, "length in tokens (line: mean)"))
    figure = _figure(4 * len(columns), 1.1 + 1.05 * max(1, len(present)))
    axes = figure.subplots(max(1, len(present)), len(columns), squeeze=False, sharex="col")
    for row, i in zip(axes, present, strict=False):
        for axis, (values, _) in zip(row, columns, strict=True):
            every = values[(label >= 0) & ~np.isnan(values)]
            own = values[(label == i) & ~np.isnan(values)]
            axis.hist(own, bins=_whole_bins(every) if values is length else np.histogram_bin_edges(every, bins=30))
            if len(own):
                axis.axvline(own.mean(), color="tab:orange")
            axis.set_yticks([])
        name = _in_lines(names[i] if i < len(names) else f"label {i}")
        row[0].set_ylabel(f"{name}\n{int((label == i).sum())} samples", rotation=0, ha="right", va="center", fontsize=8)
    for axis, (values, what) in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(what)
        if values is length:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10, wrap=True)
    return _write_picture(figure, path)


def plot_rewards(
    rounds: Sequence[Mapping[str, Any]],
    given: Mapping[str, tuple[float, float]],
    path: str | os.PathLike,
    *,
    start: float | None = None,
) -> Path:
    """Plot conditional training: reward over the rounds on the left, reward given each condition on the right.

    Left: the mean reward of each round's new samples, and of the pool under each condition, from the trainer's logs at
    the beginning of each round. Right: the reward of the trained model given each condition, with standard errors, and
    that before training, ``start``, as a dotted line.

    Raises:
        ValueError: no round has a reward.
    """
    rows = [row for row in rounds if REWARD in row]
    if not rows:
        raise ValueError("No round has scores, expected at least one.")
    figure = _figure(WIDTH, 3.6 + 1.2 + 0.42 * max(1, len(given)))
    over, under = figure.subplots(2, 1, height_ratios=[3.6, 1.2 + 0.42 * max(1, len(given))])
    conditions = list(dict.fromkeys(key for row in rows for key in row if key.startswith(BY_CONDITION)))
    for i, key in enumerate(conditions):
        points = [(row["round/number"], row[key]) for row in rows if key in row]
        color = _along_viridis(i, len(conditions))
        marker = MARKERS[i % len(MARKERS)]
        label = f"pool, {key.removeprefix(BY_CONDITION)}"
        over.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=label)
    numbers = [row["round/number"] for row in rows]
    news = [row[REWARD] for row in rows]
    over.plot(numbers, news, marker="o", linestyle="--", color=PALETTE[1], linewidth=2.2, label="new samples")
    over.set(xticks=numbers, xlabel="round", ylabel="mean reward", title="mean reward of the samples")
    over.grid(alpha=0.3)
    over.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    # Points and no bars: a bar begins at zero, which means nothing to a reward that may be negative.
    places = list(range(len(given)))[::-1]
    means, errors = [mean for mean, _ in given.values()], [1.96 * se for _, se in given.values()]
    under.errorbar(means, places, xerr=errors, fmt="o", color=PALETTE[0], capsize=3)
    under.set_yticks(places, [_in_lines(name) for name in given])
    under.set_ylim(-0.6, max(0, len(given) - 1) + 0.6)
    under.grid(axis="x", alpha=0.3)
    if start is not None:
        under.axvline(start, linestyle=":", color=PALETTE[1], label="before training, given nothing")
        under.legend(
            fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.2 / max(1, len(given)))
        )
    under.set_title("mean reward after training, given ... (95% intervals)" if given else "not measured")
    return _write_picture(figure, path)


def _along_viridis(place: int, of: int) -> Any:
    """Return a colour from dark to light, which grow apart in brightness, too; the best is the darkest."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.85 * place / max(1, of - 1))


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # pyplot would look for a screen
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error
    gc.collect()  # the figure before: its parts refer to each other, and Python collects old objects too rarely
    return Figure(figsize=(width, height), layout="constrained")


def _write_picture(figure: Figure, path: str | os.PathLike, dpi: int = 120) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=dpi)
    return path


def _in_lines(name: str, width: int = 18) -> str:
    r"""Wrap a condition's name into lines.

    >>> _in_lines("Harmless and not helpful"), _in_lines("helpfulness:4,coherence:3")
    ('Harmless and not\nhelpful', 'helpfulness:4,\ncoherence:3')
    """
    return textwrap.fill(name.replace(",", ", "), width)


def _whole_bins(values: NDArray, most: int = 30) -> NDArray:
    """Return the edges of at most ``most`` bins, each as many whole numbers wide, with the numbers in the middle.

    >>> _whole_bins(np.array([2, 5]))
    array([1.5, 2.5, 3.5, 4.5, 5.5])
    """
    low, high = values.min(), values.max()
    width = max(1, math.ceil((high - low + 1) / most))
    return np.arange(low - 0.5, high + width, width)


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(row.get(key, math.nan)) for row in rows]


def _shorten(name: str, most: int = 32) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."
