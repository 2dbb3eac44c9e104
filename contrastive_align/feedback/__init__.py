"""Numbers or text -> how a prompt is conditioned: the pool of samples, quantiles, conditions."""

from contrastive_align.feedback.conditions import CONDITIONS, Condition, resolve_condition
from contrastive_align.feedback.judged_conditions import Attributes, Categories, Text
from contrastive_align.feedback.pool import NEW, Pool, Table
from contrastive_align.feedback.quantile_conditions import Phrases, QuantileTokens
from contrastive_align.feedback.quantiles import LEFT_OUT, balanced_order, keep, quantiles
from contrastive_align.feedback.rounds import Sample


__all__ = [
    "CONDITIONS",
    "LEFT_OUT",
    "NEW",
    "Attributes",
    "Categories",
    "Condition",
    "Phrases",
    "Pool",
    "QuantileTokens",
    "Sample",
    "Table",
    "Text",
    "balanced_order",
    "keep",
    "quantiles",
    "resolve_condition",
]
