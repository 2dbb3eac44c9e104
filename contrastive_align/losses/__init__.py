"""Pure functions of tensors. This room imports torch and nothing more.

A new loss is three edits: the function, its line in ``LOSSES``, its test.
"""

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
    "LOSSES",
    "biased_nca",
    "canonical_loss_name",
    "dpo",
    "dpo_best_vs_rest",
    "info_nca",
    "is_preference",
    "label_entropy",
    "nca",
    "plackett_luce",
    "sft",
    "target_labels",
    "temperature_for_entropy",
]
