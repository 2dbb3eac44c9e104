"""Wiring: the three trainers and their options."""

from contrastive_align.trainers.conditional import ConditionalTrainer
from contrastive_align.trainers.configs import ConditionalConfig, ContrastiveConfig, FDPGConfig
from contrastive_align.trainers.contrastive import ContrastiveTrainer
from contrastive_align.trainers.fdpg import FDPGTrainer


__all__ = [
    "ConditionalConfig",
    "ConditionalTrainer",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "FDPGConfig",
    "FDPGTrainer",
]
