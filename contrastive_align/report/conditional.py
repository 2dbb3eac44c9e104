"""The picture of conditional training: reward over the rounds, and what each condition gets in the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive_align.data.atomic import atomic_write
from contrastive_align.report.rounds import in_lines


REWARD = "round/mean_reward"
BY_CONDITION = "round/reward/"


def plot_rewards(
    rounds: Sequence[Mapping[str, Any]],
    given: Mapping[str, tuple[float, float]],
    path: str | os.PathLike,
    *,
    start: float | None = None,
) -> Path:
    """Draw the rewards of the rounds (left) and of the trained model (right).

    Left: the mean reward of each round's new samples, and of the pool under each condition. Right: the reward of the
    trained model under each condition, with standard errors.

    Args:
        rounds: the trainer's log entries of the rounds.
        given: condition -> mean reward and its standard error.
        path: a file whose ending matplotlib knows (.png, .svg, .pdf); its folder is made.
        start: mean reward before training, drawn as a dotted line.

    Raises:
        ValueError: no round has a reward.
        ImportError: matplotlib is missing (``pip install "contrastive-align[report]"``).
    """
    rows = [row for row in rounds if REWARD in row]
    if not rows:
        raise ValueError("No round has scores, expected at least one.")
    try:
        from matplotlib.figure import Figure  # no pyplot: it would look for a screen
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "contrastive-align[report]".') from error
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    conditions = list(dict.fromkeys(key for row in rows for key in row if key.startswith(BY_CONDITION)))
    for i, key in enumerate(conditions):
        points = [(row["round/number"], row[key]) for row in rows if key in row]
        color = f"{0.2 + 0.6 * i / max(1, len(conditions) - 1):.2f}"  # a grey, the best the darkest
        left.plot(*zip(*points, strict=True), marker=".", color=color, label=f"pool, {key.removeprefix(BY_CONDITION)}")
    numbers = [row["round/number"] for row in rows]
    left.plot(numbers, [row[REWARD] for row in rows], marker="o", color="tab:blue", label="new samples")
    left.set_xticks(numbers)
    left.set_xlabel("round")
    left.set_ylabel("mean reward")
    left.set_title("mean reward of the samples")
    left.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    means, errors = [mean for mean, _ in given.values()], [se for _, se in given.values()]
    right.bar(range(len(given)), means, yerr=errors, color="tab:blue", width=0.6)
    names = [in_lines(name, 16) for name in given]
    right.set_xticks(range(len(given)), names, rotation=25, ha="right", rotation_mode="anchor", fontsize=8)
    if start is not None:
        right.axhline(start, linestyle=":", color="tab:orange", label="the start, given nothing")
        right.legend(fontsize=8, framealpha=0.9, edgecolor="none")  # it may come to lie on bars
    right.set_title("mean reward after training, given ..." if given else "not measured")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=120)
    return path
