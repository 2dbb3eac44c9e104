"""Turn the quality of a sample into text before its prompt."""

from contrastive_align.conditions.conditions import (
    CONDITIONS,
    Condition,
    Phrases,
    QuantileTokens,
    of_checkpoint,
    resolve_condition,
    with_ties,
)
from contrastive_align.conditions.judged import AttributeCondition, CategoryCondition, TextCondition


__all__ = [
    "CONDITIONS",
    "AttributeCondition",
    "CategoryCondition",
    "Condition",
    "Phrases",
    "QuantileTokens",
    "TextCondition",
    "of_checkpoint",
    "resolve_condition",
    "with_ties",
]
