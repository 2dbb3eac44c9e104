"""Numbers or text -> how a prompt is conditioned: the pool of samples, quantiles, conditions."""

from contrastive_align.feedback.quantiles import LEFT_OUT, balanced_order, keep, quantiles


__all__ = [
    "LEFT_OUT",
    "balanced_order",
    "keep",
    "quantiles",
]
