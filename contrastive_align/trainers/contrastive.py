"""ContrastiveTrainer: trl.DPOTrainer for K scored completions. Wiring only; the mathematics is in losses/."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import BitsAndBytesConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging
from trl import DPOTrainer

from contrastive_align.data import DataReport, GroupCollator, prepare_groups
from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.columns import read_options
from contrastive_align.data.files import files_of
from contrastive_align.data.labels import ANY_TEMPERATURE, auto_temperature, warn_of_labels
from contrastive_align.data.rows import BadRow
from contrastive_align.data.shards import ShardedGroups
from contrastive_align.data.tokenise import render_messages
from contrastive_align.losses.contrastive import LOSSES, add_first_score_bonus, group_loss, reads_labels
from contrastive_align.models.loading import embedding_rows
from contrastive_align.models.logps import CompletionLogps, beside, completion_logps, per_completion
from contrastive_align.pool import Pool
from contrastive_align.rounds import measures
from contrastive_align.rounds.groups import GroupRows, GroupSignal, group_metrics
from contrastive_align.rounds.reward_log import RewardLog
from contrastive_align.rounds.samplers import check_vllm_options
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.sampling.decode import seed_of
from contrastive_align.trainers.base import AlignmentTrainer, AnyDataset, EvalDataset
from contrastive_align.trainers.batches import (
    READ,
    STREAM,
    GroupWeights,
    check_stream_of_checkpoint,
    loader_by_tokens,
    shard_loader,
    stream_state,
)
from contrastive_align.trainers.configs import AUTO, ContrastiveConfig
from contrastive_align.trainers.metrics import Averages, Mean, batch_metrics
from contrastive_align.trainers.reference import attach_logps, cached_reference_logps, reference_cache_file
from contrastive_align.trainers.sampled_rounds import BeginsRounds, SamplesRounds
from contrastive_align.trl_seam import (
    CachesReference,
    KeepsDigits,
    Method,
    PreparesDatasets,
    disable_gradient_checkpointing,
    global_then_local_main_first,
    reference_adapter,
)


logger = logging.get_logger(__name__)

STATE_FILE = "contrastive_state.json"
SCORED = "scored"  # the name of the groups of files beside own samples
KL_SAMPLES = 512  # of a round, by which its KL to the start is measured


class ContrastiveTrainer(SamplesRounds, KeepsDigits, CachesReference, PreparesDatasets, AlignmentTrainer, DPOTrainer):
    """Align a language model on groups of K scored completions: NCA, InfoNCA, DPO and kin.

    A subclass of :class:`trl.DPOTrainer` that takes its arguments and keeps what it does: model loading, PEFT,
    quantisation, reference handling, the fused LM head, precomputed references, DeepSpeed and FSDP. It adds K
    completions per prompt, ragged within a batch, and the losses of ``contrastive_align.losses``. The loss is the
    mean over the groups of an optimiser step, however these are spread over micro-batches and processes.

    ```python
    from datasets import Dataset
    from contrastive_align import ContrastiveConfig, ContrastiveTrainer

    dataset = Dataset.from_list([
        {"prompt": "The sky is", "completions": [" blue.", " green.", " up."], "scores": [1.0, 0.0, 0.4]},
    ])
    trainer = ContrastiveTrainer(
        model="Qwen/Qwen3-0.6B", args=ContrastiveConfig(output_dir="out", loss_type="nca"), train_dataset=dataset
    )
    trainer.train()
    ```

    Online, with ``reward_funcs`` or a ``judge``, the dataset is prompts and the groups are the policy's own: an epoch
    is a round, which samples ``num_generations`` completions of some prompts, scores them, adds them to the pool and
    trains on the groups whose scores differ.

    ```python
    args = ContrastiveConfig(output_dir="out", online=True, num_rounds=4, num_generations=8)
    trainer = ContrastiveTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=prompts, reward_funcs=my_reward)
    ```

    Args:
        model: as in TRL; a folder or hub id may also be a LoRA adapter (see ``models.loading.resolve_start``).
        ref_model: as in TRL; by default the start of the run, and then the first step checks that policy and reference
            agree.
        args: a :class:`ContrastiveConfig`.
        data_collator: by default :class:`~contrastive_align.data.GroupCollator`; another one must return its keys.
        train_dataset, eval_dataset: groups in any shape of ``data/shapes.py``, preference pairs included.
        processing_class: a tokenizer.
        callbacks, optimizers, quantization_config, peft_config: as in TRL.
        reward_funcs: online: TRL reward functions, reward-model ids or feature specs (see ``targets/features.py``);
            several are summed by ``args.reward_weights``.
        judge: a :class:`~contrastive_align.judge.judge.Judge` with scores, in place of reward functions.
        sampler: online: a :class:`~contrastive_align.sampling.server.ServerSampler`, for LoRA; for vLLM there is
            ``args.use_vllm``.
        scored_dataset: online: scored groups that are trained on beside the own ones (``args.scored_share``).

    Raises:
        BadRow: a row cannot be trained on (``on_bad_row="raise"``), with row and column.
        ValueError: an option or data this trainer does not support, with the way out.
        ReferenceMismatch: policy and reference differ before the first step, or the reference of a resumed run moved.
    """

    config, suffix = ContrastiveConfig, "NCA"
    loads_model = False
    changed_weights = "pass the changed model's own copy as ref_model"
    columns = ("prompt_ids", "completion_ids", "scores", "ref_logps", "row")
    exact = ("scores", "ref_logps", "group_weights", "step_groups")
    method = Method(
        name="NCA",
        tags=("trl", "contrastive-align", "nca"),
        paper="Noise Contrastive Alignment of Language Models with Explicit Rewards",
        arxiv="2402.05369",
        key="chen2024noise",
        authors="Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu",
        year=2024,
        venue="Advances in Neural Information Processing Systems 37",
    )

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: ContrastiveConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
        *,
        reward_funcs: Any = None,
        judge: Any = None,
        sampler: Any = None,
        scored_dataset: Dataset | None = None,
    ):
        args = self.own_args(args, model)
        self.refuse_arguments(model, processing_class, peft_config, train_dataset, compute_metrics=compute_metrics)
        self._take_feedback(reward_funcs, judge, args, train_dataset, sampler, scored_dataset, quantization_config)
        if args.max_tokens_per_batch is not None and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "max_tokens_per_batch needs to know the length of every group beforehand, and train_dataset is a "
                "stream. Load it whole, or leave max_tokens_per_batch out."
            )
        self.reads_labels = any(map(reads_labels, args.loss_type))
        if self.reads_labels and args.temperature_alpha == AUTO and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "temperature_alpha='auto' is found from the scores of all training groups, and train_dataset is a "
                "stream. Give a number (labels are softmax(scores / temperature_alpha); 1e-4 makes them one-hot, "
                "which pairs are at any number), or load the dataset whole."
            )
        if args.ref_log_probs_folder is not None and not args.precompute_ref_log_probs:
            raise ValueError(
                "ref_log_probs_folder is given without precompute_ref_log_probs, which reads it. Set "
                "precompute_ref_log_probs=True, or leave the folder out."
            )
        if args.ref_log_probs_folder is not None and files_of(train_dataset) is None:
            raise ValueError(
                "ref_log_probs_folder holds the log-probs of shards that are streamed, and train_dataset is no stream "
                "of files: its log-probs are computed once and cached. Leave the folder out, or stream the files "
                "(dataset_streaming=True)."
            )
        # Accelerate would have the main process read every stream and cut its batches by rows, and groups with them.
        args.accelerator_config.dispatch_batches = False
        start = self.load_start(model, args, processing_class, quantization_config, peft_config)
        model, processing_class = start["model"], start["processing_class"]
        if data_collator is None:
            score_dtype = torch.float32 if args.device.type == "mps" else torch.float64  # which mps does not have
            data_collator = GroupCollator(processing_class.pad_token_id, args.pad_to_multiple_of, score_dtype)
        self.vocabulary = embedding_rows(model)
        self.data_reports: dict[str, DataReport] = {}
        self.last_evaluation: dict[str, Mean] = {}  # with standard errors
        # Called with each batch that this process evaluates, its log-ratios (B, K) and the weights (B,) of its groups.
        self.on_evaluated: Callable[[dict[str, Tensor], Tensor, Tensor], None] | None = None
        self.reference_is_given = ref_model is not None
        self._means = {"train": Averages(), "eval": Averages()}
        self._group_weights = GroupWeights()
        self._precomputed_at_once = 0  # groups of a batch of reference log-probs that this process has computed

        super().__init__(
            **start,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._choose_layout_once()
        self._auto_temperature = ANY_TEMPERATURE
        if self.online:
            self._prepare_rounds(sampler, scored_dataset)
        elif self.reads_labels and args.temperature_alpha == AUTO:
            found = auto_temperature(self.train_dataset, first_score_bonus=args.first_score_bonus)
            self._auto_temperature = broadcast_object_list([found])[0]
            logger.info(f"temperature_alpha='auto' is {self.temperature_alpha:.4g} for these groups.")
        elif self.reads_labels and isinstance(self.train_dataset, Dataset):
            warn_of_labels(self.train_dataset, args.temperature_alpha)
        context = self.context_limits().get("the model's context")
        if context and (args.max_length is None or args.max_length > context):
            logger.warning(
                f"max_length={args.max_length} is above the model's context of {context} tokens: longer sequences "
                f"leave the range it was trained for. Set max_length={context}."
            )

    def _take_feedback(
        self,
        reward_funcs: Any,
        judge: Any,
        args: ContrastiveConfig,
        train_dataset: Any,
        sampler: Any,
        scored_dataset: Any,
        quantization_config: Any,
    ) -> None:
        """Decide whether groups are sampled, and refuse what then, or otherwise, has no meaning."""
        self.online = args.online or reward_funcs is not None or judge is not None
        if not self.online:
            given = [name for name, value in args.of_own_samples().items() if getattr(args, name) != value]
            told = {"sampler": sampler, "scored_dataset": scored_dataset}
            for name in [*given, *(name for name, value in told.items() if value is not None)]:
                raise ValueError(f"{name} is of own samples, and none are drawn. Leave it out, or set online=True.")
            return
        args.go_online()
        self.take_feedback(reward_funcs, judge, args)
        if self.feedback is None:
            raise ValueError(
                "online=True, and nothing says how good a completion is: what is the reward? Give reward_funcs (as for "
                "TRL's GRPOTrainer) or a judge; or, to train on the scores of the dataset, leave online out."
            )
        self.check_prompts_are_whole(train_dataset)
        if args.use_vllm:
            check_vllm_options(args, online=True, sampler=sampler, quantised=quantization_config is not None)

    @property
    def temperature_alpha(self) -> float:
        """The number in use, in training and evaluation.

        Under ``temperature_alpha="auto"`` it is that of the training groups (online, of the present round), or of the
        checkpoint of a resumed run; 1.0 where nothing depends on it: no loss reads labels, or all groups are
        preferences or have equal scores.
        """
        given = self.args.temperature_alpha
        return self._auto_temperature if given == AUTO else given

    @property
    def reference(self) -> Any:
        """The frozen reference; None where it is the policy without its adapter, or its log-probs are cached."""
        return self.ref_model

    @property
    def reference_or_policy(self) -> Any:
        """The model whose log-probs are the reference's, with its adapter off if it is the policy."""
        return self.model if self.ref_model is None else self.ref_model

    def _choose_layout_once(self) -> None:
        # Reference log-probs may be computed within TRL's __init__, under the layout of training.
        if self.layout:
            return
        obstacle = None
        if self.aux_loss_enabled:
            obstacle = "the router loss is defined on padded rows"
        elif not isinstance(self.data_collator, GroupCollator):
            obstacle = "the data_collator is not a GroupCollator, and may give completions of a group different prompts"
        self.choose_layout(obstacle)

    # ------------------------------------------------------------------------------------------------------- data

    def prepare_rows(
        self, dataset: AnyDataset, tokenizer: Any, args: ContrastiveConfig, name: str
    ) -> AnyDataset | ShardedGroups:
        """Tokenise groups; what was dropped or cut is reported once. Prompts of own samples stay as they are."""
        if self.online and name != SCORED:
            return dataset
        with global_then_local_main_first():
            groups, report = prepare_groups(
                dataset,
                tokenizer,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                on_bad_row=args.on_bad_row,
                num_proc=args.dataset_num_proc,
                name=name,
                options=read_options(args.columns, args.score_column, args.hard_pairs),
                vocabulary=self.vocabulary,
            )
        self.data_reports[name] = report
        for line in report.lost():
            logger.warning(f"{name}: {line}")
        return groups

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's loader, one of batches by tokens (``max_tokens_per_batch``), or one that reads shards."""
        if isinstance(self.train_dataset, ShardedGroups):
            return shard_loader(self, self.train_dataset, training=True)
        if self.online:
            return self.training_loader(self.rows, SequentialSampler)
        loader = super().get_train_dataloader()
        if self.args.max_tokens_per_batch is not None:
            loader, self._group_weights.by_tokens = loader_by_tokens(self, loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's loader, or one that reads shards."""
        found = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.eval_dataset[found] if isinstance(found, str) else found
        if isinstance(found, ShardedGroups):
            return shard_loader(self, found, training=False)
        return super().get_eval_dataloader(eval_dataset)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the groups of an optimiser step; by tokens, their mean. Trainer derives its rates from it."""
        by_tokens = self._group_weights.by_tokens
        return super().get_total_train_batch_size(args) if by_tokens is None else by_tokens.groups_per_step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimiser step.

        Each carries ``group_weights`` (B,), 0 for a group that is repeated to fill a batch, and ``step_groups``, by
        which the sum of its losses is divided: the groups of the step over its micro-batches on all processes. Trainer
        takes the mean over these, so that the step has the mean over its groups.
        """
        if self.no_signal_left:  # an epoch without a batch is Trainer's last
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for i, batch in enumerate(batches):
            if (read := batch.pop(READ, None)) is not None:
                self.train_dataset.take_note(read)
            last = i == len(batches) - 1 and self.accelerator.gradient_state.end_of_dataloader
            rows = self.rows if self.online else self.train_dataset
            batch["group_weights"] = self._group_weights.of(self, batch, rows, last=last, training=True)
        groups = sum(batch["group_weights"].sum() for batch in batches)
        total = self.accelerator.gather(torch.as_tensor(groups, device=device, dtype=torch.float32)).sum()
        total = total.clamp(min=1)  # all rows of a step of a stream may have been dropped
        for batch in batches:  # tensor-parallel processes have the same groups, in the sum as in the product
            batch["step_groups"] = total / (len(batches) * self.accelerator.num_processes)
        return batches, total / self.get_tp_size()

    # ------------------------------------------------------------------------------------------------- own samples

    def _prepare_rounds(self, sampler: Any, scored_dataset: Dataset | None) -> None:
        """Open the pool, and decide how many groups are trained on in a round."""
        args = self.args
        self.take_sampler(sampler)
        self.take_prompts(self.train_dataset)
        if args.num_generations < 2:
            raise ValueError(f"num_generations is {args.num_generations}, expected 2 or more: a group is compared.")
        if scored_dataset is None and args.scored_share != ContrastiveConfig.scored_share:
            raise ValueError(
                f"scored_share is {args.scored_share:g}, and there are no scored groups to have a share. Give "
                "scored_dataset, or leave scored_share out."
            )
        scored = (
            None if scored_dataset is None else self.prepare_rows(scored_dataset, self.processing_class, args, SCORED)
        )
        signal = GroupSignal(needed=scored is None)
        self.pool = Pool(self.pool_folder, label=signal.label, drop_factor=0.0 if args.keep else 1.0, seed=args.seed)
        length = self.fill_steps(args.draws_per_round or self.prompts_per_round)
        self.rows = GroupRows(self.pool, self.encode, length, args.seed, scored, args.scored_share)
        self.open_rounds(signal, self.pool, resample=args.resample)
        self.add_callback(BeginsRounds(self))

    def begin_round(self, number: int) -> None:
        """Make a round, unless the pool has it; then choose the groups that it is trained on, and log it."""
        if (speed := self.make_round(number)) is None:
            return
        rows, args = self.rows, self.args
        rows.draw(number, args.keep)
        if args.reference == "round":
            self._move_reference()
        if self.reads_labels:
            scores = Dataset.from_dict({"scores": [rows.group(*drawn)["scores"] for drawn in rows.distinct()]})
            if args.temperature_alpha == AUTO:
                self._auto_temperature = auto_temperature(scores, first_score_bonus=0.0)
            elif number == 1:
                warn_of_labels(scores, args.temperature_alpha)
        if not self.was_logged(number):
            self.log_measured({**self._round_metrics(number), **speed, **self.reward_log.take_metrics()})

    def _move_reference(self) -> None:
        """Let the policy as it is score the groups of the round; the pool keeps the log-probs."""
        if self.rows.read_reference():
            return
        groups = [self.rows.group(*drawn) for drawn in self.rows.distinct()]
        with self.sampling_from() as model:
            logps = measures.group_logps(self, model, groups)
        if self.accelerator.is_main_process:
            self.rows.write_reference(logps)
        self.accelerator.wait_for_everyone()
        self.rows.read_reference()

    def _round_metrics(self, number: int) -> dict[str, float]:
        table = self.pool.table(number)
        found = group_metrics(number, table, self.args.num_generations)
        newest = np.flatnonzero(table.round == number)
        samples = self.pool.read(newest[:: max(1, len(newest) // KL_SAMPLES)], number)
        prompts, ids = [self.encode(s.prompt) for s in samples], [s.completion_ids for s in samples]
        if Adjustment(self.args.temperature, self.args.top_k, self.args.top_p).changes:  # the round is not the policy's
            seeds = [seed_of(self.args.seed, "kl_start", number, i) for i in range(len(prompts))]
            ids = [group[0] for group in self.draw_from_policy(prompts, 1, seeds, temperature=1.0, top_k=0, top_p=1.0)]
        nll = []
        for reference in (True, False):
            with self.sampling_from(reference=reference) as model:
                nll.append(measures.negative_log_likelihoods(self, model, prompts, ids)[0])
        found |= measures.mean_and_error("round/kl_start", nll[0] - nll[1])
        if self.reads_labels:
            found["round/temperature_alpha"] = self.temperature_alpha
        return found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on groups as Trainer does; online on prompts: ``<prefix>_reward`` and ``.../se`` over prompts."""
        if not self.online:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return self.evaluate_samples(eval_dataset, metric_key_prefix)

    def measure(self, dataset: Dataset) -> dict[str, float]:
        """Return the mean reward of samples of the prompts, and its standard error."""
        self.reward_log = RewardLog(has_table=False)
        return measures.mean_and_error("reward", self.rewards_of(dataset)) | self.reward_log.take_metrics()

    def rewards_of(self, dataset: Dataset) -> np.ndarray:
        """Return the mean reward of ``num_generations`` samples of each prompt, NaN where none is scored.

        A prompt's seeds are the same in every evaluation (not with ``use_vllm``).
        """
        with self.unchanged_weights():
            long = self.too_long(dataset, "eval_dataset")
            return measures.sampled_rewards(self, dataset, long, {"reward": None})["reward"]

    # -------------------------------------------------------------------------------------------------- reference

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the reference's log-probs (B, K) of a batch; with PEFT, those of the model without its adapter."""
        adapter = contextlib.nullcontext()
        if self.ref_model is None:
            adapter = reference_adapter(self.accelerator.unwrap_model(self.model))
        with adapter:
            return self._frozen_logps(model, inputs).logps

    def _frozen_logps(self, model: nn.Module, inputs: dict[str, Tensor]) -> CompletionLogps:
        was_training, args = model.training, self.args
        if not args.disable_dropout:  # the reference is one function, also where it is the policy without adapter
            model.eval()
        checkpoints = contextlib.nullcontext()
        if args.gradient_checkpointing:
            checkpoints = disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs)
        try:
            with torch.no_grad(), checkpoints, self.accelerator.autocast():
                return completion_logps(model, inputs, layout=self.layout, token_stats=False)
        finally:
            model.train(was_training)

    def _prove_reference_on(self, policy: CompletionLogps, inputs: dict[str, Tensor]) -> None:
        """Compare policy and reference in one batch; where log-probs were computed before, in the first of theirs."""
        logps, lengths = policy.logps.detach()[inputs["valid"]], policy.lengths[inputs["valid"]]
        if self._precomputed_at_once:
            inputs = self.to_device(
                self.data_collator(list(self.train_dataset.select(range(self._precomputed_at_once))))
            )
            logps, lengths = self.policy_logps_of(inputs)
            inputs = beside(logps, inputs)
        same_batch = bool(self._precomputed_at_once) or not self.args.precompute_ref_log_probs
        self.prove_reference(logps, inputs["ref_logps"][inputs["valid"]], lengths, inputs, same_batch=same_batch)

    def policy_logps_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs (N,) as the reference's are computed, and their tokens."""
        found = self._frozen_logps(self.model, batch)
        valid = beside(found.logps, batch)["valid"]
        return found.logps[valid], found.lengths[valid]

    def batch_of(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a group as a batch on the accelerator."""
        return self.to_device(self.data_collator([group]))

    def add_reference_logps(
        self, dataset: AnyDataset | ShardedGroups, name: str, batch_size: int
    ) -> Dataset | ShardedGroups:
        """Add the column ``ref_logps``, cached on disk under a key of everything it depends on.

        Those of shards are written beforehand (``contrastive-align reference``).
        """
        if isinstance(dataset, ShardedGroups):
            return attach_logps(dataset, self, name)
        self._choose_layout_once()
        model, file = self.reference_or_policy, None
        if isinstance(dataset, Dataset) and not self.is_sharded:  # sharded weights would give any two models one key
            file = reference_cache_file(
                dataset,
                model,
                weights=self.reference_hash,
                precision=self.accelerator.mixed_precision,
                start=self.start_description,
            )
        return cached_reference_logps(dataset, file, lambda: self._reference_logps_of_all(dataset, name, batch_size))

    def _reference_logps_of_all(self, dataset: Dataset, name: str, batch_size: int) -> list[list[float]]:
        model = self.reference_or_policy
        if self.reference is None and self.is_deepspeed_enabled:
            model = self.engine_for_precompute()
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator))
        rows: list[list[float]] = []
        with self.keeping_freed_memory():
            for batch in self.progress(loader, f"Reference log-probs of the {name} dataset"):
                logps = self.compute_ref_log_probs(model, batch)
                if name == "train":
                    self._precomputed_at_once = min(batch_size, len(dataset))
                rows += self.accelerator.gather_for_metrics(
                    [row[ok].tolist() for row, ok in zip(logps, batch["valid"], strict=True)], use_gather_object=True
                )
        return rows

    def reference_group(self) -> dict[str, Any] | None:
        """Return a training group; None where the reference is the policy at the beginning of a round."""
        if self.online:
            return self.rows.group(*self.rows.drawn[0]) if self.rows.drawn and self.args.reference == "start" else None
        return {name: self._first_row[name] for name in ("prompt_ids", "completion_ids", "scores")}

    @functools.cached_property
    def _first_row(self) -> dict[str, Any]:  # a stream is opened for it once
        return dict(next(iter(self.train_dataset)))

    def reference_logps_of(self, group: dict[str, Any]) -> list[float] | None:
        """Return the reference's log-probs of a group; those of the cache where the reference is not in memory."""
        if self.reference is None and not is_peft_model(self.accelerator.unwrap_model(self.model)):
            first = self._first_row
            return first.get("ref_logps") if first["completion_ids"] == group["completion_ids"] else None
        batch = self.batch_of(group)
        return self.compute_ref_log_probs(self.reference_or_policy, batch)[batch["valid"]].tolist()

    @property
    def is_conversational(self) -> bool:
        """Whether the first prompt, of which tokens alone are kept, has the tokens of the chat template around it."""
        if self.online:
            return super().is_conversational
        tokenizer: Any = self.processing_class
        if not tokenizer.chat_template:
            return False
        try:
            turns = [[{"role": "user", "content": text}] for text in ("a", "b")]
            texts = [render_messages(turn, tokenizer, add_generation_prompt=True) for turn in turns]
        except BadRow:  # a template that wants other turns
            return False
        one, other = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompt = self._first_row["prompt_ids"]
        if after := _common_start(one[::-1], other[::-1]):
            return prompt[::-1][: len(after)] == after
        before = _common_start(one, other)
        return len(before) > 1 and prompt[: len(before)] == before  # one may be BOS, which plain text has as well

    # ------------------------------------------------------------------------------------------------- checkpoints

    @property
    def state_files(self) -> tuple[str, ...]:
        """Online, the one file that :meth:`save_own_state` writes."""
        return (STATE_FILE,) if self.online else ()

    def save_own_state(self, folder: Path) -> None:
        """Write the temperature of the labels, what the rounds are like, and the place in a stream of shards."""
        state: dict[str, Any] = {"temperature_alpha": self.temperature_alpha} if self.reads_labels else {}
        if self.online:
            state |= {"steps_per_round": self.steps_per_round, "reference": self.args.reference}
        if isinstance(self.train_dataset, ShardedGroups):
            state[STREAM] = stream_state(self, self.train_dataset)
        if state and self.args.should_save:
            with atomic_write(folder / STATE_FILE) as file:
                file.write(json.dumps(state).encode())

    def load_state(self, checkpoint: Path) -> None:
        """Go on in the checkpoint's stream, at its temperature.

        Under ``temperature_alpha="auto"`` the checkpoint's is kept; a number given now comes first.
        """
        file = checkpoint / STATE_FILE
        state = json.loads(file.read_text()) if file.is_file() else {}
        if isinstance(self.train_dataset, ShardedGroups) and STREAM in state:
            check_stream_of_checkpoint(checkpoint, state[STREAM], self, self.train_dataset)
        if self.online:
            self.check_steps_of_round(checkpoint, state.get("steps_per_round", 0))
            earlier, now = state.get("reference", self.args.reference), self.args.reference
            if earlier != now and self.start_step % self.steps_per_round:
                raise ValueError(
                    f"reference was {earlier} in {checkpoint} and is {now} now, in the middle of a round, which "
                    f"was begun with the former. Keep reference={earlier}, or go on from the end of a round."
                )
            return  # the temperature is that of the round's groups
        if not self.reads_labels or self.args.temperature_alpha != AUTO:
            return
        if "temperature_alpha" not in state:
            logger.warning(
                f"{checkpoint} has no {STATE_FILE}, so that its temperature_alpha is not known; this run continues at "
                f"{self.temperature_alpha:.4g} ('auto'). Versions that wrote no such file had 1e-4 as default: give "
                "temperature_alpha the number that the checkpoint was trained at."
            )
            return
        found, self._auto_temperature = self._auto_temperature, broadcast_object_list([state["temperature_alpha"]])[0]
        if found != self._auto_temperature:
            logger.warning(
                f"temperature_alpha='auto' remains {self._auto_temperature:.4g}, as in {checkpoint}; the training "
                f"groups would give {found:.4g}. For another temperature, give temperature_alpha a number."
            )

    # ------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Return the mean loss over the groups of a batch.

        In training the batch carries what makes the step's mean exact (see :meth:`get_batch_samples`), so that
        ``num_items_in_batch`` is not needed and an override may drop it. ``return_outputs`` adds a dict with
        ``policy_logps``, ``ref_logps``, ``log_ratios``, ``valid`` (B, K) and ``losses`` (B,). In evaluation
        ``loss_delta`` is logged: the loss less that of the reference, where training starts.
        """
        training = self.model.training
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        # The reference comes first, so that its activations and those kept for the backward pass never add up.
        if not self.args.precompute_ref_log_probs and "ref_logps" not in inputs:
            inputs = inputs | {"ref_logps": self.compute_ref_log_probs(self.reference_or_policy, inputs)}
        policy = completion_logps(model, inputs, layout=self.layout, **router)
        inputs = beside(policy.logps, inputs)
        valid, ref_logps = inputs["valid"], inputs["ref_logps"]
        scores = add_first_score_bonus(inputs["scores"], valid, self.args.first_score_bonus)
        log_ratios = policy.logps - ref_logps
        if training and self.reference_is_proven is False:
            self._prove_reference_on(policy, inputs)

        given = {"log_ratios": log_ratios, "scores": scores, "valid": valid, "lengths": policy.lengths}
        given |= {"policy_logps": policy.logps, "ref_logps": ref_logps}
        given |= {"beta": self.args.beta, "temperature_alpha": self.temperature_alpha}
        losses, terms = self._losses(given)
        weights = inputs.get("group_weights", torch.ones_like(losses))
        groups = inputs.get("step_groups", weights.sum().clamp(min=1))
        loss = (weights * losses).sum() / groups
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss * weights.sum() / groups

        with torch.no_grad():
            metrics = batch_metrics(
                policy, log_ratios, scores, valid, beta=self.args.beta, temperature_alpha=self.temperature_alpha
            )
            everyone = torch.ones_like(losses)
            metrics["loss"] = (losses, everyone)
            if not training:
                at_reference = given | {"log_ratios": torch.zeros_like(log_ratios), "policy_logps": ref_logps}
                metrics["loss_delta"] = (losses - self._losses(at_reference)[0], everyone)
                if self.on_evaluated is not None:
                    self.on_evaluated(inputs, log_ratios, weights)
            if len(terms) > 1:
                metrics |= {f"loss/{name}": (term, everyone) for name, term in terms.items()}
            if self.aux_loss_enabled:
                metrics["aux_loss"] = (policy.aux_loss.expand_as(losses), everyone)
            weighted = {name: (values, w * weights) for name, (values, w) in metrics.items()}
            self._means["train" if training else "eval"].add(weighted)
            if training:
                tokens = (per_completion(inputs["attention_mask"].sum(1), valid).sum(1) * weights).sum()
                self.count_tokens(self.accelerator.gather(tokens).sum() // self.get_tp_size())
        if not return_outputs:
            return loss
        outputs = {"policy_logps": policy.logps, "ref_logps": ref_logps, "log_ratios": log_ratios}
        return loss, outputs | {"valid": valid, "losses": losses}

    def _losses(self, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the losses (B,), and each by its name."""
        terms = {name: group_loss(name, **given) for name in self.loss_types}
        weighted = [weight * terms[name] for name, weight in zip(self.loss_types, self.loss_weights, strict=True)]
        return torch.stack(weighted).sum(0), terms

    # ---------------------------------------------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as in TRL, with exact means over the groups since the last log."""
        if "loss" in logs or "train_runtime" in logs:  # the trainer's own logs, made on every process
            means = self._means["train"].compute()
            means.pop("loss", None)  # Trainer logs the mean over steps
            logs.update({name: m.mean for name, m in means.items()})
            if means:
                logs["num_tokens"] = self.trained_tokens
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        """Return the loss of an evaluation batch, in which no repeated group counts."""
        if (read := inputs.pop(READ, None)) is not None:
            self.callback_handler.eval_dataloader.dataset.take_note(read)
        inputs["group_weights"] = self._group_weights.of_evaluation(self, inputs)
        inputs = self.to_device(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run Trainer's evaluation; loss and metrics are then exact means over the groups, each counted once."""
        self._means["eval"].compute()
        dataset = getattr(dataloader.dataset, "dataset", dataloader.dataset)  # of a stream, inside its shard
        self._group_weights.begin_evaluation(dataset, len(dataloader) if has_length(dataloader) else 0)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self._means["eval"].compute()
        output.metrics.update({f"{metric_key_prefix}_{name}": m.mean for name, m in means.items()})
        self.last_evaluation = means
        return output

    def functions(self) -> dict[str, dict[str, str | None]]:
        """Return the losses and, where completions are sampled, the reward."""
        return {"loss_type": {name: LOSSES.hashes.get(name) for name in self.loss_types}, **self.reward_function()}

    def objective(self) -> dict[str, Any]:
        """Losses and their coefficients."""
        args = self.args
        found: dict[str, Any] = {"loss": " + ".join(map(LOSSES.describe, args.loss_type)), "beta": args.beta}
        if args.loss_weights is not None:
            found["loss_weights"] = args.loss_weights
        if self.reads_labels:
            found["temperature_alpha"] = self.temperature_alpha
        if self.online:
            rounds = f"{args.num_rounds} rounds of {self.prompts_per_round} prompts x {args.num_generations} samples"
            found |= {"own samples": rounds}
            if args.reference == "round":
                found["reference"] = "the policy at the beginning of each round"
        return found


def _common_start(one: list[int], other: list[int]) -> list[int]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [first for first, _ in pairs]
