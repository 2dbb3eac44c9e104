"""ContrastiveTrainer: trl.DPOTrainer for K scored completions. Wiring only; the mathematics is in losses/."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length
from transformers.utils import logging
from trl import DPOTrainer

from contrastive_align.data import DataReport, GroupCollator, prepare_groups
from contrastive_align.data.collate import to_table
from contrastive_align.losses import LOSSES, is_preference, target_labels, temperature_for_entropy
from contrastive_align.models import completion_logps, load_tokenizer, resolve_start, verify_saved, with_pad_token
from contrastive_align.models.layout import set_layout
from contrastive_align.models.loading import check_output_dir
from contrastive_align.models.logps import CompletionLogps, per_completion
from contrastive_align.trainers.card import CardMixin
from contrastive_align.trainers.checkpoints import checkpoint_to_resume
from contrastive_align.trainers.compiling import compile_layers
from contrastive_align.trainers.contrastive_config import ContrastiveConfig
from contrastive_align.trainers.memory import KeepsFreedMemory
from contrastive_align.trainers.metrics import Averages, Mean, Metric, group_metrics
from contrastive_align.trainers.reference import REFERENCE_FILE, ReferenceMixin
from contrastive_align.trainers.token_batches import TokenBatchesMixin
from contrastive_align.trl_seam import get_config_model_id, global_then_local_main_first


logger = logging.get_logger(__name__)

AnyDataset = Dataset | IterableDataset


class ContrastiveTrainer(CardMixin, TokenBatchesMixin, ReferenceMixin, KeepsFreedMemory, DPOTrainer):
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

    Args:
        model: as in TRL; a folder or hub id may also be a LoRA adapter (see ``models.loading.resolve_start``).
        ref_model: as in TRL; by default the start of the run, and then the first step checks that policy and reference
            agree.
        args: a :class:`ContrastiveConfig`.
        data_collator: by default :class:`~contrastive_align.data.GroupCollator`; another one must return its keys.
        train_dataset, eval_dataset: groups in any spelling of ``data/formats.py``, preference pairs included.
        processing_class: a tokenizer.
        callbacks, optimizers, quantization_config, peft_config: as in TRL.

    Raises:
        BadRow: a row cannot be trained on (``on_bad_row="raise"``), with row and column.
        ValueError: an option or data this trainer does not support, with the way out.
        ReferenceMismatch: policy and reference differ before the first step, or the reference of a resumed run moved.
    """

    # compute_loss divides by the groups of the whole optimiser step itself.
    loss_is_scaled_for_ga = True

    _tag_names = ("trl", "contrastive-align", "nca")
    _name = "NCA"
    _paper = {  # noqa: RUF012 (TRL's form)
        "title": "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        "id": "2402.05369",
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024noise,
                title        = {{Noise Contrastive Alignment of Language Models with Explicit Rewards}},
                author       = {Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems 37},
                eprint       = {2402.05369},
                archivePrefix = {arXiv},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: ContrastiveConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = ContrastiveConfig(f"{model_id.split('/')[-1]}-NCA")
        elif not isinstance(args, ContrastiveConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, expected a ContrastiveConfig (it takes the same options, and "
                "loss_type='dpo' for TRL's default loss)."
            )
        if compute_metrics is not None:
            raise ValueError(
                "compute_metrics reads logits, which this trainer never builds. Read trainer.evaluate()'s metrics, or "
                "add a callback with on_evaluate."
            )
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                "processing_class is a vision processor, expected a tokenizer. For images use trl.DPOTrainer."
            )

        if peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} puts virtual tokens before the prompt, so that the policy never starts "
                "as the reference. Use LoRA or another adapter of the weights."
            )
        self._refuse_streams_by_tokens(args, train_dataset)
        # Accelerate would have the main process read every stream and cut its batches by rows, and groups with them.
        args.accelerator_config.dispatch_batches = False

        self.start_description = model_id or type(model).__name__
        tokenizer_source = model_id
        if isinstance(model, str):
            start = resolve_start(
                model,
                output_dir=args.output_dir,
                model_init_kwargs=args.model_init_kwargs,
                quantization_config=quantization_config,
                trust_remote_code=args.trust_remote_code,
                allow_pickled_adapter=args.allow_pickled_adapter,
            )
            if start.model != model:
                logger.warning(f"Start and reference: {start.description}")
                args = copy.copy(args)
                args.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "revision"}
                if not isinstance(start.model, str):
                    args.model_init_kwargs = None
                    quantization_config = None
                    if peft_config is not None:
                        logger.warning("The adapter's own LoRA goes on training; the peft_config given is not used.")
                        peft_config = None
            model, tokenizer_source, self.start_description = start.model, start.tokenizer_source, start.description
        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision")
            processing_class = load_tokenizer(
                tokenizer_source, revision=revision, trust_remote_code=args.trust_remote_code
            )
        with_pad_token(processing_class)
        adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        check_output_dir(args.output_dir, adapter=adapter)
        if data_collator is None:
            score_dtype = torch.float32 if args.device.type == "mps" else torch.float64  # which mps does not have
            data_collator = GroupCollator(processing_class.pad_token_id, args.pad_to_multiple_of, score_dtype)

        self.data_reports: dict[str, DataReport] = {}
        self.last_evaluation: dict[str, Mean] = {}  # with standard errors
        self._averages = {"train": Averages(), "eval": Averages()}
        self.layout = ""
        self._evaluated: Any = None
        self._evaluation_batches_left = 0
        self._reference_given = ref_model is not None

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut completions apart, and their log-probs are not summed again. Use "
                "data, tensor or FSDP parallelism."
            )
        self._set_layout()
        self._report_one_hot_labels()
        self._report_short_context()

    def _set_layout(self) -> None:
        """Choose how batches go through the models, once: on TRL's models, before anything is computed with them."""
        if self.layout:
            return
        obstacle = None
        if self.aux_loss_enabled:
            obstacle = "the router loss is defined on padded rows"
        elif not isinstance(self.data_collator, GroupCollator):
            obstacle = "the data_collator is not a GroupCollator, and may give completions of a group different prompts"
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        sharded = self.is_fsdp_enabled or (self.is_deepspeed_enabled and self._zero_stage == 3)
        autocast = self.args.bf16 or self.args.fp16
        self.layout = set_layout(models, self.args.layout, obstacle=obstacle, sharded=sharded, autocast=autocast)
        compile_layers(self, models)

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage

    # ------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase,
        args: ContrastiveConfig,
        dataset_name: str,
    ) -> AnyDataset:
        with global_then_local_main_first():
            dataset, report = prepare_groups(
                dataset,
                processing_class,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                on_bad_row=args.on_bad_row,
                num_proc=args.dataset_num_proc,
                name=dataset_name,
            )
        self.data_reports[dataset_name] = report
        for line in report.lost():
            logger.warning(f"{dataset_name}: {line}")
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completion_ids", "scores", "ref_logps", "row"]

    def _report_one_hot_labels(self) -> None:
        """Say so when one-hot labels throw explicit rewards away, and which temperature would not."""
        alpha = self.args.temperature_alpha
        if isinstance(self.train_dataset, IterableDataset) or not any(map(_reads_labels, self.loss_types)):
            return
        rows = self.train_dataset[:10_000]["scores"]
        scores, valid = to_table(rows, torch.float64), to_table([[True] * len(row) for row in rows], torch.bool)
        graded = [len(set(row)) > 2 for row in rows]
        soft, hard = (target_labels(scores, temperature_alpha=a, valid=valid) for a in (alpha, 1e-12))
        if not any(graded) or (soft - hard).abs().max() > 1e-3:
            return
        wish = temperature_for_entropy(scores, valid=valid)
        advice = f" temperature_alpha={wish:.3g} would give half of the largest label entropy." if wish else ""
        logger.warning(
            f"temperature_alpha={alpha:g} makes the labels one-hot, although {sum(graded)} of {len(graded)} groups "
            f"have more than two different scores: all but the best score is thrown away.{advice}"
        )

    def _report_short_context(self) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and (self.args.max_length is None or self.args.max_length > context):
            logger.warning(
                f"max_length={self.args.max_length} is above the model's context of {context} tokens: longer sequences "
                f"leave the range it was trained for. Set max_length={context}."
            )

    # ------------------------------------------------------------------------------------ how much each group weighs

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimiser step, and how many groups they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1 and self.accelerator.gradient_state.end_of_dataloader
            batch["group_weights"] = self._train_group_weights(batch, last)
        groups = sum(batch["group_weights"].sum() for batch in batches)
        total = self.accelerator.gather(torch.as_tensor(groups, device=device, dtype=torch.float32)).sum()
        return batches, total / self.get_tp_size()

    def _group_weights(self, batch: dict[str, Tensor], dataset: Any, last: bool) -> Tensor:
        """1 for each group of a batch, 0 for those Accelerate repeats to give every process a full last batch.

        Args:
            dataset: where the batch came from.
            last: whether it is the last batch of a pass.
        """
        size = batch["scores"].size(0)
        processes = self.accelerator.num_processes // self.get_tp_size()
        if processes == 1 or self.args.dataloader_drop_last:
            return torch.ones(size)
        place = self.accelerator.process_index // self.get_tp_size() * size + torch.arange(size)
        if has_length(dataset):
            real = len(dataset) % (size * processes) or size * processes  # in the last batch, over all processes
            return (place < real).float() if last else torch.ones(size)
        if getattr(dataset, "n_shards", 1) >= processes or "row" not in batch:
            return torch.ones(size)  # every process reads shards of its own, and nothing is repeated
        if self.args.dataloader_num_workers > 1:
            logger.warning_once(
                "A stream read by several workers for several processes: rows that Accelerate repeats to fill the last "
                "batch of a pass count again, since their order is lost. Set dataloader_num_workers to 0 or 1."
            )
            return torch.ones(size)
        # A stream has no length to tell by. Its rows come numbered in their order, and a repeated one steps back.
        rows = self.accelerator.gather(batch["row"].to(self.accelerator.device)).cpu()
        before = torch.cat([rows.new_full((1,), -1), rows.cummax(0).values[:-1]])
        return (rows > before).float()[place]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # DeepSpeed would cast every float of the batch to the model's dtype; scores and log-probs need their digits.
        prepared = super()._prepare_inputs(inputs)
        for name in ("scores", "ref_logps", "group_weights"):
            if name in inputs:
                prepared[name] = inputs[name].to(self.accelerator.device)
        return prepared

    # ------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of one micro-batch: its groups' losses over the number of groups of the step.

        With ``num_items_in_batch`` (groups of the optimiser step, over all processes) micro-batches and processes add
        up to the mean over the step; without it, it is the mean over this batch. ``return_outputs`` adds a dict with
        ``policy_logps``, ``ref_logps``, ``log_ratios``, ``valid`` and ``losses``.
        """
        training = self.model.training
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        policy = completion_logps(model, inputs, layout=self.layout, **router)
        cached = inputs["ref_logps"] if self.args.precompute_ref_log_probs else None
        ref_logps = cached if cached is not None else self.compute_ref_log_probs(self._reference, inputs)
        valid, scores = inputs["valid"], inputs["scores"].clone()
        scores[:, 0] += self.args.first_score_bonus * ~is_preference(scores, valid=valid)
        log_ratios = policy.logps - ref_logps
        if training and not self._reference_checked:
            self._check_reference(log_ratios.detach(), policy)

        terms = {
            name: LOSSES[name](
                log_ratios,
                scores,
                beta=self.args.beta,
                temperature_alpha=self.args.temperature_alpha,
                valid=valid,
                policy_logps=policy.logps,
                lengths=policy.lengths,
            )
            for name in self.loss_types
        }
        losses = sum(weight * terms[name] for name, weight in zip(self.loss_types, self.loss_weights, strict=True))
        weights = inputs.get("group_weights", torch.ones_like(losses))
        denominator = weights.sum().clamp(min=1)
        if num_items_in_batch is not None:  # gradients are averaged over processes, hence the factor
            denominator = num_items_in_batch / (self.accelerator.num_processes / self.get_tp_size())
        loss = (weights * losses).sum() / denominator
        if self.aux_loss_enabled:
            aux_loss = policy.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss * weights.sum() / denominator

        with torch.no_grad():
            metrics = self._metrics_of(inputs, policy, log_ratios, scores)
            metrics["loss"] = (losses, torch.ones_like(losses))
            if len(terms) > 1:
                metrics |= {f"loss/{name}": (term, torch.ones_like(term)) for name, term in terms.items()}
            if self.aux_loss_enabled:
                metrics["aux_loss"] = (aux_loss.expand_as(losses), torch.ones_like(losses))
            weighted = {name: (values, w * weights) for name, (values, w) in metrics.items()}
            self._averages["train" if training else "eval"].add(weighted)
            if training:
                tokens = (per_completion(inputs["attention_mask"].sum(1), valid).sum(1) * weights).sum()
                self._total_train_tokens += int(self.accelerator.gather(tokens).sum()) // self.get_tp_size()
        if not return_outputs:
            return loss
        outputs = {"policy_logps": policy.logps, "ref_logps": ref_logps, "log_ratios": log_ratios}
        return loss, outputs | {"valid": valid, "losses": losses}

    # -------------------------------------------------------------------------------------------- resuming and saving

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any):
        self._resumed_from = None
        if resume_from_checkpoint:
            self._resumed_from = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, REFERENCE_FILE)
            resume_from_checkpoint = self._resumed_from
            self._reference_checked = False
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        note = self._reference_note()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            (folder / REFERENCE_FILE).write_text(json.dumps(note))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As TRL; before anything is pushed the weights are read back, and an empty or NaN tensor stops the run."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise ValueError(
                    f"'{name}' has NaN or infinite entries: training diverged, and nothing is saved. Lower "
                    f"learning_rate (it is {self.args.learning_rate:g})."
                )
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            verify_saved(output_dir or self.args.output_dir, may_be_sharded=sharded)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ---------------------------------------------------------------------------------------------------- metrics

    def _metrics_of(
        self, inputs: dict[str, Tensor], policy: CompletionLogps, log_ratios: Tensor, scores: Tensor
    ) -> dict[str, Metric]:
        valid = inputs["valid"]
        labels = target_labels(scores, temperature_alpha=self.args.temperature_alpha, valid=valid)
        metrics = group_metrics(
            log_ratios=log_ratios,
            policy_logps=policy.logps,
            scores=scores,
            labels=labels,
            valid=valid,
            beta=self.args.beta,
        )
        # Per-token metrics: the value of a group is its mean, its weight its number of tokens.
        completions = int(valid.sum())

        def per_group(values: Tensor, columns: Tensor) -> Metric:
            sums = torch.zeros(completions, device=values.device).index_add(0, policy.owner, values.float())
            sums = per_completion(sums, valid) * columns
            tokens = (policy.lengths * columns).sum(1)
            return sums.sum(1) / tokens.clamp(min=1), tokens.to(sums.dtype)

        metrics["entropy"] = per_group(policy.tokens["entropy"], valid)
        best = torch.zeros_like(valid).scatter(1, scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True), True)
        metrics["mean_token_accuracy"] = per_group(policy.tokens["is_top1"], best & valid)
        pairs = (metrics["rewards/chosen"][1] > 0).unsqueeze(1) & valid if "rewards/chosen" in metrics else None
        if pairs is not None:
            metrics["logits/chosen"] = per_group(policy.tokens["mean_logits"], best & pairs)
            metrics["logits/rejected"] = per_group(policy.tokens["mean_logits"], ~best & pairs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:  # the trainer's own logs, made on every process
            means = self._averages["train"].compute()
            means.pop("loss", None)  # Trainer logs the mean over steps
            logs.update({name: m.mean for name, m in means.items()})
            if means:
                logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._evaluation_batches_left -= 1
        last = self._evaluation_batches_left == 0
        inputs["group_weights"] = self._group_weights(inputs, self._evaluated, last)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Trainer's loop; loss and metrics are then exact means over the groups, each counted once."""
        self._averages["eval"].compute()
        self._evaluated = getattr(dataloader.dataset, "dataset", dataloader.dataset)  # of a stream, inside its shard
        self._evaluation_batches_left = len(dataloader) if has_length(dataloader) else 0
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self._averages["eval"].compute()
        output.metrics.update({f"{metric_key_prefix}_{name}": m.mean for name, m in means.items()})
        self.last_evaluation = means
        return output

    def objective(self) -> dict[str, Any]:
        args = self.args
        found = {"loss": " + ".join(args.loss_type), "beta": args.beta}
        if args.loss_weights is not None:
            found["loss_weights"] = args.loss_weights
        if any(map(_reads_labels, args.loss_type)):
            found["temperature_alpha"] = args.temperature_alpha
        return found

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        raise NotImplementedError(
            "predict returns logits, which this trainer never builds. trainer.evaluate(dataset) gives the metrics, and "
            "compute_loss(model, batch, return_outputs=True) the log-probs of a batch."
        )


def _reads_labels(loss_name: str) -> bool:
    """Whether a loss depends on temperature_alpha, found by trying."""
    log_ratios, scores = torch.tensor([[0.3, -0.2]]), torch.tensor([[2.0, 1.0]])
    results = [
        LOSSES[loss_name](
            log_ratios,
            scores,
            beta=1.0,
            temperature_alpha=alpha,
            policy_logps=log_ratios,
            lengths=torch.ones_like(scores),
        )
        for alpha in (0.1, 10.0)
    ]
    return not torch.equal(*results)
