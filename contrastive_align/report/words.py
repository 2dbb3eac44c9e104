"""What the numbers of a run say, in words: what moved, what did not, and what cannot be told."""

from __future__ import annotations

import math
from collections.abc import Sequence

from contrastive_align.report.summary import Change, show


NEGLIGIBLE = 0.05  # of the scale that a caller names


def interval(change: Change) -> tuple[float, float]:
    """Return the 95% confidence interval of after - before, by Student's t; infinite from fewer than two measurements.

    >>> [round(x, 2) for x in interval(Change(0.0, 1.0, se=0.5, n=8))]  # 2.36 standard errors, 1.96 for large n
    [-0.18, 2.18]
    """
    moved = change.after - change.before
    if change.se == 0:
        return moved, moved
    if change.units < 2 or not math.isfinite(change.se):
        return -math.inf, math.inf
    z, nu = 1.959964, change.units - 1
    # The expansion of Student's quantile in 1 / nu (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return moved - t * change.se, moved + t * change.se


def moved(what: str, change: Change, *, scale: float, unit: str = "") -> str:
    """Say whether a number rose, fell or did not move, or that this many measurements cannot tell.

    It rose or fell where the interval of the change is on one side of 0. It did not move where the whole interval is
    within a twentieth of ``scale``, less than what would matter in the number's own unit. An interval that holds both 0
    and changes that would matter tells nothing.

    >>> moved("the reward", Change(0.5, 0.8, se=0.05, n=100), scale=1.0)
    'the reward rose by 0.3000 (0.2008 to 0.3992)'
    >>> moved("the reward", Change(0.5, 0.51, se=0.02, n=100), scale=1.0)
    'the reward did not move (-0.0297 to 0.0497)'
    >>> moved("the reward", Change(0.5, 0.8, se=0.2, n=8), scale=1.0)
    'whether the reward moved cannot be told from n = 8 (-0.1728 to 0.7728)'
    """
    low, high = interval(change)
    unit = f" {unit}" if unit else ""
    if math.isinf(low):
        return f"whether {what} moved cannot be told from n = {change.units}"
    if low > 0 or high < 0:
        size, ends = abs(change.after - change.before), sorted((abs(low), abs(high)))
        between = f" ({show(ends[0])} to {show(ends[1])})" if low != high else ""
        return f"{what} {'rose' if low > 0 else 'fell'} by {show(size)}{unit}{between}"
    between = f" ({show(low)} to {show(high)}{unit})" if low != high else ""
    if max(-low, high) <= NEGLIGIBLE * scale:
        return f"{what} did not move{between}"
    return f"whether {what} moved cannot be told from n = {change.units}{between}"


def in_words(clauses: Sequence[str], *, held_out: bool) -> str:
    """Join clauses to a sentence that says what they hold for.

    >>> in_words(["the reward rose by 0.3000"], held_out=False)
    'In words, on training data alone, with 95% intervals: the reward rose by 0.3000.'
    """
    where = "" if held_out else ", on training data alone"
    return f"In words{where}, with 95% intervals: {'; '.join(clauses)}."


def warn_if_above_start(what: str, change: Change) -> list[str]:
    """Return a line where a number that training lowers ended above its value at the start.

    >>> warn_if_above_start("the loss", Change(1.386, 1.402, se=0.002, n=100))
    ['WARNING: the loss ended above its value before training: 1.4020, from 1.3860.']
    """
    if not change.after > change.before or show(change.after) == show(change.before):
        return []
    low, _ = interval(change)
    doubt = "" if low > 0 else " (within what chance does)"
    return [
        f"WARNING: {what} ended above its value before training: {show(change.after)}, from "
        f"{show(change.before)}{doubt}."
    ]


def spread(change: Change) -> float:
    """Return the standard deviation between prompts before training: the scale of a reward.

    >>> spread(Change(0.5, 0.5, se=0.1, n=100, before_se=0.03))
    0.3
    """
    return (change.before_se or 0.0) * math.sqrt(change.units)
