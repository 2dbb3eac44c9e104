"""Sort scores into quantiles, thin out earlier samples, and draw balanced samples: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


LEFT_OUT = -1  # the label of a sample that is never drawn
TIES = ("share", "drop")
BY_ORDER = "order"  # ties as earlier versions labelled them, by which their checkpoints go on


def quantiles(
    scores: ArrayLike, *, n: int = 5, prompts: ArrayLike | None = None, ties: str = "share"
) -> NDArray[np.int32]:
    r"""Return the quantile of every sample, 0 the best.

    Samples are sorted by score, highest first. The sample at place i of m is in quantile
    min(floor(i / floor(m / n)), n - 1): each quantile has floor(m / n) samples, and the last one also the remainder.

    Equal scores have one label. With ``ties="share"`` the best score has label 0 and the worst n - 1, however many
    samples have it; equal scores between them have the label of their middle place. With ``ties="drop"`` equal scores
    whose places are in different quantiles are labelled -1. Where all scores are equal, no sample has a label.

    Quark, arXiv:2205.13636, sorts its whole pool; ALT, arXiv:2407.16970, the samples of each prompt.

    Args:
        scores: (N,) higher is better; NaN or None where a sample was not scored, which is labelled -1.
        n: number of quantiles, at least 1.
        prompts: (N,) int, the prompt of every sample; each prompt is sorted alone. None: all are sorted together.
        ties: ``"share"`` or ``"drop"``.

    Returns:
        (N,) int32 in 0..n-1, or -1. A prompt with n or more samples of which fewer than n are scored has no quantiles:
        all of its samples are labelled -1, as are those of a prompt whose scores are all equal.

    Raises:
        ValueError: a prompt (or without ``prompts`` the whole) has fewer than n samples, scored or not.

    >>> quantiles([0.1, 0.9, 0.5, 0.7, 0.3], n=2)
    array([1, 0, 1, 0, 1], dtype=int32)
    >>> quantiles([1, 2, 9, 8], n=2, prompts=[7, 7, 3, 3])
    array([1, 0, 0, 1], dtype=int32)
    >>> quantiles([1, 0, 1, 0, 0], n=5), quantiles([3, 2, 2, 1, 0], n=5, ties="drop")
    (array([0, 4, 0, 4, 4], dtype=int32), array([ 0, -1, -1,  3,  4], dtype=int32))
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 quantile.")
    if ties not in (*TIES, BY_ORDER):
        raise ValueError(f"ties is {ties!r}, expected one of {', '.join(TIES)}.")
    scores = np.asarray(scores, dtype=np.float64)
    pooled = prompts is None
    prompts = np.zeros(len(scores), dtype=np.int64) if pooled else np.asarray(prompts)
    if scores.ndim != 1 or prompts.shape != scores.shape:
        raise ValueError(f"scores have shape {scores.shape} and prompts {prompts.shape}, expected (N,) both.")
    labels = np.full(len(scores), LEFT_OUT, dtype=np.int32)
    if not len(scores):
        return labels
    values, group, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    if sizes.min() < n:
        smallest = sizes.argmin()
        raise ValueError(_too_few("The pool" if pooled else f"Prompt {values[smallest]}", sizes[smallest], n))

    scored = np.flatnonzero(~np.isnan(scores))
    counts = np.bincount(group[scored], minlength=len(values))
    order = scored[np.lexsort((-scores[scored], group[scored]))]  # stable
    order = order[counts[group[order]] >= n]
    if not len(order):
        return labels
    of, ranked = group[order], scores[order]
    if ties == BY_ORDER:
        place = np.arange(len(order)) - np.searchsorted(of, of)
        labels[order] = np.minimum(place // (counts[of] // n), n - 1)
        return labels
    begins = np.flatnonzero(np.append(True, (of[1:] != of[:-1]) | (ranked[1:] != ranked[:-1])))  # of equal scores
    sizes = np.diff(np.append(begins, len(order)))
    of, counts = of[begins], counts[of[begins]]
    first = begins - begins[np.searchsorted(of, of)]  # places within the prompt
    last = first + sizes - 1
    block = counts // n
    best, worst = first == 0, last == counts - 1
    if ties == "share":
        label = np.minimum((first + last) // 2 // block, n - 1)
        label = np.where(best, 0, np.where(worst, n - 1, label))
    else:
        label = np.minimum(first // block, n - 1)
        label = np.where(label == np.minimum(last // block, n - 1), label, LEFT_OUT)
    labels[order] = np.repeat(np.where(best & worst & (n > 1), LEFT_OUT, label), sizes)
    return labels


def _too_few(who: str, size: int, n: int) -> str:
    return (
        f"{who} has {size} samples, expected at least one for each of {n} quantiles. Sample more completions for a "
        "prompt (num_generations) or give more that have scores, ask for fewer quantiles, or sort all prompts' samples "
        "together (per_prompt: false)."
    )


def keep(labels: ArrayLike, *, drop_factor: float, rng_seed: int | Sequence[int]) -> NDArray[np.bool_]:
    """Choose at random which samples of earlier rounds stay in the pool: a share of 1 - ``drop_factor`` of each label.

    Of m samples with one label round((1 - drop_factor) * m) stay (halves to the even number), so that thinning does not
    change the pool's mixture of labels.

    Args:
        labels: (N,) int; -1 is a label like any other.
        drop_factor: 0: all stay, 1: none does.
        rng_seed: one or several ints >= 0. The choice within a label depends on these and the label's size alone.

    Returns:
        (N,) bool.

    Raises:
        ValueError: ``drop_factor`` is not in [0, 1].

    >>> int(keep([0, 0, 1, 1], drop_factor=0.5, rng_seed=0).sum())
    2
    """
    if not 0 <= drop_factor <= 1:
        raise ValueError(f"drop_factor is {drop_factor}, expected 0 (all samples stay) to 1 (none does).")
    labels = np.asarray(labels)
    stays = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        stay = round((1 - drop_factor) * len(members))
        stays[_generator(rng_seed, label).permutation(members)[:stay]] = True
    return stays


def balanced_order(labels: ArrayLike, finished: ArrayLike, *, n: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Choose the samples to train on and their order, equally many of each label.

    With the L labels that occur, best first, draw i has label i mod L: n // L are drawn of each label, one more of the
    best n mod L, and any L consecutive draws have every label once. Within a label the order is random, with finished
    completions before those that reached the token limit. No sample of a label is drawn twice before all of them have
    been drawn once.

    Args:
        labels: (N,) int; -1 is never drawn.
        finished: (N,) bool.
        n: number of draws.
        seed: one or several ints >= 0.

    Returns:
        (n,) int64 indices into ``labels``.

    Raises:
        ValueError: n is not 0 and every label is -1.

    >>> labels = [0, 1, 1, 0, 1, -1]
    >>> [labels[i] for i in balanced_order(labels, [True] * 6, n=7, seed=0)]
    [0, 1, 0, 1, 0, 1, 0]
    """
    labels, finished = np.asarray(labels), np.asarray(finished, dtype=bool)
    if labels.shape != finished.shape:
        raise ValueError(f"labels have shape {labels.shape} and finished {finished.shape}, expected (N,) both.")
    present = np.unique(labels[labels >= 0])
    if n and not len(present):
        raise ValueError(f"None of the {len(labels)} samples has a label to be drawn by: none was scored or judged.")
    order = np.empty(n, dtype=np.int64)
    for i, label in enumerate(present):
        wanted = len(range(i, n, len(present)))
        order[i :: len(present)] = _passes(np.flatnonzero(labels == label), finished, wanted, _generator(seed, label))
    return order


def _passes(members: NDArray, finished: NDArray, wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    passes = [np.empty(0, dtype=np.int64)]
    for _ in range(-(-wanted // len(members))):
        shuffled = rng.permutation(members)
        passes.append(shuffled[np.argsort(~finished[shuffled], kind="stable")])
    return np.concatenate(passes)[:wanted]


def _generator(seed: int | Sequence[int], label: int) -> np.random.Generator:
    words = [seed] if isinstance(seed, int | np.integer) else list(seed)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*words, int(label) + 1])))
