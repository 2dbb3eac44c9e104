"""The labels of a dataset's groups: the scores that they are made of, and their temperature."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from contrastive_align.data.collate import to_table
from contrastive_align.losses.contrastive import add_first_score_bonus, target_labels, temperature_for_entropy


logger = logging.get_logger(__name__)

ANY_TEMPERATURE = 1.0  # where no label depends on it


def auto_temperature(dataset: Dataset, *, first_score_bonus: float) -> float:
    """Return what ``temperature_alpha="auto"`` means for a dataset of tokenised groups.

    This is :func:`~contrastive_align.losses.temperature_for_entropy` of its scores, or 1.0 where no group's labels
    depend on the temperature: all are preferences or have equal scores.
    """
    scores, valid = scores_of(dataset)
    scores = add_first_score_bonus(scores, valid, first_score_bonus)
    return temperature_for_entropy(scores, valid=valid) or ANY_TEMPERATURE


def warn_of_labels(dataset: Dataset, temperature_alpha: float) -> None:
    """Warn where labels ignore the scores (all equal) or all scores but the best (one-hot); name a temperature between.

    Labels are equal where none is 1% above the mean label of its group.
    """
    scores, valid = scores_of(dataset, most=10_000)
    levels = [len(row[ok].unique()) for row, ok in zip(scores, valid, strict=True)]
    graded = sum(n > 2 for n in levels)
    soft, hard = (target_labels(scores, temperature_alpha=a, valid=valid) for a in (temperature_alpha, 1e-12))
    if max(levels) > 1 and (soft.max(-1).values * valid.sum(-1)).max() < 1.01:
        found = "equal, whatever the scores are: nothing is learned of which completion is better"
    elif graded and (soft - hard).abs().max() <= 1e-3:
        found = (
            f"one-hot, although {graded} of {len(levels)} groups have more than two different scores: all but the best "
            "score is thrown away"
        )
    else:
        return
    between = temperature_for_entropy(scores, valid=valid)
    advice = f" temperature_alpha='auto' ({between:.3g} here) would use them all." if between else ""
    logger.warning(f"temperature_alpha={temperature_alpha:g} makes the labels {found}.{advice}")


def scores_of(dataset: Dataset, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the scores (B, K) of a dataset's groups and which of them are there."""
    rows = dataset[:most]["scores"]
    return to_table(rows, torch.float64), to_table([[True] * len(row) for row in rows], torch.bool)
