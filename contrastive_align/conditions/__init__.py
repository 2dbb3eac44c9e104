"""Turn the quality of a sample into text before its prompt."""

from contrastive_align.conditions.conditions import CONDITIONS, Condition, Phrases, QuantileTokens, resolve_condition
from contrastive_align.conditions.judged import AttributeCondition, CategoryCondition, TextCondition


__all__ = [
    "CONDITIONS",
    "AttributeCondition",
    "CategoryCondition",
    "Condition",
    "Phrases",
    "QuantileTokens",
    "TextCondition",
    "resolve_condition",
]
