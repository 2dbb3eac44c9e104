"""Does the condition control the model? Rewards of what it samples under each, likelihoods of what others wrote."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput, speed_metrics

from contrastive_align.conditions.scored_rows import read_scored
from contrastive_align.data import GroupCollator
from contrastive_align.models import completion_logps
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import Pool
from contrastive_align.sampling.decode import seed_of


UNCONDITIONED = "nothing"
SCORED_TOGETHER = 64  # completions whose log-probs are computed at once


class ConditionalEvaluationMixin:
    """``evaluate`` of :class:`~contrastive_align.ConditionalTrainer`."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Online: sample ``num_generations`` completions of each prompt under each condition and under none;
        ``<prefix>_reward_given/<condition>`` is their mean reward, ``.../se`` its standard error over prompts.

        Offline: completions that have scores or feedback; ``<prefix>_nll/<label>_given/<condition>`` is their mean
        negative log-likelihood per token under the best and the worst condition, ``<prefix>_nll/<label>`` under their
        own.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if not isinstance(dataset, Dataset):
            raise ValueError(f"eval_dataset is a {type(dataset).__name__}, expected a datasets.Dataset to evaluate on.")
        start = time.time()
        found = self._rewards_given(dataset) if self.online else self._likelihoods(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
        self.log_measured(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        raise NotImplementedError(
            "predict returns logits, which this trainer never builds. trainer.evaluate(dataset) gives rewards or "
            "likelihoods under each condition."
        )

    # --------------------------------------------------------------------------------------------------------- online

    def _rewards_given(self, dataset: Dataset) -> dict[str, float]:
        metrics = {}
        for name, rewards in self.rewards_given(dataset).items():
            values = rewards[~np.isnan(rewards)]
            metrics[f"reward_given/{name}"] = float(values.mean()) if len(values) else math.nan
            if len(values) > 1:
                metrics[f"reward_given/{name}/se"] = float(values.std(ddof=1) / math.sqrt(len(values)))
        return metrics

    def rewards_given(self, dataset: Dataset, *, conditions: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Condition -> the mean reward of each prompt's completions.

        NaN where none was scored, or where the prompt is too long, which is said.
        ``"nothing"`` is no condition. A prompt's seeds are the same under every condition and in every evaluation
        (not with ``use_vllm``, which has its own).
        """
        best = self.best_condition()
        askable: dict[str, str | None] = {UNCONDITIONED: None, **best.askable()}
        names = list(askable) if conditions is None else list(conditions)
        short = np.setdiff1d(np.arange(len(dataset)), self.too_long(dataset, "eval_dataset", best))
        own = np.array_split(short, self.accelerator.num_processes)[self.accelerator.process_index]
        rows = [dataset[int(i)] for i in own]
        seeds = [seed_of(self.args.seed, "evaluation", int(i)) for i in own]
        found = {}
        for name in names:
            texts = [askable[name]] * len(rows)
            completions = self.generate(
                [row["prompt"] for row in rows],
                self.args.num_generations,
                seeds,
                conditions=texts,
                sync=name == names[0],
            )
            answers = self.judge_completions(rows, completions)
            scores = [[math.nan if score is None else score for score, _ in group] for group in answers]
            means = [float(np.nanmean(group)) if not np.isnan(group).all() else math.nan for group in scores]
            found[name] = np.full(len(dataset), np.nan)
            found[name][short] = [mean for part in gather_object([means]) for mean in part]
        return found

    # -------------------------------------------------------------------------------------------------------- offline

    def _likelihoods(self, dataset: Dataset) -> dict[str, float]:
        samples, _ = read_scored(
            dataset,
            self._tokenizer,
            max_length=self.args.max_length,
            condition=self.best_condition(),
            on_bad_row=self.args.on_bad_row,
        )
        with tempfile.TemporaryDirectory() as folder:
            pool = Pool(folder, label=self.condition.label)
            pool.add(samples)
            try:
                table = pool.table()
            except ValueError as error:
                raise ValueError(f"The {len(samples)} completions to evaluate on cannot be sorted: {error}") from error
            labels, names = table.label.copy(), self.condition.names(table)
            del pool
        askable = list(self.best_condition().askable().items())
        ends = dict([askable[0], askable[-1]]) if askable else {}
        own = [
            self.condition.text(s, int(label)) if label >= 0 else None for s, label in zip(samples, labels, strict=True)
        ]
        by_condition = {"": self.nll_given(samples, own)}
        for name, text in ends.items():
            by_condition[f"_given/{name}"] = self.nll_given(samples, [text] * len(samples))
        metrics = {}
        for label in np.unique(labels[labels >= 0]):
            for suffix, (nll, tokens) in by_condition.items():
                of = labels == label
                metrics[f"nll/{names[label]}{suffix}"] = float(nll[of].sum() / tokens[of].sum())
        return metrics

    def nll_given(
        self, samples: list[Sample], texts: list[str | None], *, reference: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N,) negative log-likelihoods in nats and (N,) tokens of completions, each under a condition or none.

        Args:
            reference: of the reference in place of the policy.
        """
        n, collate = len(samples), GroupCollator(self._tokenizer.pad_token_id)
        own = np.array_split(np.arange(n), self.accelerator.num_processes)[self.accelerator.process_index]
        found = []
        with self.sampling(reference) as model:
            for start in range(0, len(own), SCORED_TOGETHER):
                groups = []
                for i in own[start : start + SCORED_TOGETHER]:
                    sample, text = samples[i], texts[i]
                    prompt = sample.prompt if text is None else self.condition.apply(sample.prompt, text)
                    groups.append(
                        {"prompt_ids": self.encode(prompt), "completion_ids": [sample.completion_ids], "scores": [0.0]}
                    )
                batch = {name: tensor.to(self.accelerator.device) for name, tensor in collate(groups).items()}
                logps = completion_logps(model, batch, layout=self.layout, token_stats=False)
                found += zip((-logps.logps[:, 0]).tolist(), logps.lengths[:, 0].tolist(), strict=True)
        everywhere = np.array([pair for part in gather_object([found]) for pair in part])
        return everywhere[:, 0], everywhere[:, 1]
