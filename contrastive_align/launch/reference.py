"""``contrastive-align reference``: write the reference's log-probs of a folder of shards, before training."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from contrastive_align.data.files import files_of
from contrastive_align.data.shards import ShardedGroups
from contrastive_align.launch.arguments import Arguments, RunArguments, option
from contrastive_align.launch.common import Run, model_arguments, print_on_main
from contrastive_align.launch.datasets import load_splits
from contrastive_align.launch.usage import UsageError
from contrastive_align.trainers import ContrastiveTrainer
from contrastive_align.trainers.reference import ReferenceJob, base_of, folder_of, identity_of


@dataclass
class ReferenceArguments(RunArguments):
    """Name the folder that the log-probs are written to."""

    output: str | None = option(
        None, "Folder that the log-probs are written to; by default .reference in the folder of the shards."
    )


class _Scorer(ContrastiveTrainer):
    """A trainer that never trains: what it has to read is what it is asked to write."""

    def add_reference_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset


class ReferenceRun(Run):
    """The run of ``contrastive-align reference``."""

    command = "reference"
    arguments_class = ReferenceArguments

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Stream the data set, and set what a run without training needs."""
        if not args.dataset or args.datasets.datasets:
            raise UsageError("no shards are named. Give a folder: --dataset_name=FOLDER.")
        if args.model.model_name_or_path is None:
            raise UsageError(
                "no reference is named. Give the model that training starts from: --model_name_or_path=..."
            )
        if args.script.max_train_samples is not None or args.script.max_eval_samples is not None:
            raise UsageError("--max_train_samples and --max_eval_samples belong to training. Leave them out.")
        forced = {"dataset_streaming": True, "precompute_ref_log_probs": True, "eval_strategy": "no", "do_eval": False}
        if refused := sorted({*forced, "max_tokens_per_batch", "ref_log_probs_folder", "online"} & args.given):
            raise UsageError(f"--{refused[0]} belongs to training. Leave it out.")
        forced |= {"loss_type": ["dpo"], "gradient_checkpointing": False}  # a loss that reads no labels
        return super().defaults(args) | forced

    def execute(self) -> dict[str, Any]:
        """Write the log-probs that are missing; return the counts of shards, and the folder.

        Raises:
            UsageError: what the user can correct.
        """
        args, started = self.args, time.perf_counter()
        train, test = load_splits(args, on_bad_row=args.training.on_bad_row)
        if (files := files_of(train)) is None:
            raise UsageError(f"'{args.dataset}' is no file or folder of shards, expected one. Save it as files.")
        # A trainer makes its folder.
        args.training.output_dir = str(base_of(args.script.output, files))
        trainer = _Scorer(train_dataset=train, eval_dataset=test, **model_arguments(args))
        if trainer.uses_engine:
            raise UsageError(
                "the reference is scored by each process by itself, and DeepSpeed or FSDP would shard it. Launch with "
                "--accelerate_config=multi_gpu, or as several jobs."
            )
        identity, counts = identity_of(trainer), Counter()
        splits = [rows for rows in (trainer.train_dataset, trainer.eval_dataset) if isinstance(rows, ShardedGroups)]
        for dataset in splits:
            folder = folder_of(args.script.output, dataset.files, identity)
            batch_size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
            counts.update(ReferenceJob(trainer, folder, identity).run(dataset, batch_size))
        every = gather_object([counts])
        counts = {name: sum(found[name] for found in every) for name in counts}
        seconds = time.perf_counter() - started
        print_on_main(
            f"{counts['written']} shards written ({counts['groups']} groups in {seconds:.0f} s), {counts['there']} "
            f"were there, {counts['elsewhere']} are being written by others. They are in {folder}."
        )
        trainer.end()
        return {**counts, "folder": str(folder)}
