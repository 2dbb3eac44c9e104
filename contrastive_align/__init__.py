"""Align language models with more than a thumbs-up: K completions per prompt, a number each."""

from contrastive_align.versions import check_versions


check_versions()

from contrastive_align.losses import LOSSES  # noqa: E402 (after the check, so that it speaks first)
from contrastive_align.targets import Constraint, Target  # noqa: E402
from contrastive_align.trainers import (  # noqa: E402
    ConditionalConfig,
    ConditionalTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
    FDPGConfig,
    FDPGTrainer,
)


__all__ = [
    "LOSSES",
    "ConditionalConfig",
    "ConditionalTrainer",
    "Constraint",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "Target",
]
