"""Rounds of sampling: prompts -> completions -> feedback -> pool, and the rows that are drawn from it.

:class:`Rounds` is a plain class: it is given what draws completions, what says how good they are, and a pool.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils import logging

from contrastive_align.conditions import Condition
from contrastive_align.conditions.judged import TextCondition
from contrastive_align.data import GroupCollator
from contrastive_align.data.formats import Text
from contrastive_align.pool import Pool, Sample
from contrastive_align.pool.prompts import check_prompts, remember_prompts
from contrastive_align.rounds.groups import GroupSignal
from contrastive_align.rounds.long_prompts import rows_of_long_prompts, surely_fits
from contrastive_align.sampling.decode import seed_of
from contrastive_align.targets.evaluate import Feature, call_feature, reward_arguments


logger = logging.get_logger(__name__)

Completion = dict[str, Any]  # ids, text, finished
ScoreAndWords = tuple[float | None, str | None]  # of one completion

WITHOUT_CONDITION = "unconditioned_"


class Policy(Protocol):
    """What draws completions: a model, vLLM, a server."""

    def __call__(
        self,
        prompts: Sequence[Text],
        per_prompt: int,
        seeds: Sequence[int],
        *,
        conditions: Sequence[str | None] | None = None,
    ) -> list[list[Completion]]:
        """``per_prompt`` completions of each prompt under its condition, on every process."""
        ...


class Feedback(Protocol):
    """What says how good completions are."""

    def __call__(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[Sequence[Completion]]
    ) -> list[list[ScoreAndWords]]:
        """Score and words for each completion of each row, on every process."""
        ...


class NoSignal(ValueError):
    """A round of samples that nothing tells apart."""


@dataclass(kw_only=True, eq=False)
class Rounds:
    """Sample a round, ask for feedback on it, and add it to the pool.

    What a round draws depends on the seed and the pool alone, so that one continued later draws the same.

    Args:
        policy: draws completions. Its seeds are the same on any number of processes.
        feedback: says how good they are.
        pool: where the samples go.
        condition: from round 2 on, prompts are asked for the best; with :class:`GroupSignal` they never are.
        prompts: rows with a column ``prompt``.
        prompts_per_round: the next round goes on where this one stopped.
        num_generations: completions of a prompt.
        seed: of the order of the prompts and of the samples.
        describe_feedback: how to look for the reason where nothing was scored.
        resample: how often a prompt whose completions say nothing is given new ones.
    """

    policy: Policy
    feedback: Feedback
    pool: Pool
    condition: Condition | GroupSignal
    prompts: Dataset
    prompts_per_round: int
    num_generations: int
    seed: int
    describe_feedback: Callable[[], str]
    resample: int = 0

    def check_pool(self) -> None:
        """Raise ValueError where the pool's rounds are of other prompts, OSError where the pool takes no new round."""
        check_prompts(self.pool, self.prompts["prompt"])
        if PartialState().is_main_process:
            self.pool.check_writable()

    def make(self, number: int, step: int) -> None:
        """Sample a round and write it, unless the pool has it already.

        Args:
            number: of the round, from 1.
            step: optimiser steps made so far.

        Raises:
            NoSignal: there would be no sample with a label to train on.
            ValueError: earlier rounds are missing.
        """
        if number not in self.pool.rounds:
            if number != len(self.pool.rounds) + 1:
                raise ValueError(
                    f"The run goes on with round {number}, and {self.pool.folder} has rounds {self.pool.rounds}: the "
                    "samples of the rounds before are missing. Give the pool_dir that they are in, or start anew."
                )
            samples = self._sample(number, step)
            everyone = [sample for part in gather_object([samples]) for sample in part]
            for sample in everyone:  # before anything is written: a round with one that has no label is of no use
                self.condition.check(sample)
            if number == 1 or self.pool.drop_factor == 1:  # else there are those of earlier rounds
                try:
                    self.condition.check_signal(everyone)
                except ValueError as error:
                    raise NoSignal(f"Round {number} is not written. {error} {self.describe_feedback()}") from error
            if PartialState().is_main_process:
                remember_prompts(self.pool, self.prompts["prompt"])
                self.pool.add(everyone)
            PartialState().wait_for_everyone()
        self.pool.reload()
        if self.pool.steps[number] != step:
            logger.warning(
                f"Round {number} was sampled at step {self.pool.steps[number]} and is trained on from step {step}: "
                "options that set the length of a round have changed since."
            )

    def _sample(self, number: int, step: int) -> list[Sample]:
        """Draw and score the share of the round that falls to this process."""
        state = PartialState()
        own = np.array_split(self.prompts_of(number), state.num_processes)[state.process_index]
        groups = self._scored(number, own)
        for attempt in range(1, self.resample + 1):
            flat = [place for place, group in enumerate(groups) if len({score for *_, score, _ in group} - {None}) < 2]
            if not sum(gather_object([len(flat)])):
                break
            for place, group in zip(flat, self._scored(number, own[flat], attempt), strict=True):
                groups[place] = group
        return [
            Sample(
                prompt=self.prompts[int(i)]["prompt"],
                completion_ids=completion["ids"],
                completion=completion["text"],
                score=score,
                feedback=words,
                finished=completion["finished"],
                prompt_index=int(i),
                sample_index=k,
                round=number,
                step=step,
            )
            for i, group in zip(own, groups, strict=True)
            for k, completion, score, words in group
        ]

    def _scored(
        self, number: int, own: np.ndarray, attempt: int = 0
    ) -> list[list[tuple[int, Completion, float | None, str | None]]]:
        """Draw and score completions of some prompts: the number of each among its prompt's, itself, score and words.

        Numbers go on from one attempt to the next, so that the pool tells how often a prompt was sampled.
        """
        rows = [self.prompts[int(i)] for i in own]
        asked = isinstance(self.condition, Condition) and number > 1
        condition = best_condition(self.condition, self.pool, number - 1) if asked else None
        again = ("attempt", attempt) if attempt else ()
        completions = self.policy(
            [row["prompt"] for row in rows],
            self.num_generations,
            [seed_of(self.seed, "round", number, int(i), *again) for i in own],
            conditions=None if condition is None else [condition.best_for(row["prompt"]) for row in rows],
        )
        feedback = self.feedback(rows, completions)
        first = attempt * self.num_generations
        return [
            [
                (first + k, completion, score, words)
                for k, (completion, (score, words)) in enumerate(zip(group, answers, strict=True))
            ]
            for group, answers in zip(completions, feedback, strict=True)
        ]

    def prompts_of(self, number: int) -> np.ndarray:
        """Return the rows of a round. Rounds go through the data in a random order, then again in another one.

        No round has a prompt twice: where a round ends one pass and begins the next, the prompts that it has of the
        first pass come late in the second.
        """
        n, size = len(self.prompts), self.prompts_per_round
        first, last = (number - 1) * size, number * size - 1
        orders: list[np.ndarray] = []
        for p in range(last // n + 1):
            order = np.random.default_rng([self.seed, p]).permutation(n)
            if shared := p * n % size:  # places that the round in which this pass begins has of the pass before
                late = np.isin(order, orders[-1][n - shared :])
                order = np.concatenate([order[~late], order[late]])
            orders.append(order)
        return np.array([orders[place // n][place % n] for place in range(first, last + 1)])


def best_condition(condition: Condition, pool: Pool, through: int | None = None) -> Condition:
    """Return the condition to ask for the best with: for a judge's words, the words that the best samples were given.

    Args:
        through: the last round that counts; None: all.

    Raises:
        ValueError: no sample has both words and score.
    """
    if not isinstance(condition, TextCondition) or condition.exemplars or not pool.rounds:
        return condition
    try:
        return condition.with_exemplars(condition.exemplars_from(pool.table(through)))
    except ValueError as error:
        raise ValueError(f"{error} Nothing says what the best is: look at the judge's answers.") from error


def prompts_without_room(
    dataset: Dataset, conditioned: ConditionedPrompts, *, name: str, limits: Mapping[str, int]
) -> list[int]:
    """Return the rows whose prompt leaves no room for a completion, with a warning that they are left out.

    Args:
        conditioned: its condition, how prompts are encoded, and the tokens that they may have with it or without.
        name: of the dataset, for messages.
        limits: what makes up the room, for messages.

    Raises:
        ValueError: no column 'prompt', or a prompt that cannot be conditioned.
    """
    condition = conditioned.condition
    texts = [""] if condition.free_words else list(condition.askable().values())

    def length(row: int, prompt: Text) -> int:
        try:
            asked = [condition.apply(prompt, text) for text in texts]
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from error
        return max(len(conditioned.encode(p)) for p in [prompt, *asked])

    return rows_of_long_prompts(dataset, length, conditioned.room, name=name, limits=limits)


# ----------------------------------------------------------------------------------------------------------- feedback


class RewardFeedback:
    """Scores of a feature, computed where the completions are.

    Args:
        feature: the reward.
        keywords: returns further arguments of the reward function, such as ``trainer_state``.
    """

    def __init__(self, feature: Feature, keywords: Callable[[], dict[str, Any]] = dict) -> None:
        self.feature, self.keywords = feature, keywords

    def __call__(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[Sequence[Completion]]
    ) -> list[list[ScoreAndWords]]:
        ids, texts = ([[completion[part] for completion in group] for group in completions] for part in ("ids", "text"))
        given = reward_arguments(rows, ids, texts) | self.keywords()
        prompts, answers = given.pop("prompts"), given.pop("completions")
        own = iter(call_feature(self.feature, prompts, answers, given, none_allowed=True))
        return [[(next(own), None) for _ in group] for group in completions]

    def describe(self) -> str:
        """Return advice for a round in which nothing was scored."""
        return "See what the reward functions return, then start again."


@dataclass(eq=False)
class JudgeFeedback:
    """Verdicts of a judge, asked by the main process for all, so that its budget and its ledger are one."""

    judge: Any

    def __call__(
        self, rows: Sequence[dict[str, Any]], completions: Sequence[Sequence[Completion]]
    ) -> list[list[ScoreAndWords]]:
        state = PartialState()
        texts = [[completion["text"] for completion in group] for group in completions]
        shares = gather_object([[(row["prompt"], group) for row, group in zip(rows, texts, strict=True)]])
        asked = [(prompt, text) for part in shares for prompt, group in part for text in group]
        answers: list[Any] = [None]
        if state.is_main_process:
            answers = [self.judge([prompt for prompt, _ in asked], [text for _, text in asked])]
        broadcast_object_list(answers)
        first = sum(len(group) for part in shares[: state.process_index] for _, group in part)
        own = iter(answers[0][first:])
        verdicts = [[next(own) for _ in group] for group in texts]
        return [[(None, None) if v is None else (v.score, v.text) for v in group] for group in verdicts]

    def describe(self) -> str:
        """Return advice for a round in which nothing was judged, with the counts of outcomes so far."""
        outcomes = ("answered", "unparsable", "failed", "over_budget")
        found = self.judge.report() if hasattr(self.judge, "report") else {}
        counts = ", ".join(f"{found[name]} {name.replace('_', ' ')}" for name in outcomes if found.get(name))
        kinds = ", ".join(f"{number} x {kind}" for kind, number in found.get("unreadable", {}).items())
        unread = f" Of its replies could not be read: {kinds}." if kinds else ""
        return f"See what the judge answers, then start again. The judge so far: {counts or 'no verdict'}.{unread}"


# ----------------------------------------------------------------------------------------------- conditioned prompts


@dataclass(eq=False)
class ConditionedPrompts:
    """Prompts under the text of a condition; a judge's words keep as much of their beginning as fits.

    Args:
        condition: texts of a condition that is not made of free words are never cut: they would be others.
        encode: prompt -> token ids.
        room: tokens that the conditioned prompt may have; None: any number.

    >>> from contrastive_align.conditions import resolve_condition
    >>> under = ConditionedPrompts(resolve_condition("text"), str.split, room=6)
    >>> under("Hi!", "short and to the point")
    'feedback: short and to input: Hi!'
    >>> under.cuts("Hi!", "short"), under.cuts("Hi!", "short and to the point")
    (False, True)
    """

    condition: Condition
    encode: Callable[[Text], list]
    room: int | None

    def __call__(self, prompt: Text, text: str) -> Text:
        """Return the prompt under as much of the text as leaves it at most ``room`` tokens."""
        return self.condition.apply(prompt, self._fitting(prompt, text))

    def cuts(self, prompt: Text, text: str) -> bool:
        """Whether the text is cut for this prompt."""
        return self._fitting(prompt, text) != text

    def _fitting(self, prompt: Text, text: str) -> str:
        if not self.condition.free_words or self.room is None or self._fits(prompt, text):
            return text
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        if ends and not self._fits(prompt, text[: ends[0]]):  # as where a language has no spaces
            ends = list(range(1, ends[0]))
        n = bisect_left(ends, True, key=lambda end: not self._fits(prompt, text[:end]))
        return text[: ends[n - 1]] if n else ""

    def _fits(self, prompt: Text, text: str) -> bool:
        conditioned = self.condition.apply(prompt, text)
        return surely_fits(conditioned, self.room) or len(self.encode(conditioned)) <= self.room


@dataclass(eq=False)
class ConditionedRows(TorchDataset):
    """The draws of one round, in their order. The length is the same for every round.

    Args:
        pool: where the samples are.
        conditioned: prompts under the text that a label becomes.
        encode: prompt -> token ids.
        length: draws in a round.
        max_length: completions are cut so that the conditioned prompt and they have at most so many tokens.
    """

    pool: Pool
    conditioned: ConditionedPrompts
    encode: Callable[[Text], list[int]]
    length: int
    max_length: int | None
    _draws: Sequence[int] = field(default=(), init=False)
    _labels: Sequence[int] = field(default=(), init=False)
    _through: int = field(default=0, init=False)

    def set_draws(self, draws: Sequence[int], labels: Sequence[int], through: int) -> None:
        """Take places in the pool's table after round ``through``, and their labels.

        Raises:
            ValueError: not as many as a round has.
        """
        if len(draws) != self.length:
            raise ValueError(f"{len(draws)} draws for a round of {self.length}.")
        self._draws, self._labels, self._through = draws, labels, through

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        samples = self.pool.read([self._draws[i] for i in places], self._through)
        return [self.row(sample, int(self._labels[i])) for sample, i in zip(samples, places, strict=True)]

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def row(self, sample: Sample, label: int) -> dict[str, Any]:
        """One sample as ``prompt_ids`` (conditioned), ``unconditioned_ids`` (not conditioned) and ``completion_ids``.

        Raises:
            ValueError: a prompt that leaves no room for a completion.
        """
        prompt = self.conditioned(sample.prompt, self.conditioned.condition.text(sample, label))
        prompt_ids, completion_ids = self.encode(prompt), sample.completion_ids
        if self.max_length is not None:
            room = self.max_length - len(prompt_ids)
            if room < 1:
                raise ValueError(
                    f"The prompt of sample {sample.sample_index} of dataset row {sample.prompt_index} has, with its "
                    f"condition, {len(prompt_ids)} tokens and max_length is {self.max_length}: no room for a "
                    "completion. Raise max_length or leave the row out."
                )
            if len(completion_ids) > room:  # of a judge's words nobody knows the length before
                logger.warning_once(
                    "Completions that are, with their prompt and condition, longer than "
                    f"max_length={self.max_length} are cut there and train no EOS."
                )
            completion_ids = completion_ids[:room]
        return {
            "prompt_ids": prompt_ids,
            "unconditioned_ids": self.encode(sample.prompt),
            "completion_ids": completion_ids,
        }


@dataclass
class ConditionedCollator(DataCollatorMixin):
    """Batch rows of :class:`ConditionedRows`: a ``GroupBatch`` of groups with one completion, twice.

    The second, its names starting with ``unconditioned_``, has the prompts without condition, for the reference.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        collate = GroupCollator(self.pad_token_id, self.pad_to_multiple_of, torch.float32)
        batch = {}
        for prefix, prompt in (("", "prompt_ids"), (WITHOUT_CONDITION, "unconditioned_ids")):
            groups = [
                {"prompt_ids": e[prompt], "completion_ids": [e["completion_ids"]], "scores": [0.0]} for e in examples
            ]
            batch |= {prefix + name: tensor for name, tensor in collate(groups).items() if name != "scores"}
        return batch


def without_condition(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a batch whose prompts have no condition."""
    return {k.removeprefix(WITHOUT_CONDITION): v for k, v in batch.items() if k.startswith(WITHOUT_CONDITION)}
