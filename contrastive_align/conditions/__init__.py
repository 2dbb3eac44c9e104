"""How good a sample is -> what stands before its prompt."""

from contrastive_align.conditions.conditions import CONDITIONS, Condition, resolve_condition
from contrastive_align.conditions.judged import Attributes, Categories, Text
from contrastive_align.conditions.quantile_conditions import Phrases, QuantileTokens


__all__ = [
    "CONDITIONS",
    "Attributes",
    "Categories",
    "Condition",
    "Phrases",
    "QuantileTokens",
    "Text",
    "resolve_condition",
]
