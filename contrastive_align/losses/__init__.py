"""Losses and divergences: pure functions of tensors that import torch and the standard library only.

One of the user's own is registered: :func:`register_loss`, :func:`register_divergence`. A new one of the package is the
function, its line in ``LOSSES`` (``contrastive.py``) or ``DIVERGENCES`` (``divergences.py``), and its test.
"""

from contrastive_align.losses.conditional import KL_DIRECTIONS, ConditionalTerms, conditional
from contrastive_align.losses.contrastive import (
    ALIASES,
    LOSSES,
    biased_nca,
    canonical_loss_name,
    dpo,
    dpo_best_vs_rest,
    group_loss,
    info_nca,
    is_preference,
    label_entropy,
    nca,
    plackett_luce,
    register_loss,
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
    register_divergence,
)
from contrastive_align.losses.estimators import (
    Estimate,
    RunningLogZ,
    average_estimate,
    estimate_divergence,
    estimate_kl_base,
    estimate_log_z,
    estimate_moments,
    without_bias,
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
    "group_loss",
    "info_nca",
    "is_preference",
    "label_entropy",
    "mean_slope",
    "nca",
    "plackett_luce",
    "register_divergence",
    "register_loss",
    "sft",
    "target_labels",
    "temperature_for_entropy",
    "without_bias",
]
