"""Pictures of conditional training's pool: what each condition was given to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contrastive_align.feedback.atomic import atomic_write


def plot_round(
    label: NDArray,
    score: NDArray,
    length: NDArray,
    *,
    names: Sequence[str],
    path: str | os.PathLike,
    title: str = "",
) -> Path:
    """Histograms of reward and length, one row of axes for each label, best first.

    Args:
        label: (N,) -1 for none.
        score: (N,) NaN for none.
        length: (N,) tokens.
        names: of the labels.
        path: the picture; its ending says the format.

    Raises:
        ImportError: matplotlib is missing (``pip install "contrastive-align[report]"``).
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error

    present = [i for i in np.unique(label) if i >= 0]
    figure = Figure(figsize=(8, 1.1 + 1.05 * max(1, len(present))), layout="constrained")
    axes = figure.subplots(max(1, len(present)), 2, squeeze=False, sharex="col")
    for row, i in zip(axes, present, strict=False):
        for axis, values in zip(row, (score, length), strict=True):
            every = values[(label >= 0) & ~np.isnan(values)]
            own = values[(label == i) & ~np.isnan(values)]
            edges = np.histogram_bin_edges(every, bins=30)
            axis.hist(own, bins=edges, color="tab:blue")
            if len(own):
                axis.axvline(own.mean(), color="tab:orange")
            axis.set_yticks([])
        name = names[i] if i < len(names) else f"label {i}"
        row[0].set_ylabel(f"{name[:18]}\n{int((label == i).sum())}", rotation=0, ha="right", va="center", fontsize=8)
    axes[-1][0].set_xlabel("reward (line: mean)")
    axes[-1][1].set_xlabel("length in tokens")
    figure.suptitle(title, fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)
    return path
