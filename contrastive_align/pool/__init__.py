"""All samples of all rounds, on disk."""

from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import NEW, Pool, Table
from contrastive_align.pool.quantiles import LEFT_OUT, balanced_order, keep, quantiles


__all__ = ["LEFT_OUT", "NEW", "Pool", "Sample", "Table", "balanced_order", "keep", "quantiles"]
