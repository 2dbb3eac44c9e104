"""What conditional training measures: of a round its samples, of a model the rewards and likelihoods by condition."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from contrastive_align.conditions import Condition
from contrastive_align.data import GroupCollator
from contrastive_align.models.logps import completion_logps
from contrastive_align.pool import Pool, Sample, Table
from contrastive_align.report.plots import plot_round
from contrastive_align.rounds.groups import rewards_of_round
from contrastive_align.rounds.rounds import ConditionedPrompts
from contrastive_align.sampling import distinct_n
from contrastive_align.sampling.decode import seed_of


logger = logging.get_logger(__name__)

UNCONDITIONED = "nothing"
SCORED_TOGETHER = 64  # completions whose log-probs are computed at once
# (samples, their texts, reference=) -> (N,) negative log-likelihoods in nats, (N,) tokens
Likelihood = Callable[..., tuple[np.ndarray, np.ndarray]]


# ------------------------------------------------------------------------------------------------------------ a round


def round_metrics(number: int, table: Table, condition: Condition, *, online: bool) -> dict[str, float]:
    """Numbers of a round: samples, rewards, lengths, and how many have no score, no label or no signal.

    Args:
        table: the pool after the round.
        online: whether the round was sampled; otherwise all of the pool is new.
    """
    newest = newest_samples(number, table, online=online)
    scores = table.score[newest]
    scores = scores[~np.isnan(scores)]
    metrics = {
        "round/number": number,
        "round/samples": int(newest.sum()),
        "round/left_out": int((table.label[newest] < 0).sum()),
        "round/unscored": int(np.isnan(table.score[newest]).sum()),
        "round/pool": len(table),
        "round/finished": float(table.finished[newest].mean()),
        "round/mean_length": float(table.length[newest].mean()),
    }
    if len(scores):
        metrics |= rewards_of_round(scores)
        if condition.reads == ("score",):
            metrics["round/no_signal"] = _share_without_signal(number, table, newest, condition)
    for label, name in enumerate(condition.names(table)):
        labelled = (table.label == label) & ~np.isnan(table.score)
        if labelled.any():
            metrics[f"round/reward/{name}"] = float(table.score[labelled].mean())
    return metrics


def newest_samples(number: int, table: Table, *, online: bool) -> np.ndarray:
    """(N,) bool: the samples of a round, or all where none was sampled."""
    return table.round == number if online else np.ones(len(table), dtype=bool)


def _share_without_signal(number: int, table: Table, newest: np.ndarray, condition: Condition) -> float:
    """Return the share of separately sorted groups whose scores in this round are all equal; with a warning."""
    newest = newest & ~np.isnan(table.score)
    by_prompt = getattr(condition, "per_prompt", False)
    group = table.prompt_index[newest] if by_prompt else np.zeros(int(newest.sum()), dtype=np.int64)
    places, of = np.unique(group, return_inverse=True)
    low, high = np.full(len(places), np.inf), np.full(len(places), -np.inf)
    np.minimum.at(low, of, table.score[newest])
    np.maximum.at(high, of, table.score[newest])
    tied = places[low == high]
    if len(tied) and (number == 1 or len(tied) == len(places)):
        which = f"of {len(tied)} of {len(places)} prompts ({tied[:5].tolist()} first) " if by_prompt else ""
        logger.warning(
            f"Round {number}: all completions {which}have the same score. They are left out of training unless other "
            "rounds give the prompt another score. round/no_signal is the share of such prompts."
        )
    return len(tied) / len(places)


def count_cut_words(
    number: int, samples: Sequence[Sample], conditioned: ConditionedPrompts, asked_with: Condition | None, *, warn: bool
) -> dict[str, int]:
    """How many of a judge's words are cut to fit: those of this round's samples, and those its prompts were asked with.

    Args:
        asked_with: the condition that the round was sampled under.
        warn: whether to say so.
    """
    own = [s for s in samples if conditioned.cuts(s.prompt, s.feedback)]
    prompts = {} if asked_with is None else {s.prompt_index: s.prompt for s in samples}
    asked = [i for i, prompt in prompts.items() if conditioned.cuts(prompt, asked_with.best_for(prompt))]
    if (own or asked) and warn:
        rows = sorted({s.prompt_index for s in own} | set(asked))
        logger.warning(
            f"Round {number}: a judge's words that leave no room for a completion lose their end: those of "
            f"{len(own)} samples, and those that {len(asked)} prompts were asked with; of the prompts {rows[:5]} "
            f"first. Prompt and words have {conditioned.room} tokens. Let the judge use fewer words, or raise "
            "max_length. round/words_cut and round/asked_cut count them."
        )
    return {"round/words_cut": len(own), "round/asked_cut": len(asked)}


def text_metrics(samples: Sequence[Sample], reference_nll: Likelihood | None) -> dict[str, float]:
    """distinct-n of samples and, where there is a reference, their perplexity under it."""
    metrics = {f"round/distinct_{n}": distinct_n([s.completion_ids for s in samples], n) for n in (1, 2, 3)}
    if reference_nll is not None:
        nll, tokens = reference_nll(samples, [None] * len(samples), reference=True)
        metrics["round/reference_perplexity"] = math.exp(nll.sum() / tokens.sum())
    return metrics


def draw_round(number: int, table: Table, condition: Condition, output_dir: str) -> None:
    """Write the picture of a round, where matplotlib is installed."""
    try:
        plot_round(
            table.label,
            table.score,
            table.length,
            names=condition.names(table),
            path=Path(output_dir) / "rounds" / f"round-{number:03d}.png",
            title=f"The pool in round {number}: what each condition stands for",
        )
    except ImportError as error:
        logger.warning_once(str(error))


# ------------------------------------------------------------------------------------------------- a model, evaluated


def rewards_given(trainer: Any, dataset: Dataset, conditions: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Sample and score for :meth:`~contrastive_align.ConditionalTrainer.rewards_given`, each process a share."""
    best = trainer.best_condition()
    askable: dict[str, str | None] = {UNCONDITIONED: None, **best.askable()}
    asked = {name: askable[name] for name in (askable if conditions is None else conditions)}
    return sampled_rewards(trainer, dataset, trainer.too_long(dataset, "eval_dataset", best), asked)


def sampled_rewards(
    trainer: Any, dataset: Dataset, long: Sequence[int], texts: Mapping[str, str | None]
) -> dict[str, np.ndarray]:
    """Return the mean reward of each prompt's samples under each of some conditions; each process draws a share.

    Args:
        trainer: one that samples rounds.
        long: rows whose prompts are too long.
        texts: name -> the text of the condition, None for none.

    Returns:
        Name -> (rows,), NaN for prompts without a scored completion and for those that are too long.
    """
    usable = np.setdiff1d(np.arange(len(dataset)), np.asarray(long, dtype=np.int64))
    state = PartialState()
    own = np.array_split(usable, state.num_processes)[state.process_index]
    rows = [dataset[int(i)] for i in own]
    prompts = [row["prompt"] for row in rows]
    seeds = [seed_of(trainer.args.seed, "evaluation", int(i)) for i in own]
    found = {}
    for name, text in texts.items():
        completions = trainer.generate(prompts, trainer.args.num_generations, seeds, conditions=[text] * len(rows))
        answers = trainer.feedback(rows, completions)
        scores = [[math.nan if score is None else score for score, _ in group] for group in answers]
        means = [float(np.nanmean(group)) if not np.isnan(group).all() else math.nan for group in scores]
        found[name] = np.full(len(dataset), np.nan)
        found[name][usable] = [mean for part in gather_object([means]) for mean in part]
    return found


def mean_and_error(name: str, found: np.ndarray) -> dict[str, float]:
    """``name``, the mean over prompts without the NaN, and ``name/se``, its standard error."""
    values = found[~np.isnan(found)]
    metrics = {name: float(values.mean()) if len(values) else math.nan}
    if len(values) > 1:
        metrics[f"{name}/se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return metrics


def reward_metrics(rewards: dict[str, np.ndarray]) -> dict[str, float]:
    """``reward_given/<condition>``, the mean over prompts, and ``.../se``, its standard error."""
    metrics = {}
    for name, found in rewards.items():
        metrics |= mean_and_error(f"reward_given/{name}", found)
    return metrics


def likelihood_metrics(samples: Sequence[Sample], condition: Condition, nll: Likelihood) -> dict[str, float]:
    """Mean negative log-likelihood per token of scored completions, by their label.

    ``nll/<label>``: under their own condition; ``nll/<label>_given/<condition>``: under the best and the worst.

    Raises:
        ValueError: completions that cannot be sorted.
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(folder, label=condition.label)
        pool.add(samples)
        try:
            table = pool.table()
        except ValueError as error:
            raise ValueError(f"The {len(samples)} completions to evaluate on cannot be sorted: {error}") from error
        labels, names = table.label.copy(), condition.names(table)
        del pool, table
    askable = list(condition.askable().items())
    ends = dict([askable[0], askable[-1]]) if askable else {}
    own = [condition.text(s, int(label)) if label >= 0 else None for s, label in zip(samples, labels, strict=True)]
    by_condition = {"": nll(samples, own)}
    for name, text in ends.items():
        by_condition[f"_given/{name}"] = nll(samples, [text] * len(samples))
    metrics = {}
    for label in np.unique(labels[labels >= 0]):
        for suffix, (values, tokens) in by_condition.items():
            of = labels == label
            metrics[f"nll/{names[label]}{suffix}"] = float(values[of].sum() / tokens[of].sum())
    return metrics


def negative_log_likelihoods(
    trainer: Any, model: nn.Module, prompt_ids: Sequence[list[int]], completion_ids: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Score a completion of each of N prompts, for ``nll_given``: each process a share, the result on every one."""
    groups = [
        {"prompt_ids": prompt, "completion_ids": [list(ids)], "scores": [0.0]}
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True)
    ]
    nll = [-logps[0] for logps in group_logps(trainer, model, groups)]
    return np.array(nll), np.array([len(ids) for ids in completion_ids])


def group_logps(trainer: Any, model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Score the completions of groups: their log-probs in nats, each process a share, the result on every one.

    Args:
        model: from ``trainer.sampling_from``, so that each process calls it as often as it needs.
    """
    collate, state = GroupCollator(trainer.processing_class.pad_token_id), PartialState()
    own = np.array_split(np.arange(len(groups)), state.num_processes)[state.process_index]
    found: list[list[float]] = []
    batch: list[Mapping[str, Any]] = []
    for i in own:
        batch.append(groups[i])
        if i == own[-1] or sum(len(group["completion_ids"]) for group in batch) >= SCORED_TOGETHER:
            inputs = trainer.on_device(collate(batch))
            logps = completion_logps(model, inputs, layout=trainer.layout, token_stats=False).logps
            found += [row[ok].tolist() for row, ok in zip(logps, inputs["valid"], strict=True)]
            batch = []
    return [logps for part in gather_object([found]) for logps in part]
