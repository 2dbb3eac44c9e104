"""Measure what a conditional run's model gives under each condition, for ``summary.json``."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
from datasets import Dataset

from contrastive_align.data import random_prompts
from contrastive_align.launch.common import picture_saved
from contrastive_align.launch.datasets import take
from contrastive_align.launch.own_rounds import rounds_of
from contrastive_align.report import Change, Summary, in_words, moved, plot_rewards, spread, warn_if_above_start
from contrastive_align.rounds.measures import UNCONDITIONED
from contrastive_align.trainers import ConditionalTrainer


GIVEN = "reward_given/"


class Measurement:
    """Rewards of the model at the start without a condition, and after training under each condition.

    For scored completions without a reward to measure with: their likelihoods before and after.
    """

    def __init__(self, trainer: ConditionalTrainer, train: Dataset, test: Dataset | None, at_most: int) -> None:
        self.trainer = trainer
        self.by_reward = trainer.feedback is not None
        self.rows = None
        if not at_most:
            return
        self.held_out = test is not None
        rows, where = (test, "held-out") if test is not None else (train, "training")
        if self.by_reward:
            self.rows = Dataset.from_list(random_prompts(rows, at_most, seed=trainer.args.seed))
            self.start = trainer.rewards_given(self.rows, conditions=[UNCONDITIONED])[UNCONDITIONED]
        else:
            by_prompt = getattr(trainer.condition, "per_prompt", False)
            self.rows = whole_prompts(rows, at_most) if by_prompt else take(rows, at_most)
            self.likelihoods = self._likelihoods()
        self.rows_name = f"{len(self.rows)} {where} {'prompts' if self.by_reward else 'rows'}"

    def after(self, summary: Summary) -> None:
        """Measure the trained model and fill in the summary's metrics."""
        if self.rows is None:
            return
        if not self.by_reward:
            now, n = self._likelihoods(), len(self.rows)
            summary.metrics = {k: Change(x, now[k], math.nan, n) for k, x in self.likelihoods.items()}
            summary.metrics_on = f"{self.rows_name}; negative log-likelihood per token of <label>, given a condition"
            own = {name: change for name, change in summary.metrics.items() if "_given/" not in name}
            summary.state = "\n".join(line for x in own.items() for line in warn_if_above_start(*x))
            return
        found = self.trainer.rewards_given(self.rows)
        conditions = [name for name in found if name != UNCONDITIONED]
        changes = {name: paired(self.start, found[name]) for name in [*conditions, UNCONDITIONED]}
        if any(change is None for change in changes.values()):
            summary.state = "Too few prompts have scores before and after: no rewards are compared."
            return
        summary.metrics = {"mean_reward": changes[conditions[0]]}
        summary.metrics |= {f"{GIVEN}{name}": change for name, change in changes.items()}
        how = f"{self.trainer.args.num_generations} samples each; before: the start, given nothing"
        summary.metrics_on = f"{self.rows_name}, {how}; mean_reward: after, given the best"
        given = {name: found[name] for name in conditions}
        summary.state = words_on(given, changes[conditions[0]], held_out=self.held_out)

    def _likelihoods(self) -> dict[str, float]:
        found = self.trainer.evaluate(self.rows, metric_key_prefix="measured")
        return {k.removeprefix("measured_"): v for k, v in found.items() if k.startswith("measured_nll/")}


def paired(before: np.ndarray, after: np.ndarray) -> Change | None:
    """Compare the prompts that have a reward before and after; None for fewer than two."""
    both = ~(np.isnan(before) | np.isnan(after))
    return Change.paired(before[both].tolist(), after[both].tolist()) if both.sum() > 1 else None


def words_on(given: dict[str, np.ndarray], change: Change, *, held_out: bool) -> str:
    """Say whether the best condition gained reward and whether the conditions are in order (``given``: best first).

    >>> given = {"good": np.array([0.8, 0.9, 0.7]), "bad": np.array([0.3, 0.3, 0.1])}
    >>> words_on(given, Change(0.5, 0.8, 0.01, 3, before_se=0.1), held_out=True)  # doctest: +ELLIPSIS
    'In words, with 95% intervals: the reward given the best condition rose by 0.3000 (0.2583 to 0.3417); from ...'
    """
    clauses = [moved("the reward given the best condition", change, scale=spread(change))]
    means = [float(np.nanmean(values)) for values in given.values()]
    if len(means) > 1:
        falls = "falls" if all(a > b for a, b in itertools.pairwise(means)) else "does NOT always fall"
        clauses.append(f"from best to worst it {falls}")
    return in_words(clauses, held_out=held_out)


def whole_prompts(rows: Dataset, at_most: int) -> Dataset:
    """Take the first rows and all further rows of their prompts, since quantiles need every completion of a prompt.

    >>> whole_prompts(Dataset.from_dict({"prompt": ["a", "b", "c", "a"], "score": [1, 2, 3, 4]}), 2)["score"][:]
    [1, 2, 4]
    """
    prompts = [repr(prompt) for prompt in rows["prompt"]]
    first = set(prompts[:at_most])
    return rows.select([i for i, prompt in enumerate(prompts) if prompt in first])


def last_terms(trainer: ConditionalTrainer) -> dict[str, float]:
    """Return the last logged negative log-likelihood, KL and entropy, in nats per token."""
    rows = [row for row in trainer.state.log_history if "nll" in row]
    return {name: rows[-1][name] for name in ("nll", "kl", "entropy") if name in rows[-1]} if rows else {}


def draw_picture(trainer: ConditionalTrainer, summary: Summary) -> None:
    """Draw the reward over the rounds and under each condition, beside ``summary.json``."""
    path = Path(trainer.args.output_dir) / "rewards.png"
    changes = {name.removeprefix(GIVEN): change for name, change in summary.metrics.items() if name.startswith(GIVEN)}
    given = {name: (change.after, change.after_se) for name, change in changes.items()}
    start = summary.metrics.get("mean_reward")
    with picture_saved(summary, path):
        plot_rewards(rounds_of(trainer), given, path, start=None if start is None else start.before)
