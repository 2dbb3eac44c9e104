"""ConditionalTrainer: trl.SFTTrainer on completions conditioned on how good they are. Wiring only."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
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
from transformers.utils import logging
from trl import SFTTrainer

from contrastive_align.conditions.conditions import Condition, resolve_condition
from contrastive_align.conditions.tokens import add_condition_tokens, with_trainable_rows
from contrastive_align.models import load_tokenizer, resolve_start, with_pad_token
from contrastive_align.models.layout import set_layout
from contrastive_align.models.loading import check_output_dir
from contrastive_align.models.logps import completion_objective
from contrastive_align.models.token_loss import token_loss
from contrastive_align.trainers.coefficients import AdaptiveCoefficient
from contrastive_align.trainers.compiling import compile_layers
from contrastive_align.trainers.conditional_checkpoints import ConditionalCheckpointsMixin
from contrastive_align.trainers.conditional_config import ConditionalConfig
from contrastive_align.trainers.conditional_data import ConditionalDataMixin
from contrastive_align.trainers.conditional_evaluation import ConditionalEvaluationMixin
from contrastive_align.trainers.conditional_inputs import (
    feature_of,
    freeze_lower_layers,
    frozen_copy,
    keep_as_reference,
    keep_rows_precise,
    refuse_given,
)
from contrastive_align.trainers.conditioned_rows import ConditionedCollator, bare
from contrastive_align.trainers.memory import KeepsFreedMemory
from contrastive_align.trainers.round_metrics import RoundMetricsMixin
from contrastive_align.trainers.rounds import RoundsMixin
from contrastive_align.trainers.server_sampling import check_sampler
from contrastive_align.trainers.vllm_sampling import VLLMSampler, check_tokens, check_use
from contrastive_align.trl_seam import create_model_from_path, disable_dropout_in_model, get_config_model_id


logger = logging.get_logger(__name__)

AnyDataset = Dataset | IterableDataset


class ConditionalTrainer(
    ConditionalDataMixin,
    ConditionalEvaluationMixin,
    RoundMetricsMixin,
    RoundsMixin,
    ConditionalCheckpointsMixin,
    KeepsFreedMemory,
    SFTTrainer,
):
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
        model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, optimizer_cls_and_kwargs,
            quantization_config, peft_config: as in TRL. A model id may also be a LoRA adapter.
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

    # compute_loss divides by the tokens of the whole optimiser step itself.
    loss_is_scaled_for_ga = True

    _tag_names = ("trl", "contrastive-align", "conditional")
    _name = "Conditional training"
    _paper = {  # noqa: RUF012 (TRL's form)
        "title": "Quark: Controllable Text Generation with Reinforced Unlearning",
        "id": "2205.13636",
        "citation": textwrap.dedent("""\
            @inproceedings{lu2022quark,
                title        = {{Quark: Controllable Text Generation with Reinforced Unlearning}},
                author       = {Ximing Lu and Sean Welleck and Jack Hessel and Liwei Jiang and Lianhui Qin and Peter West and Prithviraj Ammanabrolu and Yejin Choi},
                year         = 2022,
                booktitle    = {Advances in Neural Information Processing Systems 35},
                eprint       = {2205.13636},
                archivePrefix = {arXiv},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ConditionalConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
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
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = ConditionalConfig(f"{model_id.split('/')[-1]}-conditional")
        elif not isinstance(args, ConditionalConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, expected a ConditionalConfig (it takes SFTConfig's options)."
            )
        refuse_given(
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            formatting_func=formatting_func,
        )
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError("processing_class is a vision processor, expected a tokenizer: prompts are text here.")
        if not isinstance(train_dataset, Dataset):
            raise TypeError(
                f"train_dataset is a {type(train_dataset).__name__}, expected a datasets.Dataset: a round takes "
                "prompts in an order of its own, which a stream does not have."
            )
        self.condition = resolve_condition(condition)
        self.judge, self.feature = judge, feature_of(reward_funcs, judge, args)
        self.sampler = sampler
        self.online = judge is not None or self.feature is not None
        if args.use_vllm:
            check_use(args, online=self.online, sampler=sampler, quantised=quantization_config is not None)

        args = copy.copy(args)
        model, processing_class = self._load(model, processing_class, args, quantization_config, model_id)
        with_pad_token(processing_class)
        adapter = peft_config is not None or is_peft_model(model)
        check_output_dir(args.output_dir, adapter=adapter)
        if model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is an encoder-decoder, expected a causal language model.")
        self.has_reference = args.kl_coef != 0
        self.reference = frozen_copy(model) if self.has_reference and not adapter else None
        if self.has_reference and is_peft_model(model):
            keep_as_reference(model)
        peft_config = self._give_tokens(model, processing_class, peft_config, args)
        if args.unfrozen_layers_ratio < 1:
            freeze_lower_layers(model, args.unfrozen_layers_ratio, adapter)
        if args.disable_dropout:
            disable_dropout_in_model(model)

        super().__init__(
            model=model,
            args=args,
            data_collator=ConditionedCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            peft_config=peft_config,
        )
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            keep_rows_precise(self.model)
        if self.reference is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "Full fine-tuning with DeepSpeed or FSDP would need a sharded copy of the reference, which is not "
                    "supported. Use LoRA (peft_config), or kl_coef=0, which needs no reference."
                )
            self.reference.to(self.accelerator.device)
        if self.aux_loss_enabled:
            raise ValueError("A router loss has no place in this loss. Set router_aux_loss_coef=0.")
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        models += [] if self.reference is None else [self.reference]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.layout = set_layout(models, args.layout, sharded=sharded, autocast=args.bf16 or args.fp16)
        compile_layers(self, models)
        self.kl_coef = AdaptiveCoefficient(args.kl_coef, target=args.kl_target, horizon=args.coef_horizon)
        self.entropy_coef = AdaptiveCoefficient(
            args.entropy_coef, target=args.entropy_target, horizon=args.coef_horizon, sign=-1
        )
        self._step_sums: Tensor | None = None  # of the optimiser step that is being made
        if sampler is not None:
            check_sampler(self)
        self._prepare_pool()
        self.vllm = VLLMSampler(self) if args.use_vllm else None
        self.add_callback(_Rounds(self))

    def _load(
        self, model: Any, processing_class: Any, args: ConditionalConfig, quantization_config: Any, model_id: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as an object, since tokens may come to it before TRL wraps it."""
        source, revision = model_id, (args.model_init_kwargs or {}).get("revision")
        given = isinstance(model, str)
        if given:
            start = resolve_start(
                model,
                output_dir=args.output_dir,
                model_init_kwargs=args.model_init_kwargs,
                quantization_config=quantization_config,
                trust_remote_code=args.trust_remote_code,
                allow_pickled_adapter=args.allow_pickled_adapter,
            )
            kwargs = dict(args.model_init_kwargs or {})
            if start.model != model:
                logger.warning(f"Start and reference: {start.description}")
                kwargs.pop("revision", None)
                revision = None
            source, model = start.tokenizer_source, start.model
        if processing_class is None:
            processing_class = load_tokenizer(source, revision=revision, trust_remote_code=args.trust_remote_code)
        if args.use_vllm:
            check_tokens(self.condition, processing_class)
        if isinstance(model, str):
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
            if args.distributed_state.num_processes > 1:
                kwargs["device_map"] = None  # as TRL: each process holds its own copy, on its own device
            kwargs.setdefault("trust_remote_code", args.trust_remote_code)
            model = create_model_from_path(model, **kwargs)
        if given:
            args.model_init_kwargs = None
        return model, processing_class

    def _give_tokens(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, peft_config: Any, args: ConditionalConfig
    ) -> Any:
        tokens = self.condition.tokens
        self.condition_ids: list[int] = []
        if not tokens:
            return peft_config
        if args.use_vllm:
            adapter = peft_config is not None or is_peft_model(model)
            check_tokens(self.condition, tokenizer, adapter=adapter, rows=len(model.get_input_embeddings().weight))
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
        if peft_config is None:
            return None
        return with_trainable_rows(peft_config, model, self.condition_ids)

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of one micro-batch: the sum over its completion tokens, over the tokens of the optimiser step."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: no logits are built. Read the logged metrics.")
        reference = None
        if self.has_reference:
            with self.sampling(reference=True) as reference_model:
                reference = completion_objective(reference_model, bare(inputs), _as_it_is, layout=self.layout)
        tokens = inputs["completion_mask"].sum() if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes

        def objective(hidden, labels, weight, bias, scale, softcap):
            options = {}
            if reference is not None:
                ref_hidden, _, ref_weight, ref_bias, ref_scale, ref_softcap = reference
                options = {
                    "reference": (ref_hidden, ref_weight, ref_bias),
                    "ref_scale": ref_scale,
                    "ref_softcap": ref_softcap,
                }
            return token_loss(
                hidden,
                weight,
                bias,
                labels,
                scale=scale,
                softcap=softcap,
                kl_coef=self.kl_coef.value,
                entropy_coef=self.entropy_coef.value,
                kl_direction=self.args.kl_direction,
                outside=tuple(self.condition_ids),
                **options,
            )

        terms = completion_objective(model, inputs, objective, layout=self.layout)
        self._note(terms, inputs)
        return terms.loss * processes / tokens

    def _note(self, terms: Any, inputs: dict[str, Tensor]) -> None:
        """Per-token means over all processes."""
        if not self.model.training:
            return
        parts = [terms.nll.sum(), terms.kl.sum(), terms.entropy.sum(), terms.nll.new_tensor(len(terms.nll))]
        parts += [inputs["attention_mask"].sum().to(terms.nll), inputs["valid"].sum().to(terms.nll)]
        sums = self.accelerator.gather(torch.stack(parts).double()[None]).sum(0)
        nll, kl, entropy, n, seen, _ = sums.tolist()
        self._total_train_tokens += int(seen)
        metrics = self._metrics["train"]
        metrics["nll"].append(nll / n)
        metrics["entropy"].append(entropy / n)
        metrics["entropy_coef"].append(self.entropy_coef.value)
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.has_reference:
            metrics["kl"].append(kl / n)
            metrics["kl_coef"].append(self.kl_coef.value)
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums

    def adapt_coefficients(self) -> None:
        """Once for an optimiser step, however it is divided into micro-batches."""
        if self._step_sums is None:
            return
        _, kl, entropy, n, _, rows = self._step_sums.tolist()
        self._step_sums = None
        self.entropy_coef.update(entropy / n, n=int(rows))
        if self.has_reference:
            self.kl_coef.update(kl / n, n=int(rows))


class _Rounds(TrainerCallback):
    def __init__(self, trainer: ConditionalTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_round(state.global_step // self.trainer.steps_per_round + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.adapt_coefficients()


def _as_it_is(*values: Any) -> tuple[Any, ...]:
    return values
