"""A round of conditional training: prompts -> completions -> feedback -> pool."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from contrastive_align.data import GroupCollator
from contrastive_align.data.formats import Text
from contrastive_align.feedback.conditions import Condition
from contrastive_align.feedback.judged_conditions import Text as FreeText
from contrastive_align.feedback.pool import Pool, Table
from contrastive_align.feedback.pool_prompts import check_prompts, remember_prompts
from contrastive_align.feedback.rounds import Sample
from contrastive_align.models import completion_logps
from contrastive_align.report.rounds import plot_round
from contrastive_align.sampling.decode import draw
from contrastive_align.sampling.seeds import seed_of
from contrastive_align.targets.evaluate import Feature, call_feature
from contrastive_align.trainers.modes import evaluation_mode
from contrastive_align.trainers.server_sampling import generate_on_server
from contrastive_align.trainers.vllm_sampling import VLLMSampler


logger = logging.get_logger(__name__)

SCORED_TOGETHER = 64  # completions whose log-probs under the reference are computed at once
# What a reward function is given by these names is not the dataset's column.
_NOT_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state")


class RoundsMixin:
    """What :class:`~contrastive_align.ConditionalTrainer` does between two passes of training."""

    pool: Pool
    condition: Condition
    prompts: Dataset
    feature: Feature | None
    judge: Any
    sampler: Any
    vllm: VLLMSampler | None
    reference: PreTrainedModel | None
    layout: str
    _cut_said = False

    # ------------------------------------------------------------------------------------------------------ sampling

    @contextlib.contextmanager
    def sampling(self, reference: bool = False) -> Iterator[PreTrainedModel]:
        """The policy or the reference in evaluation mode and in the run's precision, without gradients."""
        if reference and self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.reference
        else:
            with evaluation_mode(self, without_adapter=reference) as model:
                yield model

    def generate(
        self,
        prompts: list[Text],
        per_prompt: int,
        seeds: list[int],
        *,
        conditions: list[str | None] | None = None,
        sync: bool = True,
    ) -> list[list[dict[str, Any]]]:
        """Completions of prompts, each conditioned on a text or on nothing: ``ids``, ``text``, ``finished``.

        Args:
            seeds: one for each prompt. vLLM (``use_vllm``) has random numbers of its own.
            conditions: a text for each prompt, or None for none; by default none.
            sync: vLLM is handed the weights first; False where they have not changed since the last call.
        """
        conditions = conditions or [None] * len(prompts)
        seen = [p if c is None else self.conditioned(p, c) for p, c in zip(prompts, conditions, strict=True)]
        if self.sampler is not None:
            return generate_on_server(self, seen, per_prompt, seeds)
        ids = [self.encode(prompt) for prompt in seen]
        groups = self._draw(ids, per_prompt, seeds) if self.vllm is None else self.vllm(ids, per_prompt, sync=sync)
        ends = set(self.eos_token_ids)
        return [
            [
                {"ids": ids, "text": self._tokenizer.decode(ids, skip_special_tokens=True), "finished": ids[-1] in ends}
                for ids in group
            ]
            for group in groups
        ]

    def _draw(self, prompt_ids: list[list[int]], per_prompt: int, seeds: list[int]) -> list[list[list[int]]]:
        """From the policy itself."""
        with self.sampling() as model:  # by all processes, also one without prompts: weights may be gathered
            if not prompt_ids:
                return []
            drawn = draw(
                model,
                prompt_ids,
                per_prompt=per_prompt,
                max_new_tokens=self.args.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self._tokenizer.pad_token_id,
                seeds=seeds,
                rows_at_once=self.args.rows_at_once,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                suppress_ids=self.condition_ids,
            )
        return drawn.completion_ids

    def judge_completions(
        self, rows: list[dict[str, Any]], completions: list[list[dict[str, Any]]]
    ) -> list[list[tuple[float | None, str | None]]]:
        """Score and words for each completion of each row.

        A judge is asked by the main process for all of them, so that its budget and its cache are one; reward functions
        run where their completions are.
        """
        texts = [[c["text"] for c in group] for group in completions]
        if self.judge is not None:
            share = [(row["prompt"], group) for row, group in zip(rows, texts, strict=True)]
            shares = gather_object([share])
            asked = [(prompt, text) for part in shares for prompt, group in part for text in group]
            answers = [None]
            if self.accelerator.is_main_process:
                answers = [self.judge([p for p, _ in asked], [text for _, text in asked])]
            broadcast_object_list(answers)
            first = sum(len(group) for part in shares[: self.accelerator.process_index] for _, group in part)
            own = iter(answers[0][first:])
            return [[_verdict(next(own)) for _ in group] for group in texts]
        if not rows:
            return []
        sizes = [len(group) for group in texts]
        repeated = [row for row, n in zip(rows, sizes, strict=True) for _ in range(n)]
        conversational = not isinstance(rows[0]["prompt"], str)
        flat = [text for group in texts for text in group]
        scores = call_feature(
            self.feature,
            [row["prompt"] for row in repeated],
            [[{"role": "assistant", "content": text}] for text in flat] if conversational else flat,
            {
                "completion_ids": [c["ids"] for group in completions for c in group],
                "trainer_state": self.state,
                **{name: [row[name] for row in repeated] for name in rows[0] if name not in _NOT_COLUMNS},
            },
            none_allowed=True,
        )
        own = iter(scores)
        return [[(next(own), None) for _ in range(n)] for n in sizes]

    # --------------------------------------------------------------------------------------------------------- rounds

    def check_pool(self) -> None:
        """Raise ValueError where the pool's rounds are of other prompts, OSError where it takes no new one."""
        if self.online:
            check_prompts(self.pool, self.prompts["prompt"])
            if self.accelerator.is_main_process:
                self.pool.check_writable()

    def begin_round(self, number: int) -> None:
        """Sample, ask for feedback and write the round, unless the pool has it already; then set what is drawn from it.

        What a round draws depends on the seed and the pool alone, so that one continued later draws the same.
        """
        if self.online and number not in self.pool.rounds:
            if number != len(self.pool.rounds) + 1:
                raise ValueError(
                    f"The run goes on with round {number}, and {self.pool.folder} has rounds {self.pool.rounds}: the "
                    "samples of the rounds before are missing. Give the pool_dir that they are in, or start anew."
                )
            samples = self._sample(number)
            everyone = [sample for part in gather_object([samples]) for sample in part]
            for sample in everyone:  # before anything is written: a round with one that has no label is of no use
                self.condition.check(sample)
            if number == 1 and all(s.score is None and s.feedback is None for s in everyone):
                raise ValueError(
                    f"None of the {len(everyone)} samples of round 1 was scored or judged: there is nothing to learn "
                    "from, and the round is not written. See what the "
                    f"{'reward functions return' if self.judge is None else 'judge answers'}, then start again."
                    f"{'' if self.judge is None else f' The judge so far: {_counts(self.judge)}.'}"
                )
            if self.accelerator.is_main_process:
                remember_prompts(self.pool, self.prompts["prompt"])
                self.pool.add(everyone)
            self.accelerator.wait_for_everyone()
        self.pool.reload()
        if self.online and self.pool.steps[number] != self.state.global_step:
            logger.warning(
                f"Round {number} was sampled at step {self.pool.steps[number]} and is trained on from step "
                f"{self.state.global_step}: options that set the length of a round have changed since."
            )
        through = number if self.online else 1
        table = self.pool.table(through)
        draws, labels = self.pool.draws(self.rows.length, seed=(self.args.seed, number), through=through)
        self.rows.set_draws(draws, labels, through)
        logged = any(entry.get("round/number") == number for entry in self.state.log_history)
        if not logged and (self.online or number == 1):
            self._log_round(number, table, through)

    def _sample(self, number: int) -> list[Sample]:
        """This process's share of the round."""
        places = self._prompts_of(number)
        own = np.array_split(places, self.accelerator.num_processes)[self.accelerator.process_index]
        rows = [self.prompts[int(i)] for i in own]
        condition = self.best_condition(number - 1) if number > 1 else None
        completions = self.generate(
            [row["prompt"] for row in rows],
            self.args.num_generations,
            [seed_of(self.args.seed, "round", number, int(i)) for i in own],
            conditions=None if condition is None else [condition.best_for(row["prompt"]) for row in rows],
        )
        feedback = self.judge_completions(rows, completions)
        return [
            Sample(
                prompt=row["prompt"],
                completion_ids=c["ids"],
                completion=c["text"],
                score=score,
                feedback=words,
                finished=c["finished"],
                prompt_index=int(i),
                sample_index=k,
                round=number,
                step=self.state.global_step,
            )
            for i, row, group, answers in zip(own, rows, completions, feedback, strict=True)
            for k, (c, (score, words)) in enumerate(zip(group, answers, strict=True))
        ]

    def _prompts_of(self, number: int) -> np.ndarray:
        """Rows of the dataset: the rounds go through it in a random order, then through it again in another one.

        No round has a prompt twice: where a round ends one pass and begins the next, what it has of the first comes
        late in the second.
        """
        n, size = len(self.prompts), self.prompts_per_round
        first, last = (number - 1) * size, number * size - 1
        orders: list[np.ndarray] = []
        for p in range(last // n + 1):
            order = np.random.default_rng([self.args.seed, p]).permutation(n)
            if shared := p * n % size:  # places that the round in which this pass begins has of the pass before
                late = np.isin(order, orders[-1][n - shared :])
                order = np.concatenate([order[~late], order[late]])
            orders.append(order)
        return np.array([orders[place // n][place % n] for place in range(first, last + 1)])

    def best_condition(self, through: int | None = None) -> Condition:
        """The condition to ask for the best with: of a judge's words, those that the best samples were given."""
        condition = self.condition
        if not isinstance(condition, FreeText) or condition.exemplars or not self.pool.rounds:
            return condition
        try:
            return condition.with_exemplars(condition.exemplars_from(self.pool.table(through)))
        except ValueError as error:
            raise ValueError(f"{error} Nothing says what the best is: look at the judge's answers.") from error

    # -------------------------------------------------------------------------------------------------------- metrics

    def _log_round(self, number: int, table: Table, through: int) -> None:
        newest = table.round == number if self.online else np.ones(len(table), dtype=bool)
        scores = table.score[newest]
        scores = scores[~np.isnan(scores)]
        logs = {
            "round/number": number,
            "round/samples": int(newest.sum()),
            "round/left_out": int((table.label[newest] < 0).sum()),
            "round/unscored": int(np.isnan(table.score[newest]).sum()),
            "round/pool": len(table),
            "round/finished": float(table.finished[newest].mean()),
            "round/mean_length": float(table.length[newest].mean()),
        }
        if len(scores):
            logs |= {"round/mean_reward": float(scores.mean()), "round/reward_std": float(scores.std())}
            if self.condition.reads == ("score",):
                logs["round/no_signal"] = self._no_signal(number, table, newest)
        if self.online and self.condition.free_words:
            logs |= self._words_cut(number, table, newest & (table.label >= 0))
        names = self.condition.names(table)
        for label, name in enumerate(names):
            there = (table.label == label) & ~np.isnan(table.score)
            if there.any():
                logs[f"round/reward/{name}"] = float(table.score[there].mean())
        logs |= self._text_metrics(np.flatnonzero(newest)[:: max(1, int(newest.sum()) // 512)], through)
        self.log_measured(logs)
        if self.args.should_save:
            self._draw_round(number, table)

    def _no_signal(self, number: int, table: Table, newest: np.ndarray) -> float:
        """The share of groups sorted by themselves, of which all scores of this round are equal; with a warning."""
        newest = newest & ~np.isnan(table.score)
        by_prompt = getattr(self.condition, "per_prompt", False)
        group = table.prompt_index[newest] if by_prompt else np.zeros(int(newest.sum()), dtype=np.int64)
        places, of = np.unique(group, return_inverse=True)
        low, high = np.full(len(places), np.inf), np.full(len(places), -np.inf)
        np.minimum.at(low, of, table.score[newest])
        np.maximum.at(high, of, table.score[newest])
        tied = places[low == high]
        if len(tied) and (number == 1 or len(tied) == len(places)):
            of_them = f"of {len(tied)} of {len(places)} prompts ({tied[:5].tolist()} first) " if by_prompt else ""
            logger.warning(
                f"Round {number}: all completions {of_them}have the same score. Their quantiles follow the order in "
                "which they were sampled, and say nothing. round/no_signal is the share of such."
            )
        return len(tied) / len(places)

    def _words_cut(self, number: int, table: Table, newest: np.ndarray) -> dict[str, int]:
        """How many words of this round's samples are cut to fit, and of what its prompts were asked with; a warning."""
        samples = self.pool.read(np.flatnonzero(newest), number)
        own = [s for s in samples if self.conditioned.cuts(s.prompt, s.feedback)]
        asked = []
        if number > 1:
            best, prompts = self.best_condition(number - 1), {s.prompt_index: s.prompt for s in samples}
            asked = [i for i, prompt in prompts.items() if self.conditioned.cuts(prompt, best.best_for(prompt))]
        if (own or asked) and not self._cut_said:
            self._cut_said = True
            rows = sorted({s.prompt_index for s in own} | set(asked))
            logger.warning(
                f"Round {number}: a judge's words that leave no room for a completion lose their end: those of "
                f"{len(own)} samples, and those that {len(asked)} prompts were asked with; of the prompts {rows[:5]} "
                f"first. Prompt and words have {self.conditioned.room} tokens. Let the judge use fewer words, or raise "
                "max_length. round/words_cut and round/asked_cut count them."
            )
        return {"round/words_cut": len(own), "round/asked_cut": len(asked)}

    def log_measured(self, logs: dict[str, float]) -> None:
        """Log by itself: means over the steps since training was logged wait for its next log."""
        was_training = self.model.training
        self.model.eval()  # TRL's log asks the model which of the two it is
        self.log(logs)
        self.model.train(was_training)

    def _text_metrics(self, indices: np.ndarray, through: int) -> dict[str, float]:
        """distinct-n, and the perplexity under the reference where there is one, of some hundred samples."""
        samples = self.pool.read(indices, through)
        metrics = {}
        for n in (1, 2, 3):
            grams = [tuple(s.completion_ids[i : i + n]) for s in samples for i in range(len(s.completion_ids) - n + 1)]
            metrics[f"round/distinct_{n}"] = len(set(grams)) / len(grams) if grams else math.nan
        if self.has_reference:
            collate = GroupCollator(self._tokenizer.pad_token_id)
            own = np.array_split(np.arange(len(samples)), self.accelerator.num_processes)[
                self.accelerator.process_index
            ]
            logp = tokens = 0.0
            with self.sampling(reference=True) as model:
                for start in range(0, len(own), SCORED_TOGETHER):
                    groups = [
                        {
                            "prompt_ids": self.encode(samples[i].prompt),
                            "completion_ids": [samples[i].completion_ids],
                            "scores": [0.0],
                        }
                        for i in own[start : start + SCORED_TOGETHER]
                    ]
                    batch = {name: t.to(self.accelerator.device) for name, t in collate(groups).items()}
                    found = completion_logps(model, batch, layout=self.layout, token_stats=False)
                    logp, tokens = logp + found.logps.sum().item(), tokens + found.lengths.sum().item()
            totals = self.accelerator.gather(torch.tensor([[logp, tokens]], device=self.accelerator.device)).sum(0)
            metrics["round/reference_perplexity"] = math.exp(-totals[0].item() / totals[1].item())
        return metrics

    def _draw_round(self, number: int, table: Table) -> None:
        path = Path(self.args.output_dir) / "rounds" / f"round-{number:03d}.png"
        try:
            plot_round(
                table.label,
                table.score,
                table.length,
                names=self.condition.names(table),
                path=path,
                title=f"The pool in round {number}: what each condition stands for",
            )
        except ImportError as error:
            logger.warning_once(str(error))


def _counts(judge: Any) -> str:
    """What a judge's items came to, as in ``8 unparsable, 2 failed``."""
    outcomes = ("answered", "unparsable", "failed", "over_budget")
    found = judge.report() if hasattr(judge, "report") else {}
    return ", ".join(f"{found[name]} {name.replace('_', ' ')}" for name in outcomes if found.get(name)) or "no verdict"


def _verdict(answer: Any) -> tuple[float | None, str | None]:
    return (None, None) if answer is None else (answer.score, answer.text)


def frozen_copy(model: nn.Module) -> PreTrainedModel:
    """The reference, where it is not the policy without its adapter."""
    assert not is_peft_model(model)
    return copy.deepcopy(model).eval().requires_grad_(False)
