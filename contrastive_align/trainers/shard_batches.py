"""Batches of groups that are read from shards as they are trained on, and the place from which a resumed run reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard

from contrastive_align.data.shards import ReadBatch, ShardBatches, ShardedGroups, ShardOrder


READ = "read"  # of a batch: what was read for it
WEIGHTS = "row_weights"  # of a batch: 0 for a group that stands in where no row of a batch holds one
STREAM = "stream"  # of a checkpoint's own state


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
