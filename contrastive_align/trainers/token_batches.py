"""Batches by tokens in a trainer, and how much each group of a batch weighs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from contrastive_align.data.batching import TokenBatchSampler, group_sizes
from contrastive_align.data.reading import FIRST_ROWS
from contrastive_align.trainers.shard_batches import WEIGHTS


logger = logging.get_logger(__name__)

# What Trainer sets on its loader beside the order: taken over as it is.
LOADER_OPTIONS = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers", "in_order",
)  # fmt: skip


def loader_by_tokens(trainer: Any, loader: DataLoader) -> tuple[Any, TokenBatchSampler]:
    """Trainer's loader with its batches made by tokens (``max_tokens_per_batch``), and their sampler."""
    args, ranks = trainer.args, trainer.get_tp_size()
    lengths, rows = group_sizes(
        trainer.train_dataset, padded=trainer.layout == "padded", pad_to_multiple_of=args.pad_to_multiple_of
    )
    sampler = TokenBatchSampler(
        lengths,
        rows,
        max_tokens=args.max_tokens_per_batch,
        max_groups=trainer.micro_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        accumulation=args.gradient_accumulation_steps,
        ranks=trainer.accelerator.num_processes // ranks,
        rank=trainer.accelerator.process_index // ranks,
    )
    if groups := sampler.above_budget:
        longest = max(sampler.tokens([i]) for i in groups)
        logger.warning(
            f"{len(groups)} of {len(sampler.lengths)} groups alone have more than max_tokens_per_batch="
            f"{sampler.max_tokens} tokens (up to {longest}), and are a batch each. The first, counted from 0 over "
            f"the rows kept: {groups[:FIRST_ROWS]}."
        )
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    # The sampler deals to the ranks itself, so the loader is not cut into shards once more.
    by_tokens = DataLoaderShard(
        loader.dataset,
        device=loader.device,
        batch_sampler=sampler,
        _non_blocking=trainer.accelerator.non_blocking,
        **options,
    )
    return by_tokens, sampler


class GroupWeights:
    """1 for each group of a batch, 0 for a group that Accelerate repeats to give every process a full last batch.

    Attributes:
        by_tokens: the sampler of batches by tokens, where these are used.
    """

    by_tokens: TokenBatchSampler | None = None
    _evaluated: Any = None
    _batches_left = 0

    def begin_evaluation(self, dataset: Any, batches: int) -> None:
        """Take note of what is evaluated on, and of how many batches it has."""
        self._evaluated, self._batches_left = dataset, batches

    def of_evaluation(self, trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
        """(B,) the weights of the next evaluation batch."""
        self._batches_left -= 1
        return self.of(trainer, batch, self._evaluated, last=self._batches_left == 0)

    def of(self, trainer: Any, batch: dict[str, Tensor], dataset: Any, *, last: bool, training: bool = False) -> Tensor:
        """(B,) the weights of a batch.

        Args:
            dataset: where the batch came from.
            last: whether it is the last batch of a pass.
        """
        if WEIGHTS in batch:
            return batch[WEIGHTS].cpu()
        size = batch["scores"].size(0)
        if training and self.by_tokens is not None:
            return torch.full((size,), 0.0 if last and self.by_tokens.last_is_repeated else 1.0)
        processes = trainer.accelerator.num_processes // trainer.get_tp_size()
        if processes == 1 or trainer.args.dataloader_drop_last:
            return torch.ones(size)
        place = trainer.accelerator.process_index // trainer.get_tp_size() * size + torch.arange(size)
        if has_length(dataset):
            real = len(dataset) % (size * processes) or size * processes  # in the last batch, over all processes
            return (place < real).float() if last else torch.ones(size)
        if getattr(dataset, "n_shards", 1) >= processes or "row" not in batch:
            return torch.ones(size)  # every process reads shards of its own, and nothing is repeated
        if trainer.args.dataloader_num_workers > 1:
            logger.warning_once(
                "A stream read by several workers for several processes: rows that Accelerate repeats to fill the last "
                "batch of a pass count again, since their order is lost. Set dataloader_num_workers to 0 or 1."
            )
            return torch.ones(size)
        # A stream has no length to tell by. Its rows come numbered in their order, and a repeated one steps back.
        rows = trainer.accelerator.gather(batch["row"].to(trainer.accelerator.device)).cpu()
        before = torch.cat([rows.new_full((1,), -1), rows.cummax(0).values[:-1]])
        return (rows > before).float()[place]
