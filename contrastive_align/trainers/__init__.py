"""Wiring: each trainer with its config beside it."""

from contrastive_align.trainers.conditional import ConditionalTrainer
from contrastive_align.trainers.conditional_config import ConditionalConfig
from contrastive_align.trainers.contrastive import ContrastiveTrainer
from contrastive_align.trainers.contrastive_config import ContrastiveConfig
from contrastive_align.trainers.fdpg import FDPGTrainer
from contrastive_align.trainers.fdpg_config import FDPGConfig


__all__ = [
    "ConditionalConfig",
    "ConditionalTrainer",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "FDPGConfig",
    "FDPGTrainer",
]
