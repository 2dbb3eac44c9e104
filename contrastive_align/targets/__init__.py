"""What we want: features, constraints, energy, the fit of lambda, log Z, ESS. Never samples, never trains."""

from contrastive_align.targets.constraint import Constraint, resolve_constraint
from contrastive_align.targets.evaluate import (
    Feature,
    FeatureError,
    completion_text,
    evaluate_feature,
    evaluate_features,
)
from contrastive_align.targets.features import resolve_feature
from contrastive_align.targets.fit import Fit, fit_lambdas
from contrastive_align.targets.reachable import InfeasibleMoment
from contrastive_align.targets.target import Target


__all__ = [
    "Constraint",
    "Feature",
    "FeatureError",
    "Fit",
    "InfeasibleMoment",
    "Target",
    "completion_text",
    "evaluate_feature",
    "evaluate_features",
    "fit_lambdas",
    "resolve_constraint",
    "resolve_feature",
]
