"""Targets: features, constraints, energies, and the fit of lambda with log Z and ESS. Nothing is sampled or trained."""

from contrastive_align.targets.evaluate import (
    NOT_COLUMNS,
    Feature,
    FeatureError,
    columns_of,
    completion_text,
    evaluate_feature,
    evaluate_features,
    reward_arguments,
)
from contrastive_align.targets.features import register_feature, resolve_feature, weighted_sum
from contrastive_align.targets.fit import Fit, fit_lambdas
from contrastive_align.targets.reachable import InfeasibleMoment
from contrastive_align.targets.target import Constraint, Target, resolve_constraint


__all__ = [
    "NOT_COLUMNS",
    "Constraint",
    "Feature",
    "FeatureError",
    "Fit",
    "InfeasibleMoment",
    "Target",
    "columns_of",
    "completion_text",
    "evaluate_feature",
    "evaluate_features",
    "fit_lambdas",
    "register_feature",
    "resolve_constraint",
    "resolve_feature",
    "reward_arguments",
    "weighted_sum",
]
