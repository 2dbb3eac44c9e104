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


__all__ = [
    "Change",
    "Number",
    "Summary",
    "TargetChange",
    "TargetSummary",
    "distribution_rows",
    "plot_rewards",
    "plot_round",
    "plot_steps",
    "plot_tradeoff",
    "table",
]
