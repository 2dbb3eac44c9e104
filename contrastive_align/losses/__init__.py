"""Pure functions of tensors. This room imports torch and nothing more.

A new loss is three edits: the function, its line in ``LOSSES``, its test; a divergence likewise in ``DIVERGENCES``.
"""

from contrastive_align.losses.conditional import KL_DIRECTIONS, ConditionalTerms, conditional
from contrastive_align.losses.contrastive import (
    biased_nca,
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
from contrastive_align.losses.distributional import fdpg
from contrastive_align.losses.divergences import (
    DIVERGENCES,
    canonical_divergence_name,
    divergence,
    divergence_value,
)
from contrastive_align.losses.estimators import (
    Estimate,
    average_estimate,
    estimate_divergence,
    estimate_kl_base,
    estimate_log_z,
    estimate_moments,
)


LOSSES = {
    "nca": nca,
    "info_nca": info_nca,
    "biased_nca": biased_nca,
    "dpo": dpo,
    "dpo_best_vs_rest": dpo_best_vs_rest,
    "plackett_luce": plackett_luce,
    "sft": sft,
}

# TRL's names for the same thing.
ALIASES = {"sigmoid": "dpo", "nca_pair": "nca", "bco_pair": "biased_nca"}

_BY_BARE_NAME = {
    "".join(c for c in spelling if c.isalnum()): name
    for spelling, name in [*((name, name) for name in LOSSES), *ALIASES.items()]
}


def canonical_loss_name(name: str) -> str:
    """The key of ``LOSSES`` that ``name`` means, whatever its case and punctuation; TRL's names are aliases.

    >>> canonical_loss_name("InfoNCA"), canonical_loss_name("biasedNCA"), canonical_loss_name("sigmoid")
    ('info_nca', 'biased_nca', 'dpo')
    """
    bare = "".join(c for c in name.lower() if c.isalnum())
    if bare not in _BY_BARE_NAME:
        raise ValueError(
            f"Unknown loss_type {name!r}. Known: {', '.join(LOSSES)} (and TRL's names {', '.join(ALIASES)}). "
            "TRL's other pair losses (hinge, ipo, ...) are in trl.DPOTrainer."
        )
    return _BY_BARE_NAME[bare]


__all__ = [
    "ALIASES",
    "DIVERGENCES",
    "KL_DIRECTIONS",
    "LOSSES",
    "ConditionalTerms",
    "Estimate",
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
    "nca",
    "plackett_luce",
    "sft",
    "target_labels",
    "temperature_for_entropy",
]
