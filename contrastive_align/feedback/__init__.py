"""Numbers or text -> how a prompt is conditioned: the pool of samples, quantiles, conditions."""

from contrastive_align.feedback.pool import NEW, Pool, Table
from contrastive_align.feedback.quantiles import LEFT_OUT, balanced_order, keep, quantiles
from contrastive_align.feedback.rounds import Sample


__all__ = [
    "LEFT_OUT",
    "NEW",
    "Pool",
    "Sample",
    "Table",
    "balanced_order",
    "keep",
    "quantiles",
]
