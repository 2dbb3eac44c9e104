"""Losses and divergences: pure functions of tensors that import torch and the standard library only.

A new loss is three edits: the function and its line in ``LOSSES`` (``contrastive.py``), and its test. So is a new
divergence, in ``DIVERGENCES`` (``divergences.py``).
"""

from contrastive_align.losses.conditional import KL_DIRECTIONS, ConditionalTerms, conditional
from contrastive_align.losses.contrastive import (
    ALIASES,
    LOSSES,
    biased_nca,
    canonical_loss_name,
    dpo,
    dpo_best_vs_rest,
    info_nca,
    is_preference,
    label_entropy,
    nca,
    plackett_luce,
    sft,
    target_labels,
    temperature_for_entropy,
)
from contrastive_align.losses.divergences import (
    DIVERGENCES,
    canonical_divergence_name,
    divergence,
    divergence_value,
    fdpg,
    mean_slope,
)
from contrastive_align.losses.estimators import (
    Estimate,
    RunningLogZ,
    average_estimate,
    estimate_divergence,
    estimate_kl_base,
    estimate_log_z,
    estimate_moments,
)


__all__ = [
    "ALIASES",
    "DIVERGENCES",
    "KL_DIRECTIONS",
    "LOSSES",
    "ConditionalTerms",
    "Estimate",
    "RunningLogZ",
    "average_estimate",
    "biased_nca",
    "canonical_divergence_name",
    "canonical_loss_name",
    "conditional",
    "divergence",
    "divergence_value",
    "dpo",
    "dpo_best_vs_rest",
    "estimate_divergence",
    "estimate_kl_base",
    "estimate_log_z",
    "estimate_moments",
    "fdpg",
    "info_nca",
    "is_preference",
    "label_entropy",
    "mean_slope",
    "nca",
    "plackett_luce",
    "sft",
    "target_labels",
    "temperature_for_entropy",
]
