"""What a run was and what it did, on the screen and in ``summary.json``."""

from contrastive_align.report.quasi_rejection import plot_tradeoff
from contrastive_align.report.summary import Change, Summary, table


__all__ = ["Change", "Summary", "plot_tradeoff", "table"]
