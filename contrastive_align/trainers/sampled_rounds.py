"""What the trainers share that sample their rounds themselves: feedback, drawing, the pool, speed and evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from contrastive_align.data.formats import Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.models.loading import eos_token_ids
from contrastive_align.pool import Pool
from contrastive_align.registry import hash_of_user
from contrastive_align.rounds import rounds
from contrastive_align.rounds.long_prompts import rows_of_long_prompts, without_rows
from contrastive_align.rounds.reward_log import RewardLog
from contrastive_align.rounds.rounds import NoSignal
from contrastive_align.rounds.samplers import AdapterServer, VLLMSampler
from contrastive_align.sampling.decode import draw
from contrastive_align.targets.evaluate import Feature
from contrastive_align.targets.features import weighted_sum
from contrastive_align.trainers.configs import OF_SCORED
from contrastive_align.trainers.processes import on_main


logger = logging.get_logger(__name__)

POOL = "pool"  # the folder of the pool in that of the run


class SamplesRounds:
    """Rounds of a trainer's own samples; before :class:`AlignmentTrainer` in the bases.

    A trainer calls :meth:`take_feedback` before TRL's ``__init__``, and :meth:`take_sampler`, :meth:`take_prompts`,
    :meth:`fill_steps` and :meth:`open_rounds` after it. It has :meth:`begin_round` and :meth:`measure`, and adds
    :class:`BeginsRounds` to its callbacks.

    Attributes:
        online: whether rounds are sampled; otherwise nothing here is used but what the trainer calls itself.
        feedback: says how good completions are; None where nothing does.
        steps_per_round: optimiser steps.
    """

    online = False
    judge: Any = None
    feedback: rounds.Feedback | None = None
    condition_ids: Sequence[int] = ()  # of tokens that are never drawn
    vllm: VLLMSampler | None = None
    sampling_seconds = 0.0  # of the present round, on this process
    no_signal_left = False  # nothing tells the samples of the present round apart: training ends
    _server: AdapterServer | None = None

    def take_feedback(self, reward_funcs: Any, judge: Any, args: Any) -> None:
        """Take what says how good a completion is, one of the two or none.

        Raises:
            ValueError: both are given, or options of completions that are there already.
        """
        self.judge, self.reward_log = judge, RewardLog(has_table=False)
        if judge is not None and reward_funcs is not None:
            raise ValueError("Both reward_funcs and judge are given, expected one of them.")
        source = "a judge" if judge is not None else "reward_funcs"
        given = [name for name in (*OF_SCORED, "columns") if getattr(args, name, None)]
        if given and (judge is not None or reward_funcs is not None):
            raise ValueError(
                f"{given[0]} is of completions that are there, and {source} scores new ones. Give one of them."
            )
        if judge is not None:
            self.feedback = rounds.JudgeFeedback(judge)
        elif reward_funcs is not None:
            reward = weighted_sum(reward_funcs, args.reward_weights, trust_remote_code=args.trust_remote_code)
            self.feedback = self.feedback_by(reward)
        elif args.reward_weights is not None:
            raise ValueError("reward_weights weighs reward_funcs, and none are given. Leave it out.")

    def feedback_by(self, feature: Feature) -> rounds.RewardFeedback:
        """Feedback by a reward; set as ``trainer.feedback``, evaluation on scored data has rewards too."""
        return rounds.RewardFeedback(feature, lambda: {"trainer_state": self.state, **self.reward_log.keywords})

    @staticmethod
    def check_prompts_are_whole(train_dataset: Any) -> None:
        """Raise TypeError where the prompts are a stream."""
        if not isinstance(train_dataset, Dataset):
            raise TypeError(
                f"train_dataset is a {type(train_dataset).__name__}, expected a datasets.Dataset: a round takes "
                "prompts in an order of its own, which a stream does not have. Load it whole: it is prompts alone."
            )

    # -------------------------------------------------------------------------------------------- prompts and the pool

    def encode(self, prompt: Text) -> list[int]:
        """Token ids of a prompt, with or without condition; at least one."""
        start: Any = self.processing_class.bos_token_id
        return tokenise_prompt(prompt, self.processing_class) or [self.eos_token_ids[0] if start is None else start]

    def room(self) -> int:
        """Tokens that a prompt, with its condition where it has one, may have before the longest completion."""
        return min(self.context_limits().values(), default=2**31) - self.args.max_completion_length

    def too_long(self, dataset: Dataset, name: str) -> list[int]:
        """Return the rows whose prompt leaves no room for a completion, with a warning that they are left out."""
        limits = self.context_limits() | {"max_completion_length": self.args.max_completion_length}

        def length(row: int, prompt: Text) -> int:
            return len(self.encode(prompt))

        return rows_of_long_prompts(dataset, length, self.room(), name=name, limits=limits)

    def take_prompts(self, dataset: Dataset) -> None:
        """Take the prompts that leave room for a completion, and count the others; decide how many a round has.

        Raises:
            ValueError: none is left, fewer than a round has, or rounds that are not a whole number.
        """
        args = self.args
        if args.max_steps <= 0 and args.num_train_epochs != int(args.num_train_epochs):
            raise ValueError(f"num_train_epochs is {args.num_train_epochs}, expected a whole number of rounds.")
        self.leave_room_for_prompts()
        long = self.too_long(dataset, "train_dataset")
        self.data_report: dict[str, Any] = {"rows": len(dataset), "too_long": len(long)}
        self.prompts = without_rows(dataset, long, name="train_dataset")
        self.prompts_per_round = args.prompts_per_round or len(self.prompts)
        if self.prompts_per_round > len(self.prompts):
            raise ValueError(
                f"prompts_per_round is {self.prompts_per_round} and the dataset has {len(self.prompts)} prompts "
                "that can be used. Lower it, or raise num_generations for more completions a round."
            )

    @property
    def pool_folder(self) -> Path:
        """Where the pool is, or the pools of scored data beside it."""
        return Path(self.args.pool_dir or Path(self.args.output_dir) / POOL)

    def fill_steps(self, draws: int) -> int:
        """Decide the optimiser steps of a round; return its rows, ``draws`` rounded up to whole steps."""
        step = self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self.steps_per_round = math.ceil(draws / step)
        return self.steps_per_round * step

    def open_rounds(self, condition: Any, pool: Pool, *, resample: int = 0) -> None:
        """Make what samples the rounds (see :class:`~contrastive_align.rounds.rounds.Rounds`), and load vLLM."""
        self.rounds = rounds.Rounds(
            policy=self.generate,
            feedback=self.feedback,
            pool=pool,
            condition=condition,
            prompts=self.prompts,
            prompts_per_round=self.prompts_per_round,
            num_generations=self.args.num_generations,
            seed=self.args.seed,
            describe_feedback=lambda: self.feedback.describe(),
            resample=resample,
        )
        self.vllm = VLLMSampler(self) if self.args.use_vllm else None

    def check_pool(self) -> None:
        """Raise ValueError where the pool's rounds are of other prompts, OSError where the pool takes no new round."""
        if self.online:
            self.rounds.check_pool()

    @property
    def written_folders(self) -> tuple[str | Path, ...]:
        """Those of all trainers, and the pool's."""
        return (*super().written_folders, *([self.pool.folder] if self.online else []))

    def begin_training(self, *, going_on: bool) -> None:
        """Check the pool: what it has already is not sampled again.

        Raises:
            ValueError: the pool has the samples of an earlier run, which this one was not asked to continue, or
                samples of other prompts.
        """
        super().begin_training(going_on=going_on)
        self.no_signal_left = False
        if self.online and self.resumed_from is not None:
            on_main(self._take_over, self.resumed_from.parent / POOL)
            self.pool.reload()
        if self.online and self.pool.rounds and not going_on:
            raise ValueError(
                f"{self.pool.folder} has the samples of an earlier run (rounds {self.pool.rounds}). Go on with "
                "resume_from_checkpoint=True, or give another output_dir or pool_dir to start anew."
            )
        self.check_pool()

    def _take_over(self, folder: Path) -> None:
        """Copy the rounds that the checkpoint's run had sampled by then, where it was another run's."""
        if not self.pool.rounds and folder.is_dir() and (taken := self.pool.take_over(folder, self.start_step)):
            logger.warning(f"The rounds {taken} of {folder} are copied to {self.pool.folder}, where the run goes on.")

    def check_steps_of_round(self, checkpoint: Path, steps: int) -> None:
        """Raise ValueError where a checkpoint's rounds had another number of steps."""
        if self.online and steps != self.steps_per_round:
            raise ValueError(
                f"A round had {steps} optimiser steps in {checkpoint} and has {self.steps_per_round} now: its samples "
                "would be trained on in another round. Keep draws_per_round, and per_device_train_batch_size x "
                "gradient_accumulation_steps x processes."
            )

    def reward_function(self) -> dict[str, dict[str, str | None]]:
        """Return the reward function for ``functions``; nothing for a judge, or where there is none."""
        feature = getattr(self.feedback, "feature", None)
        return {} if feature is None else {"reward": {feature.name: hash_of_user(feature.function)}}

    # ------------------------------------------------------------------------------------------------------ sampling

    def take_sampler(self, sampler: Any) -> None:
        """Connect with the server that draws the completions, where there is one; find what ends a completion."""
        self.eos_token_ids = eos_token_ids(self.model, self.processing_class)
        self.sampler = sampler
        self._server = None if sampler is None else AdapterServer(self, sampler)

    def generate(
        self,
        prompts: Sequence[Text],
        per_prompt: int,
        seeds: Sequence[int],
        *,
        conditions: Sequence[str | None] | None = None,
    ) -> list[list[rounds.Completion]]:
        """Draw completions of prompts, each conditioned on a text or on nothing: ``ids``, ``text``, ``finished``.

        Args:
            seeds: one for each prompt. vLLM (``use_vllm``) has random numbers of its own.
            conditions: a text for each prompt, or None for none; by default none.
        """
        began = time.perf_counter()
        conditions = conditions or [None] * len(prompts)
        seen = [p if c is None else self.conditioned(p, c) for p, c in zip(prompts, conditions, strict=True)]
        ids = [self.encode(prompt) for prompt in seen]
        if self._server is not None:
            groups = self._server(ids, per_prompt, list(seeds))
            self.sampling_seconds += time.perf_counter() - began
            return groups
        groups = (
            self.vllm(ids, per_prompt) if self.vllm is not None else self.draw_from_policy(ids, per_prompt, list(seeds))
        )
        self.sampling_seconds += time.perf_counter() - began
        ends, decode = set(self.eos_token_ids), self.processing_class.decode
        return [
            [{"ids": ids, "text": decode(ids, skip_special_tokens=True), "finished": ids[-1] in ends} for ids in group]
            for group in groups
        ]

    def draw_from_policy(
        self, prompt_ids: list[list[int]], per_prompt: int, seeds: list[int], **adjusted: float
    ) -> Sequence[Sequence[list[int]]]:
        """Draw completions from the policy, adjusted as the options say or otherwise (``temperature`` ...)."""
        with self.sampling_from() as model:  # by all processes, also one without prompts: weights may be gathered
            if not prompt_ids:
                return []
            drawn = draw(
                model,
                prompt_ids,
                per_prompt=per_prompt,
                max_new_tokens=self.args.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.processing_class.pad_token_id,
                seeds=seeds,
                rows_at_once=self.args.rows_at_once,
                suppress_ids=self.condition_ids,
                **{name: getattr(self.args, name) for name in ("temperature", "top_k", "top_p")} | adjusted,
            )
        return drawn.completion_ids

    def unchanged_weights(self) -> contextlib.AbstractContextManager:
        """Hand the weights to vLLM once for all that is drawn inside the block, in which they do not change."""
        return contextlib.nullcontext() if self.vllm is None else self.vllm.unchanged_weights()

    def make_round(self, number: int) -> dict[str, float] | None:
        """Sample a round, unless the pool has it; return the speed of sampling, where it was sampled now.

        None ends training: after a round that was trained on, nothing tells the samples of this one apart.

        Raises:
            NoSignal: nothing tells the samples of the first round apart.
        """
        self.reward_log, self.sampling_seconds = (
            RewardLog(has_table=False),
            0.0,
        )  # without what was logged while measuring
        with self.unchanged_weights():
            try:
                self.rounds.make(number, (number - 1) * self.steps_per_round)  # resumed, the step is a later one
            except NoSignal as error:
                if number == 1:
                    raise
                logger.warning(f"{error} Training ends here, after round {number - 1}.")
                self.no_signal_left = True
                return None
        if not self.sampling_seconds:
            return {}
        tokens = int(self.pool.table(number).length[self.pool.table(number).round == number].sum())
        return {"round/sampling_tokens_per_second": tokens / self.sampling_seconds}

    def begin_round(self, number: int) -> None:
        """Make a round, unless the pool has it; then set what is trained on, and log it (to be overridden)."""
        raise NotImplementedError

    def was_logged(self, number: int) -> bool:
        """Whether a resumed run has logged this round already."""
        return any(entry.get("round/number") == number for entry in self.state.log_history)

    def log_measured(self, logs: dict[str, float]) -> None:
        """Log by itself: means over the steps since training was logged wait for its next log."""
        was_training = self.model.training
        self.model.eval()  # TRL's log asks the model which of the two it is
        self.log(logs)
        self.model.train(was_training)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def measure(self, dataset: Dataset) -> dict[str, float]:
        """Return the metrics of an evaluation dataset, without prefix (to be overridden)."""
        raise NotImplementedError

    def evaluate_samples(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        """Do what Trainer's ``evaluate`` does, with :meth:`measure` in the place of its loop."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics |= self.evaluate_samples(part, f"{metric_key_prefix}_{name}")
            return metrics
        if not isinstance(dataset, Dataset):
            raise ValueError(f"eval_dataset is a {type(dataset).__name__}, expected a datasets.Dataset to evaluate on.")
        start = time.time()
        with self.keeping_freed_memory():
            found = self.measure(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(dataset))
        self.log_measured(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class BeginsRounds(TrainerCallback):
    """Begin a round with each epoch, and log how fast it was trained on at its end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._began = 0.0, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_round(state.global_step // self.trainer.steps_per_round + 1)
        self._began = time.perf_counter(), self.trainer.trained_tokens

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        then, tokens = self._began
        if self.trainer.online and (trained := self.trainer.trained_tokens - tokens):
            speed = trained / (time.perf_counter() - then)
            self.trainer.log_measured({"round/training_tokens_per_second": speed})
