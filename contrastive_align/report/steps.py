"""The picture of a run towards a target: moments and divergences over its steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


DIVERGENCES = {
    "kl_target": "KL(p || pi)",
    "reverse_kl_target": "KL(pi || p)",
    "js_target": "JS(pi, p)",
    "tv_target": "TV(pi, p)",
    "kl_base": "KL(pi || base)",
}


def plot_steps(
    log_history: Sequence[Mapping[str, Any]], wanted: Mapping[str, float | None], path: str | os.PathLike
) -> Path:
    """Moments on the left, with what is wanted dotted, and divergences on the right.

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
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error
    steps = [row["step"] for row in rows]
    marker = "o" if len(steps) == 1 else None
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, moment in wanted.items():
        (line,) = left.plot(steps, [row[f"moment/{name}"] for row in rows], marker=marker, label=name)
        if moment is not None:
            left.axhline(moment, linestyle=":", color=line.get_color())
    left.set_title("moments under the policy (dotted: wanted)")
    for key, label in DIVERGENCES.items():
        values = [row.get(key, float("nan")) for row in rows]
        right.plot(steps, values, marker=marker, label=label, linestyle="--" if key == "kl_base" else "-")
    right.set_title("divergences, nats (TV: 0 to 1)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
