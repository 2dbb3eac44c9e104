"""Wiring: each trainer with its config beside it."""

from contrastive_align.trainers.contrastive import ContrastiveTrainer
from contrastive_align.trainers.contrastive_config import ContrastiveConfig


__all__ = ["ContrastiveConfig", "ContrastiveTrainer"]
