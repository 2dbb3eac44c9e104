"""The picture of a run towards a target: moments and divergences over its steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Name in the log -> label, line.
DIVERGENCES = {
    "kl_target": ("KL(p || pi)", "-"),
    "reverse_kl_target": ("KL(pi || p)", "-"),
    "js_target": ("JS(pi, p)", "-"),
    "tv_target": ("TV(pi, p), 0 to 1", "-"),
    "kl_base": ("KL(pi || base)", "--"),
}


def plot_steps(
    log_history: Sequence[Mapping[str, Any]], wanted: Mapping[str, float | None], path: str | os.PathLike
) -> Path:
    """Moments on the left, with what is wanted dotted, and divergences on the right.

    Where nothing is wanted of a feature, being a reward to raise, its moment under the target is dotted instead.

    Args:
        log_history: ``trainer.state.log_history``.
        wanted: feature -> moment, or None where there is only a reward to raise.
        path: a file whose ending matplotlib knows (.png, .svg, .pdf); its folder is made.

    Raises:
        ValueError: nothing was logged.
        ImportError: matplotlib is missing (``pip install "contrastive-align[report]"``).
    """
    rows = [row for row in log_history if "kl_base" in row]
    if not rows:
        raise ValueError("No step was logged, expected at least one. Lower logging_steps.")
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error
    steps = [row["step"] for row in rows]
    marker = "o" if len(steps) == 1 else None
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, moment in wanted.items():
        (line,) = left.plot(steps, _values(rows, f"moment/{name}"), marker=marker, label=_shorten(name))
        dotted = {"linestyle": ":", "color": line.get_color()}
        if moment is None:
            left.plot(steps, _values(rows, f"moment/{name}/target"), label="the same under the target", **dotted)
        else:
            left.axhline(moment, label=f"wanted: {moment:g}", **dotted)
    left.set_title("moments under the policy")
    left.set_ylabel("mean over the step's samples")
    for key, (label, style) in DIVERGENCES.items():
        values = _values(rows, key)
        if not all(map(math.isfinite, values)):
            label += " (gaps: infinite)" if any(map(math.isfinite, values)) else ": infinite"
        right.plot(steps, values, marker=marker, label=label, linestyle=style)
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    right.set_title("divergences: policy pi, target p")
    right.set_ylabel("nats")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        # Below, where it hides no line; two columns hold the longest labels side by side.
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(row.get(key, math.nan)) for row in rows]


def _shorten(name: str, most: int = 32) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."
