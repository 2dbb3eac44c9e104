"""A round of conditional training: prompts -> completions -> feedback -> pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from contrastive_align.conditions.conditions import Condition
from contrastive_align.conditions.judged import TextCondition
from contrastive_align.data.formats import Text
from contrastive_align.pool.files import Sample
from contrastive_align.pool.pool import Pool
from contrastive_align.pool.prompts import check_prompts, remember_prompts
from contrastive_align.sampling.decode import draw
from contrastive_align.sampling.seeds import seed_of
from contrastive_align.targets.evaluate import Feature, call_feature
from contrastive_align.trainers.modes import evaluation_mode
from contrastive_align.trainers.server_sampling import generate_on_server
from contrastive_align.trainers.vllm_sampling import VLLMSampler


logger = logging.get_logger(__name__)

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
            self.log_round(number, table, through)

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
        if not isinstance(condition, TextCondition) or condition.exemplars or not self.pool.rounds:
            return condition
        try:
            return condition.with_exemplars(condition.exemplars_from(self.pool.table(through)))
        except ValueError as error:
            raise ValueError(f"{error} Nothing says what the best is: look at the judge's answers.") from error


def _counts(judge: Any) -> str:
    """What a judge's items came to, as in ``8 unparsable, 2 failed``."""
    outcomes = ("answered", "unparsable", "failed", "over_budget")
    found = judge.report() if hasattr(judge, "report") else {}
    return ", ".join(f"{found[name]} {name.replace('_', ' ')}" for name in outcomes if found.get(name)) or "no verdict"


def _verdict(answer: Any) -> tuple[float | None, str | None]:
    return (None, None) if answer is None else (answer.score, answer.text)
