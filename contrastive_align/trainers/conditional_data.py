"""What a ConditionalTrainer reads: prompts that leave room, or scored completions; the pool; batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from contrastive_align.conditions.conditions import Condition
from contrastive_align.conditions.scored_rows import read_scored
from contrastive_align.data.formats import Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.pool.pool import Pool
from contrastive_align.trainers.conditional_inputs import eos_ids, fingerprint
from contrastive_align.trainers.conditioned_prompts import ConditionedPrompts
from contrastive_align.trainers.conditioned_rows import ConditionedRows


logger = logging.get_logger(__name__)


class ConditionalDataMixin:
    """The data of :class:`~contrastive_align.ConditionalTrainer`."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # rows are made from the pool, round by round

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "bare_ids", "completion_ids"]

    def encode(self, prompt: Text) -> list[int]:
        """Token ids of a prompt, with or without condition."""
        ids = tokenise_prompt(prompt, self._tokenizer)
        start = self._tokenizer.bos_token_id
        return ids or [self.eos_token_ids[0] if start is None else start]

    def _prepare_pool(self) -> None:
        """The pool and how many draws a round has; from scored data the pool's one round is written at once."""
        self.eos_token_ids = eos_ids(self.model, self._tokenizer)
        args, folder = self.args, Path(self.args.pool_dir or Path(self.args.output_dir) / "pool")
        self.data_report: dict[str, Any] = {}
        if self.online:
            if args.max_steps <= 0 and args.num_train_epochs != int(args.num_train_epochs):
                raise ValueError(f"num_train_epochs is {args.num_train_epochs}, expected a whole number of rounds.")
            self.prompts = self._usable_prompts(self.train_dataset)
            self.prompts_per_round = args.prompts_per_round or len(self.prompts)
            if self.prompts_per_round > len(self.prompts):
                raise ValueError(
                    f"prompts_per_round is {self.prompts_per_round} and the dataset has {len(self.prompts)} prompts "
                    "that can be used. Lower it, or raise num_generations for more completions a round."
                )
            self.condition.check_generations(args.num_generations, self.prompts_per_round)
            draws = args.draws_per_round or self.prompts_per_round * args.num_generations
        else:
            samples, self.data_report = read_scored(
                self.train_dataset,
                self._tokenizer,
                max_length=args.max_length,
                condition=self.condition,
                on_bad_row=args.on_bad_row,
            )
            for sample in samples:
                self.condition.check(sample)
            folder = folder.with_name(f"{folder.name}-{fingerprint(samples, self.condition)}")
        self.pool = Pool(folder, label=self.condition.label, drop_factor=args.drop_factor, seed=args.seed)
        if not self.online:
            if not self.pool.rounds and self.accelerator.is_main_process:
                self.pool.add(samples)
            self.accelerator.wait_for_everyone()
            self.pool.reload()
            labelled = int((self.pool.table(1).label >= 0).sum())
            self.data_report["left_out"] = len(samples) - labelled
            if labelled < len(samples):
                logger.warning(
                    f"{len(samples) - labelled} of {len(samples)} completions have no score or feedback: left out."
                )
            draws = args.draws_per_round or labelled
        step = args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        self.steps_per_round = math.ceil(draws / step)
        # Scored completions were measured with their words when they were read.
        self.conditioned = ConditionedPrompts(self.condition, self.encode, self._room() if self.online else None)
        self.rows = ConditionedRows(
            self.pool, self.conditioned, self.encode, self.steps_per_round * step, args.max_length
        )

    def _usable_prompts(self, dataset: Dataset) -> Dataset:
        """The prompts that leave room for a completion; the others are counted."""
        long = self.too_long(dataset, "train_dataset", self.condition)
        self.data_report = {"rows": len(dataset), "too_long": len(long)}
        if not long:
            return dataset
        if len(long) == len(dataset):
            raise ValueError("No prompt is short enough: see the warning above. Raise max_length, or lower "
                             "max_completion_length.")  # fmt: skip
        gone = set(long)
        return dataset.select([i for i in range(len(dataset)) if i not in gone])

    def too_long(self, dataset: Dataset, name: str, condition: Condition) -> list[int]:
        """The rows whose prompt leaves no room for a completion, with a warning that they are left out.

        Raises:
            ValueError: no column 'prompt', or a prompt that cannot be conditioned.
        """
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"{name} has the columns {dataset.column_names}, expected 'prompt' to sample from. Rename one: "
                "dataset.rename_column(old, 'prompt')."
            )
        room, long = self._room(), []
        texts = [""] if condition.free_words else list(condition.askable().values())
        for i, prompt in enumerate(dataset["prompt"]):
            if not isinstance(prompt, str | list):
                raise ValueError(f"{name}, row {i}: 'prompt' is {prompt!r}, expected text or messages.")
            try:
                conditioned = [condition.apply(prompt, text) for text in texts]
            except ValueError as error:
                raise ValueError(f"{name}, row {i}: {error}") from error
            if max(len(self.encode(p)) for p in [prompt, *conditioned]) > room:
                long.append(i)
        if long:
            logger.warning(
                f"{len(long)} of {len(dataset)} prompts of {name} are longer than {room} tokens (condition included) "
                f"and are left out; the first rows are {long[:5]}. "
                f"{', '.join(f'{name}={limit}' for name, limit in self._limits().items())}, "
                f"max_completion_length={self.args.max_completion_length}."
            )
        return long

    def _limits(self) -> dict[str, int]:
        """What prompt and completion together may have, in tokens: by name, those that are set."""
        args, config = self.args, self.model.config.get_text_config()
        limits = {
            "max_length": args.max_length,
            "the model's context": getattr(config, "max_position_embeddings", None),
        }
        if args.use_vllm and args.vllm_mode == "colocate":
            limits["vllm_max_model_length"] = args.vllm_max_model_length
        return {name: limit for name, limit in limits.items() if limit}

    def _room(self) -> int:
        """Tokens that a prompt with its condition may have, so that the longest completion fits behind it."""
        return min(self._limits().values(), default=2**31) - self.args.max_completion_length

    def get_train_dataloader(self):
        return self._get_dataloader(
            dataset=self.rows,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=torch.utils.data.SequentialSampler,
            is_training=True,
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimiser step, and how many completion tokens they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["completion_mask"].sum() for batch in batches)
        total = self.accelerator.gather(torch.as_tensor(tokens, device=device)).sum()
        return batches, total
