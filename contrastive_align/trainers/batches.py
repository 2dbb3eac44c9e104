"""Batches in a trainer: by tokens, or of shards as they are read; and how much each group of a batch weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
from contrastive_align.data.shards import ReadBatch, ShardBatches, ShardedGroups, ShardOrder


logger = logging.get_logger(__name__)

READ = "read"  # of a batch: what was read for it
WEIGHTS = "row_weights"  # of a batch: 0 for a group that stands in where no row of a batch holds one
STREAM = "stream"  # of a checkpoint's own state
# What Trainer sets on its loader beside the order: taken over as it is.
LOADER_OPTIONS = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers", "in_order",
)  # fmt: skip


@dataclass
class ShardCollator:
    """Makes a batch of the groups that were read, and keeps what the report counts. It runs in the workers."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    filler: dict[str, Any]

    def __call__(self, examples: list[ReadBatch]) -> dict[str, Any]:
        [read] = examples
        groups = [group for row in read.rows for group in row.groups]
        weights = torch.ones(len(groups)) if groups else torch.zeros(1)
        for row in read.rows:
            row.groups = []
        return {**self.collator(groups or [self.filler]), WEIGHTS: weights, READ: read}


def shard_loader(trainer: Any, dataset: ShardedGroups, *, training: bool) -> Any:
    """Return this process's loader of the groups of shards: shuffled in training, else in the order of the files."""
    args = trainer.args
    dataset.order = ShardOrder(dataset.lengths, seed=_seed(args), shuffle=training)
    # The sampler deals to the ranks itself, so the loader is not cut into shards once more.
    return DataLoaderShard(
        dataset,
        device=trainer.accelerator.device,
        batch_sampler=_batches(trainer, dataset, training=training),
        _non_blocking=trainer.accelerator.non_blocking,
        collate_fn=ShardCollator(trainer.data_collator, dataset.first),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )


def _seed(args: Any) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _batches(trainer: Any, dataset: ShardedGroups, *, training: bool) -> ShardBatches:
    args, parallel = trainer.args, trainer.get_tp_size()
    ranks = trainer.accelerator.num_processes // parallel
    size = trainer.micro_batch_size if training else args.eval_batch_size
    return ShardBatches(
        len(dataset),
        size=max(1, size // ranks) if args.accelerator_config.split_batches else size,
        ranks=ranks,
        rank=trainer.accelerator.process_index // parallel,
        drop_last=args.dataloader_drop_last and training,
    )


def stream_state(trainer: Any, dataset: ShardedGroups) -> dict[str, Any]:
    """Return what a checkpoint says of the place in a stream: the rows before it, and what their order depends on."""
    args, batches = trainer.args, _batches(trainer, dataset, training=True)
    per_step = batches.size * batches.ranks * args.gradient_accumulation_steps
    epoch, step = divmod(trainer.state.global_step, -(-len(batches) // args.gradient_accumulation_steps))
    return {
        "rows_before": epoch * len(dataset) + step * per_step,
        "rows_per_step": per_step,
        "seed": _seed(args),
        "files": [[path.name, int(rows)] for path, rows in zip(dataset.files, dataset.lengths, strict=True)],
    }


def check_stream_of_checkpoint(checkpoint: Path, then: dict[str, Any], trainer: Any, dataset: ShardedGroups) -> None:
    """Refuse to go on in a stream whose rows would come in another order, or in steps of another size.

    Raises:
        ValueError: naming what differs.
    """
    now = stream_state(trainer, dataset)
    if then["files"] != now["files"]:
        other = [name for name, rows in then["files"] if [name, rows] not in now["files"]]
        other += [name for name, rows in now["files"] if [name, rows] not in then["files"]]
        what = f"'{other[0]}' is not there in both, or has another number of rows" if other else "in another order"
        raise ValueError(
            f"{checkpoint} was trained on other shards than these: {what}. Resume with the same files, or start anew "
            f"from its weights: model='{checkpoint}'."
        )
    if then["seed"] != now["seed"]:
        raise ValueError(
            f"{checkpoint} was trained with data_seed={then['seed']} (by default the seed), and this run has "
            f"{now['seed']}: the rows of the stream would come in another order. Set data_seed={then['seed']}."
        )
    if (wanted := then["rows_per_step"]) != (found := now["rows_per_step"]):
        accumulation = trainer.args.gradient_accumulation_steps
        at_once = found // accumulation
        fix = f"gradient_accumulation_steps={wanted // at_once}"
        if wanted % at_once:
            fix = "per_device_train_batch_size and gradient_accumulation_steps so that their product is the same"
        raise ValueError(
            f"{checkpoint} was trained with {wanted} rows of the stream in a step over all processes, and this run has "
            f"{found} ({at_once} at once, gradient_accumulation_steps={accumulation}). Set {fix}."
        )


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
        seed=_seed(args),
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
