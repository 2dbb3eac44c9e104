"""ContrastiveTrainer: trl.DPOTrainer for K scored completions. Wiring only; the mathematics is in losses/."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list, is_peft_model, tqdm
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from transformers.utils import logging
from trl import DPOTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from contrastive_align.data import DataReport, GroupCollator, prepare_groups
from contrastive_align.losses import LOSSES, target_labels, temperature_for_entropy
from contrastive_align.models import completion_logps, load_tokenizer, resolve_start, verify_saved, with_pad_token
from contrastive_align.models.logps import CompletionLogps, to_table
from contrastive_align.trainers.contrastive_config import ContrastiveConfig
from contrastive_align.trainers.metrics import Averages, Mean, Metric, group_metrics


logger = logging.get_logger(__name__)

AnyDataset = Dataset | IterableDataset
REFERENCE_FILE = "reference.json"
# Policy and reference start as the same weights, so their log-probs may differ by rounding alone: nats per token.
START_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
START_TOLERANCE_16_BIT = 2e-2


class ContrastiveTrainer(DPOTrainer):
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
        if data_collator is None:
            data_collator = GroupCollator(processing_class.pad_token_id, args.pad_to_multiple_of)

        self.data_reports: dict[str, DataReport] = {}
        self.last_evaluation: dict[str, Mean] = {}  # with standard errors
        self._averages = {"train": Averages(), "eval": Averages()}
        self._reference_checked = False
        self._resumed_from: str | None = None
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
        self._report_one_hot_labels()
        self._report_short_context()

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
        for line in report.losses():
            logger.warning(f"{dataset_name}: {line}")
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completion_ids", "scores", "ref_logps"]

    def _report_one_hot_labels(self) -> None:
        """Say so when one-hot labels throw explicit rewards away, and which temperature would not."""
        alpha = self.args.temperature_alpha
        if isinstance(self.train_dataset, IterableDataset) or not any(map(_reads_labels, self.loss_types)):
            return
        rows = self.train_dataset.select(range(min(len(self.train_dataset), 10_000)))
        batch = self._score_table(rows["scores"])
        graded = [len(set(s)) > 2 for s in rows["scores"]]
        soft, hard = (target_labels(batch["scores"], temperature_alpha=a, valid=batch["valid"]) for a in (alpha, 1e-12))
        if not any(graded) or (soft - hard).abs().max() > 1e-3:
            return
        wish = temperature_for_entropy(batch["scores"], valid=batch["valid"])
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

    @staticmethod
    def _score_table(scores: list[list[float]]) -> dict[str, Tensor]:
        k = max(map(len, scores))
        return {
            "scores": torch.tensor([[*s, *[0.0] * (k - len(s))] for s in scores], dtype=torch.float64),
            "valid": torch.tensor([[True] * len(s) + [False] * (k - len(s)) for s in scores]),
        }

    # ------------------------------------------------------------------------------------ how much each group weighs

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimiser step, and how many groups they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for i, batch in enumerate(batches):
            at_end = i == len(batches) - 1 and self.accelerator.gradient_state.end_of_dataloader
            batch["group_weights"] = self._group_weights(batch, at_end)
        groups = sum(batch["group_weights"].sum() for batch in batches)
        total = self.accelerator.gather(torch.as_tensor(groups, device=device, dtype=torch.float32)).sum()
        return batches, total / self.get_tp_size()

    def _group_weights(self, batch: dict[str, Tensor], last_batch: bool) -> Tensor:
        """1 for each group, 0 for those Accelerate repeats to give every process a full last batch."""
        size = batch["scores"].size(0)
        remainder = self.accelerator.gradient_state.remainder  # rows of the last batch over all processes; <= 0: even
        if last_batch and remainder < 0 and self.accelerator.num_processes > 1:
            logger.warning_once(
                "A stream on several processes: rows that Accelerate repeats to fill the last batch of a pass count "
                "again, since a stream has no length to tell them by. A dataset with a length is exact."
            )
        if not last_batch or remainder <= 0:
            return torch.ones(size)
        rank = self.accelerator.process_index // self.get_tp_size()
        return (torch.arange(size) + rank * size < remainder).float()

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
        policy = completion_logps(model, inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {}))
        ref_logps = (
            inputs["ref_logps"] if "ref_logps" in inputs else self.compute_ref_log_probs(self._reference, inputs)
        )
        valid, scores = inputs["valid"], inputs["scores"].clone()
        scores[:, 0] += self.args.first_score_bonus
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
            aux_loss = policy.outputs.aux_loss
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
                tokens = (to_table(inputs["attention_mask"].sum(1), valid).sum(1) * weights).sum()
                self._total_train_tokens += int(self.accelerator.gather(tokens).sum()) // self.get_tp_size()
        if not return_outputs:
            return loss
        outputs = {"policy_logps": policy.logps, "ref_logps": ref_logps, "log_ratios": log_ratios}
        return loss, outputs | {"valid": valid, "losses": losses}

    @property
    def _reference(self) -> nn.Module:
        return self.ref_model if self.ref_model is not None else self.model

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Reference log-probs (B, K) of a batch; with PEFT, of the model with its adapter off (or its frozen copy)."""
        model_with_adapter = self.accelerator.unwrap_model(self.model) if self.ref_model is None else None
        if model_with_adapter is not None and is_peft_model(model_with_adapter):
            adapter = use_adapter(model_with_adapter, "ref" if "ref" in model_with_adapter.peft_config else None)
        else:
            adapter = contextlib.nullcontext()
        was_training = model.training
        if not self.args.disable_dropout:  # the reference is one function, also where it is the policy without adapter
            model.eval()
        try:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                adapter,
                self.accelerator.autocast(),
            ):
                return completion_logps(model, inputs).logps
        finally:
            model.train(was_training)

    def _precompute_ref_logps(self, dataset: AnyDataset, name: str, batch_size: int) -> AnyDataset:
        """Add the column ``ref_logps``, cached on disk under a key of token ids, weights and precision."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "precompute_ref_log_probs=True needs a dataset with a length, found a stream. Load it whole, or set "
                "precompute_ref_log_probs=False."
            )
        if "ref_logps" in dataset.column_names:
            return dataset
        precision = (self.args.bf16, self.args.fp16, str(self.model.dtype))
        key = [Hasher.hash((_hash_of_tokens(dataset), self._precompute_model_hash, precision))]
        key = broadcast_object_list(key, from_process=0)[0]
        file = Path(datasets.config.HF_DATASETS_CACHE) / "contrastive_align" / f"ref_logps_{key}.parquet"
        if not file.is_file():
            ref_logps = self._ref_logps_of(dataset, name, batch_size)
            if self.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                aside = file.with_suffix(f".{os.getpid()}.incomplete")
                Dataset.from_dict({"ref_logps": ref_logps}).to_parquet(aside)
                aside.replace(file)
        self.accelerator.wait_for_everyone()
        return concatenate_datasets([dataset, Dataset.from_parquet(str(file))], axis=1)

    def _ref_logps_of(self, dataset: Dataset, name: str, batch_size: int) -> list[list[float]]:
        model = self._reference
        if self.ref_model is None and self.is_deepspeed_enabled:
            # Before training DeepSpeed has not placed the model yet; one inference engine does, for all passes.
            self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator))
        rows: list[list[float]] = []
        # In the mode the policy will be in: 4-bit layers on CPU take another kernel in evaluation mode.
        was_training = model.training
        model.train(self.args.disable_dropout)
        for batch in tqdm(loader, desc=f"Reference log-probs of the {name} dataset"):
            logps = self.compute_ref_log_probs(model, batch)
            rows += self.accelerator.gather_for_metrics(
                [row[ok].tolist() for row, ok in zip(logps, batch["valid"], strict=True)], use_gather_object=True
            )
        model.train(was_training)
        return rows

    # -------------------------------------------------------------------------------- the reference is an identity

    def _check_reference(self, log_ratios: Tensor, policy: CompletionLogps) -> None:
        """At step 0 policy and reference agree; on resuming, the reference is that of the checkpoint."""
        self._reference_checked = True
        if self._resumed_from is not None:
            return self._check_reference_of_checkpoint(self._resumed_from)
        if self.state.global_step > 0 or self._reference_given or not self.args.disable_dropout:
            return None
        per_token = log_ratios.abs() / policy.lengths.clamp(min=1)
        worst = per_token.max().item()
        tolerance = self._start_tolerance()
        if not worst <= tolerance:
            raise ReferenceMismatch(
                f"Before the first step policy and reference differ by {worst:.3g} nats per token (expected at most "
                f"{tolerance:g}): the reference is not the start of this run ({self.start_description}). Usual causes: "
                "the weights were changed after loading (pass the changed model's own copy as ref_model), or a LoRA "
                "initialisation that is not zero (PiSSA, OLoRA, LoftQ)."
            )
        return None

    def _start_tolerance(self) -> float:
        sixteen_bit = self.args.bf16 or self.args.fp16 or getattr(self.model, "is_quantized", False)
        return START_TOLERANCE_16_BIT if sixteen_bit else START_TOLERANCE.get(self.model.dtype, START_TOLERANCE_16_BIT)

    def _reference_probe(self) -> list[float]:
        """Reference log-probs of the first training group: what a resumed run must find again."""
        row = next(iter(self.train_dataset))
        if "ref_logps" in row:
            return list(row["ref_logps"])
        batch = self._prepare_inputs(self.data_collator([row]))
        return self.compute_ref_log_probs(self._reference, batch)[batch["valid"]].tolist()

    def _check_reference_of_checkpoint(self, checkpoint: str) -> None:
        file = Path(checkpoint) / REFERENCE_FILE
        if not file.is_file():
            logger.warning(f"{checkpoint} has no {REFERENCE_FILE}: that its reference is this one cannot be checked.")
            return
        saved, now = json.loads(file.read_text()), self._reference_probe()
        tokens = sum(map(len, next(iter(self.train_dataset))["completion_ids"]))
        gaps = [abs(a - b) for a, b in zip(saved["probe"], now, strict=False)]
        if len(saved["probe"]) != len(now) or max(gaps) / tokens > self._start_tolerance():
            raise ReferenceMismatch(
                f"The reference of {checkpoint} ({saved['reference']}) gave the first training group the log-probs "
                f"{saved['probe']}, the one of this run ({self.start_description}) gives {now}. Resume with the same "
                "model and data (sync_ref_model runs cannot be resumed: TRL does not save their moving reference)."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        self._reference_checked = False
        self._resumed_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        if resume_from_checkpoint is True:
            self._resumed_from = get_last_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        probe = self._reference_probe()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            note = {"reference": self.start_description, "probe": probe}
            (folder / REFERENCE_FILE).write_text(json.dumps(note, indent=2))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As TRL, then reads the weights back and fails on an empty or NaN tensor."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not self.is_fsdp_enabled:
            verify_saved(output_dir or self.args.output_dir)

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
        outputs, mask = policy.outputs, policy.token_mask

        def per_group(values: Tensor, columns: Tensor) -> Metric:
            sums = to_table((values[:, -mask.size(1) :].float() * mask).sum(1), valid) * columns
            tokens = (policy.lengths * columns).sum(1)
            return sums.sum(1) / tokens.clamp(min=1), tokens.to(sums.dtype)

        metrics["entropy"] = per_group(outputs.entropy, valid)
        best = torch.zeros_like(valid).scatter(1, scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True), True)
        metrics["mean_token_accuracy"] = per_group(outputs.is_top1, best & valid)
        pairs = (metrics["rewards/chosen"][1] > 0).unsqueeze(1) & valid if "rewards/chosen" in metrics else None
        if pairs is not None:
            metrics["logits/chosen"] = per_group(outputs.mean_logits, best & pairs)
            metrics["logits/rejected"] = per_group(outputs.mean_logits, ~best & pairs)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            means = self._averages["train"].compute()
            means.pop("loss", None)  # Trainer's own, the same number
            self._metrics["train"] = {name: [m.mean] for name, m in means.items()}
            if means:
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs["group_weights"] = self._group_weights(inputs, self.accelerator.gradient_state.end_of_dataloader)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Trainer's loop; loss and metrics are then exact means over the groups, each counted once."""
        self._averages["eval"].compute()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self._averages["eval"].compute()
        output.metrics.update({f"{metric_key_prefix}_{name}": m.mean for name, m in means.items()})
        self.last_evaluation = means
        return output


class ReferenceMismatch(RuntimeError):
    """Policy and reference are not what they should be."""


def _hash_of_tokens(dataset: Dataset) -> str:
    """A hash of what the log-probs depend on: the token ids, not the object or file they came in."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(1000):
        for column in ("prompt_ids", "completion_ids"):
            digest.update(json.dumps(batch[column].to_pylist()).encode())
    return digest.hexdigest()


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
