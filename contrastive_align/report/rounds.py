"""Pictures of conditional training's pool: what each condition was given to."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contrastive_align.data.atomic import atomic_write


MOST_ROWS = 12


def in_lines(name: str, width: int = 18) -> str:
    r"""Break the name of a condition into lines.

    >>> in_lines("Harmless and not helpful"), in_lines("helpfulness:4,coherence:3")
    ('Harmless and not\nhelpful', 'helpfulness:4,\ncoherence:3')
    """
    return textwrap.fill(name.replace(",", ", "), width)


def plot_round(
    label: NDArray,
    score: NDArray,
    length: NDArray,
    *,
    names: Sequence[str],
    path: str | os.PathLike,
    title: str = "",
) -> Path:
    """Draw histograms of reward, if there is one, and length: one row of axes per label, best first.

    Of more than 12 labels the first 6 and the last 6 are shown, and the title says so.

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
    if (between := len(present) - MOST_ROWS) > 0:
        present = present[: MOST_ROWS // 2] + present[-MOST_ROWS // 2 :]
        title += f" ({between} in the middle are not shown)"
    columns = [(score, "reward (line: mean)")] if not np.isnan(score[label >= 0]).all() else []
    columns.append((length, "length in tokens (line: mean)"))
    figure = Figure(figsize=(4 * len(columns), 1.1 + 1.05 * max(1, len(present))), layout="constrained")
    axes = figure.subplots(max(1, len(present)), len(columns), squeeze=False, sharex="col")
    for row, i in zip(axes, present, strict=False):
        for axis, (values, _) in zip(row, columns, strict=True):
            every = values[(label >= 0) & ~np.isnan(values)]
            own = values[(label == i) & ~np.isnan(values)]
            axis.hist(own, bins=_whole_bins(every) if values is length else np.histogram_bin_edges(every, bins=30))
            if len(own):
                axis.axvline(own.mean(), color="tab:orange")
            axis.set_yticks([])
        name = names[i] if i < len(names) else f"label {i}"
        text = f"{in_lines(name)}\n{int((label == i).sum())} samples"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for axis, (values, what) in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(what)
        if values is length:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10, wrap=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)
    return path


def _whole_bins(values: NDArray, most: int = 30) -> NDArray:
    """Edges of bins that are as many whole numbers wide, each around its numbers.

    >>> _whole_bins(np.array([2, 5]))
    array([1.5, 2.5, 3.5, 4.5, 5.5])
    """
    low, high = values.min(), values.max()
    width = max(1, math.ceil((high - low + 1) / most))
    return np.arange(low - 0.5, high + width, width)
