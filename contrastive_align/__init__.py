"""Align language models with more than a thumbs-up: K completions per prompt, a number each."""

from contrastive_align.versions import check_versions


check_versions()

from contrastive_align.losses import LOSSES  # noqa: E402 (after the check, so that it speaks first)
from contrastive_align.trainers import ContrastiveConfig, ContrastiveTrainer  # noqa: E402


__all__ = ["LOSSES", "ContrastiveConfig", "ContrastiveTrainer"]
