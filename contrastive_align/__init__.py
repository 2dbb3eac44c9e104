"""Align language models with more than a thumbs-up: K completions per prompt, a number each."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from contrastive_align.versions import check_versions


if TYPE_CHECKING:
    from contrastive_align.losses import LOSSES
    from contrastive_align.targets import Constraint, Target
    from contrastive_align.trainers import (
        ConditionalConfig,
        ConditionalTrainer,
        ContrastiveConfig,
        ContrastiveTrainer,
        FDPGConfig,
        FDPGTrainer,
    )

check_versions()

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
_ROOMS = {"LOSSES": "losses", "Constraint": "targets", "Target": "targets"}  # of all others: trainers


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that ``contrastive-align --help`` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'trainers')}"), name)


def __dir__() -> list[str]:
    return __all__
