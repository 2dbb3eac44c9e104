"""ConditionalTrainer: trl.SFTTrainer on completions conditioned on how good they are. Wiring only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import SFTTrainer

from contrastive_align.conditions import CONDITIONS, Condition, of_checkpoint, resolve_condition
from contrastive_align.conditions.scored_rows import read_scored
from contrastive_align.conditions.tokens import add_condition_tokens, with_trainable_rows
from contrastive_align.data import GroupCollator
from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.columns import read_options
from contrastive_align.models.head import head_parameters, logit_scale, logit_softcap, whole
from contrastive_align.models.logps import beside, completion_logps, completion_objective
from contrastive_align.models.token_loss import token_loss
from contrastive_align.pool import Pool, Sample, Table
from contrastive_align.rounds import measures, rounds
from contrastive_align.rounds.reward_log import RewardLog
from contrastive_align.rounds.samplers import check_vllm_options, check_vllm_tokens
from contrastive_align.trainers.base import AlignmentTrainer, AnyDataset, EvalDataset, keep_adapter_as_reference
from contrastive_align.trainers.configs import ConditionalConfig
from contrastive_align.trainers.sampled_rounds import BeginsRounds, SamplesRounds
from contrastive_align.trl_seam import (
    KeepsDigits,
    Method,
    PreparesDatasets,
    disable_dropout_in_model,
    nothing_loaded_by_trl,
)


logger = logging.get_logger(__name__)

STATE_FILE = "conditional_state.json"
PROBED = 64  # completion tokens on which policy and reference are compared at the start


class ConditionalTrainer(SamplesRounds, KeepsDigits, PreparesDatasets, AlignmentTrainer, SFTTrainer):
    r"""Train a language model on its own completions, each conditioned on how good it was; then ask for the best.

    .. math:: \ell_t = -\log \pi(y_t | c, x, y_{<t}) + \beta_{KL}\, KL_t - \beta_H\, H_t

    averaged over the completion tokens of an optimiser step; c says how good y is, the reference of the KL sees x
    alone. Quark (arXiv:2205.13636), ALT (arXiv:2407.16970) and SteerLM are configurations of it. A subclass of
    :class:`trl.SFTTrainer` that takes its arguments.

    Online, with ``reward_funcs`` or a ``judge``, an epoch is a round: sample completions of the prompts (the first
    round unconditioned, later ones conditioned on the best), score them, add them to the pool, train on draws from it.
    Offline, the dataset has completions with scores or feedback already, and an epoch is a pass over draws from these.

    ```python
    from contrastive_align import ConditionalConfig, ConditionalTrainer

    trainer = ConditionalTrainer(
        model="Qwen/Qwen3-0.6B",
        args=ConditionalConfig(output_dir="out", num_train_epochs=4),
        train_dataset=prompts,  # a column 'prompt'
        reward_funcs=my_reward,  # as for TRL's GRPOTrainer
        condition="quantile_tokens",
    )
    trainer.train()
    ```

    Args:
        model: as in TRL; a folder or hub id may also be a LoRA adapter.
        args, train_dataset, eval_dataset, processing_class, callbacks, optimizers: as in TRL.
        optimizer_cls_and_kwargs, quantization_config, peft_config: as in TRL.
        reward_funcs: TRL reward functions, reward-model ids or feature specs (see ``targets/features.py``); several are
            summed by ``args.reward_weights``.
        judge: a :class:`~contrastive_align.judge.judge.Judge`, in place of reward functions.
        condition: a :class:`~contrastive_align.conditions.conditions.Condition`, its kind, or a mapping.
        sampler: a :class:`~contrastive_align.sampling.server.ServerSampler`, which draws completions on a server with
            the base model; it is handed the adapter whenever that has changed. LoRA only. For vLLM beside the trainer,
            or a server that takes whole weights, there is ``args.use_vllm`` instead, with TRL's options.

    Raises:
        ValueError: an option, model or data this trainer does not support, with the way out.
    """

    config, suffix = ConditionalConfig, "conditional"
    columns = ("prompt_ids", "unconditioned_ids", "completion_ids")
    exact = ("step_tokens",)
    method = Method(
        name="Conditional training",
        tags=("trl", "contrastive-align", "conditional"),
        paper="Quark: Controllable Text Generation with Reinforced Unlearning",
        arxiv="2205.13636",
        key="lu2022quark",
        authors=(
            "Ximing Lu and Sean Welleck and Jack Hessel and Liwei Jiang and Lianhui Qin and Peter West and Prithviraj "
            "Ammanabrolu and Yejin Choi"
        ),
        year=2022,
        venue="Advances in Neural Information Processing Systems 35",
    )

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ConditionalConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
        formatting_func: Callable | None = None,
        *,
        reward_funcs: Any = None,
        judge: Any = None,
        condition: str | dict[str, Any] | Condition = "quantile_tokens",
        sampler: Any = None,
    ):
        args = self.own_args(args, model)
        self.refuse_arguments(
            model,
            processing_class,
            peft_config,
            train_dataset,
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            formatting_func=formatting_func,
        )
        self.check_prompts_are_whole(train_dataset)
        self.condition = resolve_condition(condition)
        self.take_feedback(reward_funcs, judge, args)
        self.online = self.feedback is not None
        if args.use_vllm:
            check_vllm_options(args, online=self.online, sampler=sampler, quantised=quantization_config is not None)
        self._uses_vllm, self._adds_adapter = args.use_vllm, peft_config is not None
        start = self.load_start(model, args, processing_class, quantization_config, peft_config)
        model, processing_class = start["model"], start["processing_class"]
        adapter = start["peft_config"] is not None or is_peft_model(model)
        self.has_reference = args.kl_coef != 0
        self.reference = self.frozen_copy(model) if self.has_reference and not adapter else None
        if self.has_reference and is_peft_model(model):
            keep_adapter_as_reference(model)
        start["peft_config"] = self._add_tokens(model, processing_class, start["peft_config"], args)
        if args.unfrozen_layers_ratio < 1:
            freeze_lower_layers(model, args.unfrozen_layers_ratio, adapter)
        if args.disable_dropout:
            disable_dropout_in_model(model)

        with nothing_loaded_by_trl(args):
            super().__init__(
                **start,
                args=args,
                data_collator=rounds.ConditionedCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        if self.aux_loss_enabled:
            raise ValueError("A router loss has no place in this loss. Set router_aux_loss_coef=0.")
        self.place_reference()
        self.choose_layout()
        self.kl_coef = AdaptiveCoefficient(args.kl_coef, target=args.kl_target, horizon=args.coef_horizon)
        self.entropy_coef = AdaptiveCoefficient(
            args.entropy_coef, target=args.entropy_target, horizon=args.coef_horizon, sign=-1
        )
        self._step_sums: Tensor | None = None  # of the optimiser step that is being made
        self._first_row: dict[str, Any] | None = None
        self._cut_words_told = False
        self.take_sampler(sampler)
        self._prepare_pool()
        self.add_callback(_AdaptsCoefficients(self))

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a condition whose tokens vLLM or ZeRO-3 would not have, before the model is loaded."""
        if self._uses_vllm:
            check_vllm_tokens(self.condition, tokenizer)
        new = [token for token in self.condition.tokens if token not in tokenizer.get_vocab()]
        if is_deepspeed_zero3_enabled() and (new or (self.condition.tokens and self._adds_adapter)):
            raise ValueError(
                f"The condition '{self.condition.kind}' has tokens of its own ({self.condition.tokens[0]}, ...), and "
                "ZeRO-3 keeps a part of the embedding on each process, to which their rows cannot be added. Use "
                "condition='phrases', which needs no tokens, ZeRO-2 or FSDP2; or, for full fine-tuning, add them with "
                "contrastive_align.conditions.add_condition_tokens, save model and tokenizer, and start from there."
            )

    def _add_tokens(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, peft_config: Any, args: ConditionalConfig
    ) -> Any:
        """Give model and tokenizer the condition's tokens; the adapter config under which their rows are trained."""
        tokens = self.condition.tokens
        self.condition_ids: list[int] = []
        if not tokens:
            return peft_config
        if args.use_vllm:
            adapter = peft_config is not None or is_peft_model(model)
            rows = len(model.get_input_embeddings().weight)
            check_vllm_tokens(self.condition, tokenizer, adapter=adapter, rows=rows)
        known = set(tokenizer.get_vocab())
        new = [token for token in tokens if token not in known]
        if is_peft_model(model):
            if new:
                raise ValueError(
                    f"The model has an adapter already, and its tokenizer lacks {new[0]!r}: rows for new tokens cannot "
                    "be added under it. Merge the adapter first, or use condition='phrases', which needs no tokens."
                )
            self.condition_ids = tokenizer.convert_tokens_to_ids(tokens)
            return peft_config
        self.condition_ids = add_condition_tokens(model, tokenizer, tokens, seed=args.seed)
        return None if peft_config is None else with_trainable_rows(peft_config, model, self.condition_ids)

    # ---------------------------------------------------------------------------------------------------------- data

    def prepare_rows(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:
        """Leave the dataset as it is: rows are made from the pool, round by round."""
        return dataset

    def _prepare_pool(self) -> None:
        """Open the pool and decide how many draws a round has; from scored data the one round is written at once."""
        args, folder = self.args, self.pool_folder
        self.data_report: dict[str, Any] = {}
        samples: list[Sample] = []
        if self.online:
            self.take_prompts(self.train_dataset)
            self.condition.check_generations(args.num_generations, self.prompts_per_round)
            draws = args.draws_per_round or self.prompts_per_round * args.num_generations
        else:
            samples, self.data_report = self._read_scored(self.train_dataset, self.condition)
            for sample in samples:
                self.condition.check(sample)
            self.condition.check_signal(samples)
            folder = folder.with_name(f"{folder.name}-{fingerprint_of_samples(samples, self.condition)}")
        self.pool = Pool(
            folder, label=lambda table: self.condition.label(table), drop_factor=args.drop_factor, seed=args.seed
        )
        if not self.online:
            labelled = self._fill_pool(samples)
            draws = args.draws_per_round or labelled
        # Scored completions were measured with their words when they were read.
        self.conditioned = rounds.ConditionedPrompts(self.condition, self.encode, self.room() if self.online else None)
        self.rows = rounds.ConditionedRows(
            self.pool, self.conditioned, self.encode, self.fill_steps(draws), args.max_length
        )
        if self.online:
            self.open_rounds(self.condition, self.pool)

    def _read_scored(self, dataset: Dataset, condition: Condition) -> tuple[list[Sample], dict[str, Any]]:
        return read_scored(
            dataset,
            self.processing_class,
            max_length=self.args.max_length,
            condition=condition,
            on_bad_row=self.args.on_bad_row,
            options=read_options(self.args.columns, self.args.score_column),
            feedback_column=self.args.feedback_column,
            negate_score=self.args.negate_score,
        )

    def _fill_pool(self, samples: list[Sample]) -> int:
        """Write scored samples as the pool's one round; how many have a label."""
        if not self.pool.rounds and self.accelerator.is_main_process:
            self.pool.add(samples)
        self.accelerator.wait_for_everyone()
        self.pool.reload()
        labelled = int((self.pool.table(1).label >= 0).sum())
        self.data_report["left_out"] = len(samples) - labelled
        if labelled < len(samples):
            logger.warning(
                f"{len(samples) - labelled} of {len(samples)} completions are left out: they have no score or "
                "feedback, or nothing tells them from the others of their prompt."
            )
        return labelled

    def too_long(self, dataset: Dataset, name: str, condition: Condition | None = None) -> list[int]:
        """Return the rows whose prompt leaves no room for a completion under the condition, by default that of the run.

        A warning says that they are left out.
        """
        limits = self.context_limits() | {"max_completion_length": self.args.max_completion_length}
        conditioned = rounds.ConditionedPrompts(condition or self.condition, self.encode, self.room())
        return rounds.prompts_without_room(dataset, conditioned, name=name, limits=limits)

    def get_train_dataloader(self) -> Any:
        """Trainer's loader over the draws of a round, in their order."""
        return self.training_loader(self.rows, torch.utils.data.SequentialSampler)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of one optimiser step.

        Each carries ``step_tokens``, by which the sum over its completion tokens is divided: the completion tokens of
        the step over its micro-batches on all processes. Trainer takes the mean over these, so that the step has the
        mean over its tokens.
        """
        if self.no_signal_left:  # an epoch without a batch is Trainer's last
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["completion_mask"].sum() for batch in batches)
        total = self.accelerator.gather(torch.as_tensor(tokens, device=device)).sum()
        for batch in batches:
            batch["step_tokens"] = total / (len(batches) * self.accelerator.num_processes)
        return batches, total

    # -------------------------------------------------------------------------------------------------------- rounds

    def begin_round(self, number: int) -> None:
        """Make a round, unless the pool has it; then set what is drawn from the pool, and log it."""
        speed: dict[str, float] | None = {}
        if self.online:
            speed = self.make_round(number)
            if speed is None:
                return
        else:
            self.pool.reload()
        through = number if self.online else 1
        table = self.pool.table(through)
        draws, labels = self.pool.draws(self.rows.length, seed=(self.args.seed, number), through=through)
        self.rows.set_draws(draws, labels, through)
        if not self.was_logged(number) and (self.online or number == 1):
            self._log_round(number, table, through, speed)

    def best_condition(self, through: int | None = None) -> Condition:
        """Return the condition that asks for the best; of a judge's words, those that the best samples were given."""
        return rounds.best_condition(self.condition, self.pool, through)

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Return the mean loss over the completion tokens of a batch.

        In training the batch carries what makes the step's mean exact (see :meth:`get_batch_samples`), so that
        ``num_items_in_batch`` is not needed and an override may drop it.
        """
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: no logits are built. Read the logged metrics.")
        if self.model.training and self.has_reference and self.reference_is_proven is False:
            self._prove_reference_on(model, inputs)

        ref_hidden, ref_head, ref_logits = None, (None, None), {}
        if self.has_reference:
            unconditioned = rounds.without_condition(inputs)
            with self.scoring_by(reference=True) as reference:
                ref_hidden = completion_objective(reference, unconditioned, lambda h, *_: h, layout=self.layout)
                ref_head = head_parameters(reference.get_output_embeddings())
                ref_logits = {"ref_scale": logit_scale(reference), "ref_softcap": logit_softcap(reference)}

        def objective(hidden, labels, weight, bias, scale, softcap):
            with whole(*ref_head) as (ref_weight, ref_bias):
                return token_loss(
                    hidden,
                    weight,
                    bias,
                    labels,
                    reference=(ref_hidden, ref_weight, ref_bias) if self.has_reference else None,
                    scale=scale,
                    softcap=softcap,
                    kl_coef=self.kl_coef.value,
                    entropy_coef=self.entropy_coef.value,
                    kl_direction=self.args.kl_direction,
                    outside=tuple(self.condition_ids),
                    **ref_logits,
                )

        terms = completion_objective(model, inputs, objective, layout=self.layout)
        inputs = beside(terms.loss, inputs)
        if self.model.training:
            self._add_metrics(terms, inputs)
        return terms.loss / inputs.get("step_tokens", inputs["completion_mask"].sum())

    def _add_metrics(self, terms: Any, inputs: dict[str, Tensor]) -> None:
        """Record per-token means over all processes."""
        parts = [terms.nll.sum(), terms.kl.sum(), terms.entropy.sum(), terms.nll.new_tensor(len(terms.nll))]
        parts += [inputs["attention_mask"].sum().to(terms.nll), inputs["valid"].sum().to(terms.nll)]
        sums = self.accelerator.gather(torch.stack(parts).double()[None]).sum(0)
        nll, kl, entropy, n, _, _ = sums.tolist()
        self.count_tokens(sums[4])
        metrics = {"nll": nll / n, "entropy": entropy / n, "entropy_coef": self.entropy_coef.value}
        if self.has_reference:
            metrics |= {"kl": kl / n, "kl_coef": self.kl_coef.value}
        self.record(metrics, training=True, totals={"num_tokens": self.trained_tokens})
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums

    def adapt_coefficients(self) -> None:
        """Adapt the coefficients once for an optimiser step, however it is divided into micro-batches."""
        if self._step_sums is None:
            return
        _, kl, entropy, n, _, rows = self._step_sums.tolist()
        self._step_sums = None
        self.entropy_coef.update(entropy / n, n=int(rows))
        if self.has_reference:
            self.kl_coef.update(kl / n, n=int(rows))

    # ----------------------------------------------------------------------------------------------------- reference

    def _prove_reference_on(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Compare policy and reference on prompts without condition."""
        batch = rounds.without_condition(inputs)
        with self.scoring_by(reference=True) as reference_model:
            reference = self._token_logps(reference_model, batch)
        if self._first_row is None:
            first = batch["attention_mask"][0].bool()
            completion = batch["completion_mask"][0].bool()
            self._first_row = {
                "prompt_ids": batch["input_ids"][0][first & ~completion].tolist(),
                "completion_ids": [batch["input_ids"][0][completion].tolist()],
                "scores": [0.0],
            }
        policy, lengths = self.policy_logps_of(batch)
        self.prove_reference(policy, reference, lengths, batch)

    def policy_logps_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs of the first completion tokens, each by itself."""
        with self.scoring_by() as model:
            found = self._token_logps(model, batch)
        return found, torch.ones_like(found)

    def _token_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return log-probs of the first completion tokens, over the vocabulary that policy and reference have."""

        def log_probs(hidden, labels, weight, bias, scale, softcap):
            logits = nn.functional.linear(hidden[:PROBED], weight, bias).float() * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logits[:, [i for i in self.condition_ids if i < logits.size(1)]] = -torch.inf
            return logits.log_softmax(-1).gather(1, labels[:PROBED, None])[:, 0]

        return completion_objective(model, batch, log_probs, layout=self.layout)

    def batch_of(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a group as a batch on the accelerator."""
        return self.on_device(GroupCollator(self.processing_class.pad_token_id)([group]))

    def reference_group(self) -> dict[str, Any] | None:
        """Return the first row that was trained on, without its condition."""
        return self._first_row if self.has_reference else None

    def reference_logps_of(self, group: dict[str, Any]) -> list[float]:
        """Log-prob of a group's completion under the reference."""
        with self.scoring_by(reference=True) as model:
            found = completion_logps(model, self.batch_of(group), layout=self.layout, token_stats=False)
        return found.logps[0].tolist()

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure how the condition controls the model.

        Online: sample ``num_generations`` completions of each prompt under each condition and under none;
        ``<prefix>_reward_given/<condition>`` is their mean reward, ``.../se`` its standard error over prompts.

        Offline: completions that have scores or feedback; ``<prefix>_nll/<label>_given/<condition>`` is their mean
        negative log-likelihood per token under the best and the worst condition, ``<prefix>_nll/<label>`` under their
        own.
        """
        return self.evaluate_samples(eval_dataset, metric_key_prefix)

    def measure(self, dataset: Dataset) -> dict[str, float]:
        """Return the rewards under each condition, or the likelihoods of scored completions."""
        if self.online:
            self.reward_log = RewardLog(has_table=False)
            return measures.reward_metrics(self.rewards_given(dataset)) | self.reward_log.take_metrics()
        samples, _ = self._read_scored(dataset, self.best_condition())
        return measures.likelihood_metrics(samples, self.best_condition(), self.nll_given)

    def rewards_given(self, dataset: Dataset, *, conditions: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return the mean reward of each prompt's completions under each condition.

        A prompt's seeds are the same under every condition and in every evaluation (not with ``use_vllm``).

        Args:
            conditions: names of conditions, ``"nothing"`` for none; by default all.

        Returns:
            Name -> (rows,), NaN for prompts without a scored completion, and for prompts that are too long (a warning
            is logged).
        """
        with self.unchanged_weights():
            return measures.rewards_given(self, dataset, conditions)

    def nll_given(
        self, samples: Sequence[Sample], texts: Sequence[str | None], *, reference: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score completions, each under a condition or none.

        Args:
            reference: by the reference in place of the policy.

        Returns:
            (N,) negative log-likelihoods in nats, summed over the completion's tokens, and (N,) tokens.
        """
        prompts = [
            self.encode(s.prompt if text is None else self.condition.apply(s.prompt, text))
            for s, text in zip(samples, texts, strict=True)
        ]
        with self.sampling_from(reference=reference) as model:
            return measures.negative_log_likelihoods(self, model, prompts, [s.completion_ids for s in samples])

    def _log_round(self, number: int, table: Table, through: int, speed: dict[str, float]) -> None:
        logs = measures.round_metrics(number, table, self.condition, online=self.online) | speed
        newest = measures.newest_samples(number, table, online=self.online)
        if self.online and self.condition.free_words:
            samples = self.pool.read(np.flatnonzero(newest & (table.label >= 0)), number)
            asked_with = self.best_condition(number - 1) if number > 1 else None
            counts = measures.count_cut_words(
                number, samples, self.conditioned, asked_with, warn=not self._cut_words_told
            )
            self._cut_words_told = self._cut_words_told or any(counts.values())
            logs |= counts
        some = np.flatnonzero(newest)[:: max(1, int(newest.sum()) // 512)]
        logs |= self.reward_log.take_metrics()
        logs |= measures.text_metrics(self.pool.read(some, through), self.nll_given if self.has_reference else None)
        self.log_measured(logs)
        if self.args.should_save:
            measures.draw_round(number, table, self.condition, self.args.output_dir)

    # --------------------------------------------------------------------------------------------- resuming and saving

    @property
    def state_files(self) -> tuple[str, ...]:
        """The one file that :meth:`save_own_state` writes."""
        return (STATE_FILE,)

    def begin_training(self, *, going_on: bool) -> None:
        """Check the pool, and forget what an earlier call has summed up."""
        super().begin_training(going_on=going_on)
        self._step_sums = None

    def save_own_state(self, folder: Path) -> None:
        """Write the coefficients, the length of a round and the condition."""
        if not self.args.should_save:
            return
        state = {"kl_coef": self.kl_coef.state_dict(), "entropy_coef": self.entropy_coef.state_dict()}
        state |= {"steps_per_round": self.steps_per_round, "condition": self.condition.spec}
        with atomic_write(folder / STATE_FILE) as file:
            file.write(json.dumps(state).encode())

    def load_state(self, checkpoint: Path) -> None:
        """Read what :meth:`save_own_state` has written.

        Raises:
            ValueError: another condition, or rounds of another length.
        """
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if not state["condition"].items() <= self.condition.spec.items():
            raise ValueError(
                f"{checkpoint} was trained under {state['condition']}, and this run's condition is "
                f"{self.condition.spec}. Use the same condition, or start anew from its weights."
            )
        self.check_steps_of_round(checkpoint, state.get("steps_per_round", self.steps_per_round))
        self.condition = of_checkpoint(state["condition"])
        self.kl_coef.load_state_dict(state["kl_coef"])
        self.entropy_coef.load_state_dict(state["entropy_coef"])

    def finish_saving(self, folder: Path) -> None:
        """Save the condition with the model: ``Condition.load(output_dir).apply_best(prompt)`` asks for the best."""
        super().finish_saving(folder)
        if self.args.should_save:
            self.best_condition().save(folder)

    def functions(self) -> dict[str, dict[str, str | None]]:
        """Return the condition and, where completions are sampled, the reward."""
        kind = self.condition.kind
        return {"condition": {kind: CONDITIONS.hashes.get(kind)}, **self.reward_function()}

    def objective(self) -> dict[str, Any]:
        """Condition and coefficients."""
        args = self.args
        found = {"condition": json.dumps(self.condition.spec), "entropy_coef": args.entropy_coef}
        found |= {"kl_coef": args.kl_coef, "kl_direction": args.kl_direction if args.kl_coef else None}
        found |= {name: getattr(args, name) for name in ("kl_target", "entropy_target")}
        return {name: value for name, value in found.items() if value is not None}

    def asked_with(self) -> tuple[str, str, bool]:
        """Return the kind of the condition, the text that stands for the best, and whether it has tokens."""
        condition = self.best_condition()
        try:
            best = condition.best
        except ValueError:  # a judge's words, before the first round
            best = "words of the judge, once there are some"
        return condition.kind, best, bool(condition.tokens)


class _AdaptsCoefficients(BeginsRounds):
    """Begin the rounds, and adapt the coefficients after each optimiser step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.adapt_coefficients()


class AdaptiveCoefficient:
    r"""A proportional controller in log space: it holds a measured quantity near its target.

    .. math:: e = \mathrm{clip}\Big( \frac{x - x^*}{x^*}, -0.2, 0.2 \Big), \qquad
        c \leftarrow c \, \Big( 1 + s\, e\, \frac{n}{N} \Big)

    Ziegler et al., arXiv:1909.08593, section 2.2, where x is the KL, s = 1 and N a horizon in samples: one update over
    N samples or N updates over one each move c by up to 20%. ``sign`` is s: 1 for the coefficient of a penalty, which
    grows while the quantity is above its target (KL), -1 for that of a bonus, which grows while it is below (entropy).

    Args:
        value: the first value, at least 0; from 0 it never moves, so 0 takes no target.
        target: x*, above 0, in the unit in which the quantity is measured: nats per token for KL and entropy. None: the
            coefficient is constant.
        horizon: N, in samples, above 0.
        sign: 1 or -1.

    Raises:
        ValueError: arguments not as above; from ``update``, a measurement that is not finite, or more samples at once
            than the factor stays positive for (5 N).

    >>> kl_coef = AdaptiveCoefficient(0.05, target=0.1, horizon=1000)
    >>> round(kl_coef.update(0.11, n=500), 5)  # 10% too far from the reference, half a horizon: 5% more
    0.0525
    """

    def __init__(self, value: float, *, target: float | None = None, horizon: float, sign: int = 1) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"value is {value}, expected a finite number of at least 0.")
        if target is not None and not (math.isfinite(target) and target > 0):
            raise ValueError(f"target is {target}, expected a number above 0 (nats per token), or None for a constant.")
        if target is not None and value == 0:
            raise ValueError("value is 0 and target is set: a factor never moves 0. Start above 0, or set no target.")
        if not horizon > 0:
            raise ValueError(f"horizon is {horizon}, expected a number of samples above 0.")
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign}, expected 1 (penalty) or -1 (bonus).")
        self.value, self.target, self.horizon, self.sign = float(value), target, horizon, sign

    def update(self, current: float, *, n: int) -> float:
        """Return the new value, after ``n`` samples over which the quantity was ``current`` on average."""
        if self.target is None:
            return self.value
        if not math.isfinite(current):
            raise ValueError(f"The measured quantity is {current}, expected a finite number of nats per token.")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n is {n}, expected from 0 to below 5 x horizon = {5 * self.horizon}: raise the horizon.")
        error = min(max((current - self.target) / self.target, -0.2), 0.2)
        self.value *= 1 + self.sign * error * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


def freeze_lower_layers(model: PreTrainedModel, ratio: float, adapter: bool) -> None:
    """Freeze all layers but a share of them, from the top.

    Raises:
        ValueError: an adapter is trained, or the model has no list of layers.
    """
    if adapter:
        raise ValueError(
            "unfrozen_layers_ratio freezes layers of a whole model, and here an adapter is trained. Give LoRA its "
            "layers with layers_to_transform."
        )
    decoder = model.get_decoder()
    layers = next(
        (m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers),
        None,
    )
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that unfrozen_layers_ratio could be a share of."
        )
    for layer in layers[: len(layers) - max(1, round(ratio * len(layers)))]:
        layer.requires_grad_(False)


def fingerprint_of_samples(samples: Sequence[Sample], condition: Condition) -> str:
    """Return a short hash of scored samples under a condition, which names their pool."""
    digest = hashlib.sha256(json.dumps(condition.spec, sort_keys=True).encode())
    for s in samples:
        digest.update(repr((s.prompt, s.completion_ids, s.score, s.feedback)).encode())
    return digest.hexdigest()[:12]
