"""Training on batches by tokens: the loader, and what a step then holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from contrastive_align.data.batching import TokenBatchSampler, group_sizes
from contrastive_align.data.tokenise import FIRST_ROWS


logger = logging.get_logger(__name__)

# What Trainer sets on its loader beside the order: taken over as it is.
LOADER_OPTIONS = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class TokenBatchesMixin:
    """``max_tokens_per_batch`` for a trainer of groups. Without it everything is Trainer's own."""

    layout: str
    _token_batches: TokenBatchSampler | None = None

    def _refuse_streams_by_tokens(self, args: Any, dataset: Any) -> None:
        if args.max_tokens_per_batch is not None and isinstance(dataset, IterableDataset):
            raise ValueError(
                "max_tokens_per_batch needs to know the length of every group beforehand, and train_dataset is a "
                "stream. Load it whole, or leave max_tokens_per_batch out."
            )

    def get_train_dataloader(self) -> DataLoader:
        trainers_own = super().get_train_dataloader()
        if self.args.max_tokens_per_batch is None:
            return trainers_own
        padded = self.layout == "padded"
        lengths, rows = group_sizes(self.train_dataset, padded=padded, pad_to_multiple_of=self.args.pad_to_multiple_of)
        self._token_batches = TokenBatchSampler(
            lengths,
            rows,
            max_tokens=self.args.max_tokens_per_batch,
            max_groups=self._train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            accumulation=self.args.gradient_accumulation_steps,
            ranks=self.accelerator.num_processes // self.get_tp_size(),
            rank=self.accelerator.process_index // self.get_tp_size(),
        )
        self._report_groups_above_budget(self._token_batches)
        # The sampler deals to the ranks itself, so the loader is not cut into shards once more.
        return DataLoaderShard(
            trainers_own.dataset,
            device=trainers_own.device,
            batch_sampler=self._token_batches,
            _non_blocking=self.accelerator.non_blocking,
            **{name: getattr(trainers_own, name) for name in LOADER_OPTIONS},
        )

    def _report_groups_above_budget(self, sampler: TokenBatchSampler) -> None:
        groups = sampler.above_budget
        if groups:
            longest = max(sampler.tokens([i]) for i in groups)
            logger.warning(
                f"{len(groups)} of {len(sampler.lengths)} groups alone have more than max_tokens_per_batch="
                f"{sampler.max_tokens} tokens (up to {longest}), and are a batch each. The first, counted from 0 over "
                f"the rows kept: {groups[:FIRST_ROWS]}."
            )

    def get_total_train_batch_size(self, args: Any) -> int:
        """Groups of an optimiser step; by tokens their mean, from which Trainer derives samples per second."""
        if self._token_batches is None:
            return super().get_total_train_batch_size(args)
        steps = math.ceil(len(self._token_batches) / args.gradient_accumulation_steps)
        return max(1, round(len(self._token_batches.lengths) / steps))

    def _train_group_weights(self, batch: dict[str, Tensor], last: bool) -> Tensor:
        """1 for each group of a training batch, 0 where it is repeated to give every process a last batch."""
        if self._token_batches is None:
            return self._group_weights(batch, self.train_dataset, last)
        repeated = last and self._token_batches.last_is_repeated
        return torch.full((batch["scores"].size(0),), 0.0 if repeated else 1.0)
