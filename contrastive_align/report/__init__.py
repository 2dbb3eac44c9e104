"""What a run was and what it did, on the screen and in ``summary.json``."""

from contrastive_align.report.distributions import Number, TargetChange, TargetSummary
from contrastive_align.report.quasi_rejection import plot_tradeoff
from contrastive_align.report.steps import plot_steps
from contrastive_align.report.summary import Change, Summary, table


__all__ = ["Change", "Number", "Summary", "TargetChange", "TargetSummary", "plot_steps", "plot_tradeoff", "table"]
