"""Hold all samples of all rounds on disk, and draw from them."""

from contrastive_align.pool.draws import LEFT_OUT, balanced_order, keep, quantiles
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import NEW, Pool, Table


__all__ = ["LEFT_OUT", "NEW", "Pool", "Sample", "Table", "balanced_order", "keep", "quantiles"]
