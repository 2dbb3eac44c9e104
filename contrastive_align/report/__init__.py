"""Reports of a run: ``summary.json``, its tables, pictures, and sections of the model card."""

from contrastive_align.report.plots import plot_rewards, plot_round, plot_steps, plot_tradeoff
from contrastive_align.report.summary import (
    Change,
    Number,
    Summary,
    TargetChange,
    TargetSummary,
    distribution_rows,
    table,
)
from contrastive_align.report.words import in_words, moved, spread, warn_if_above_start


__all__ = [
    "Change",
    "Number",
    "Summary",
    "TargetChange",
    "TargetSummary",
    "distribution_rows",
    "in_words",
    "moved",
    "plot_rewards",
    "plot_round",
    "plot_steps",
    "plot_tradeoff",
    "spread",
    "table",
    "warn_if_above_start",
]
