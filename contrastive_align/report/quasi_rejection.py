"""The picture of quasi-rejection sampling: what a nearer target costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from contrastive_align.sampling import QRSEstimate


def plot_tradeoff(estimates: Sequence[QRSEstimate], path: str | os.PathLike, *, title: str = "") -> Path:
    """Divergence from the target against acceptance rate, with bars of one standard error.

    A point for each beta, but for those at which no sample tells p_beta from p: their distance is not known.

    Args:
        estimates: what ``qrs_estimates`` returned, of any number of betas.
        path: a file whose ending matplotlib knows (.png, .svg, .pdf); its folder is made.

    Raises:
        ValueError: no estimates.
        ImportError: matplotlib is missing (``pip install "contrastive-align[report]"``).
    """
    if not estimates:
        raise ValueError("There are no estimates to draw, expected those of at least one beta.")
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error
    # Where no sample showed a difference its size is not known, and 0 is nowhere on a logarithmic axis.
    known = [estimate for estimate in estimates if estimate.clipped]
    rows = sorted(known or estimates, key=lambda estimate: estimate.acceptance_rate)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rate, rate_se = [e.acceptance_rate for e in rows], [e.acceptance_rate_se for e in rows]
    lines = (
        ("KL(p || p_beta), nats", "kl", "o-"),
        ("TVD(p, p_beta)", "tvd", "s-"),
        ("bound on the TVD", "tvd_bound", "^:"),
    )
    for label, name, style in lines:
        se = [getattr(e, f"{name}_se") for e in rows]
        values = [getattr(e, name) for e in rows]
        axes.errorbar(rate, values, xerr=rate_se, yerr=se, fmt=style, markersize=4, capsize=2, label=label)
    for e in rows:
        place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "bottom", "ha": "center", "fontsize": 7}
        axes.text(e.acceptance_rate, 1.01, f"{e.beta:.3g}", **place)
    axes.set_xlabel("acceptance rate (beta at the top)")
    axes.set_ylabel("divergence from the target")
    axes.set_yscale("log" if known else "linear")
    axes.set_title(title, pad=28)
    axes.legend(frameon=False, loc="lower right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
