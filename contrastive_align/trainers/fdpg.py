"""FDPGTrainer: trl.RLOOTrainer towards a target. Wiring only; the mathematics is in losses/ and targets/."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging
from trl import RLOOTrainer

from contrastive_align.data import GroupCollator
from contrastive_align.losses import RunningLogZ, fdpg, mean_slope
from contrastive_align.models import completion_logps, load_tokenizer, with_pad_token
from contrastive_align.models.layout import set_layout
from contrastive_align.sampling.decode import draw, seed_of
from contrastive_align.targets import Target
from contrastive_align.trainers.card import CardMixin
from contrastive_align.trainers.checkpoints import checkpoint_to_resume
from contrastive_align.trainers.compiling import compile_layers
from contrastive_align.trainers.distribution_metrics import distribution_metrics
from contrastive_align.trainers.encoder_decoder import (
    EncoderDecoderCollator,
    add_encoder_decoder_head,
    decoder_start_token,
    encoder_decoder_logps,
    load_encoder_decoder,
    refuse_for_encoder_decoder,
    without_functional_dropout,
)
from contrastive_align.trainers.fdpg_baseline import WindowBaseline
from contrastive_align.trainers.fdpg_config import FDPGConfig
from contrastive_align.trainers.fdpg_inputs import (
    EpochSampler,
    check_enough_prompts,
    distinct_prompts,
    never_called,
    target_of,
)
from contrastive_align.trainers.fdpg_state import TARGET_FILE, load_state, save_state, state_file
from contrastive_align.trainers.memory import KeepsFreedMemory
from contrastive_align.trainers.modes import evaluation_mode
from contrastive_align.trainers.proposal import kept_proposal
from contrastive_align.trainers.vllm_sampling import base_kept
from contrastive_align.trl_seam import add_fused_lm_head, disable_dropout_in_model, get_config_model_id


logger = logging.get_logger(__name__)

FIT_SAMPLES_PER_PROMPT = 256

# What a feature is given by these names is not the dataset's column.
_NOT_COLUMNS = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)

AnyDataset = Dataset | IterableDataset


class FDPGTrainer(CardMixin, KeepsFreedMemory, RLOOTrainer):
    r"""Train a language model towards a target distribution under an f-divergence, from its own samples.

    .. math:: \nabla D_f(\pi \| p) = E_{y \sim q}\Big[\frac{\pi(y)}{q(y)}\, f'\Big(\frac{\pi(y)}{p(y)}\Big)\,
        \nabla \log \pi(y)\Big], \qquad p(y|c) = P(y|c) / Z_c

    f-DPG, arXiv:2302.08215. DPG, GDC and CDPG are ``divergence="kl"``; RLHF with a KL penalty is
    ``divergence="reverse_kl"`` on ``Target.from_reward``. A subclass of :class:`trl.RLOOTrainer` that takes its
    arguments: prompts in, ``num_generations`` samples each, features by TRL's reward functions.

    The base a(y|c) of the target is the model as it was given: its adapter off (LoRA), or a frozen copy. Causal models
    continue the prompt; encoder-decoder models (T5, BART, Marian) read it in the encoder.

    ```python
    from contrastive_align import FDPGConfig, FDPGTrainer
    from contrastive_align.targets import Constraint, Target

    target = Target([Constraint({"contains": "please"}, moment=0.5)])
    trainer = FDPGTrainer(model, args=FDPGConfig(output_dir="out"), train_dataset=prompts, target=target)
    trainer.train()  # finds the target's lambdas first, from samples of the base
    ```

    Args:
        model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config,
            peft_config: as in TRL.
        reward_funcs: as in TRL; with no ``target``, theirs is base * exp(weighted sum of rewards / args.beta).
        target: where to go. If its lambdas are unknown they are fitted when training starts.

    Raises:
        ValueError: an option or model this trainer does not support, with the way out.
        InfeasibleMoment: a moment that no lambda reaches on samples of the base.
        FeatureError: a feature that raises, or answers with something else than a number for each completion.
    """

    _tag_names = ("trl", "contrastive-align", "fdpg")
    _name = "f-DPG"
    _paper = {  # noqa: RUF012 (TRL's form)
        "title": "Aligning Language Models with Preferences through f-divergence Minimization",
        "id": "2302.08215",
        "citation": textwrap.dedent("""\
            @inproceedings{go2023aligning,
                title        = {{Aligning Language Models with Preferences through f-divergence Minimization}},
                author       = {Dongyoung Go and Tomasz Korbak and Germ{\\'{a}}n Kruszewski and Jos Rozen and Nahyeon Ryu and Marc Dymetman},
                year         = 2023,
                booktitle    = {International Conference on Machine Learning},
                eprint       = {2302.08215},
                archivePrefix = {arXiv},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: FDPGConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
        *,
        target: Target | None = None,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FDPGConfig(f"{model_id.split('/')[-1]}-FDPG")
        elif not isinstance(args, FDPGConfig):
            raise TypeError(f"args is a {type(args).__name__}, expected an FDPGConfig (it takes RLOOConfig's options).")
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError("processing_class is a vision processor, expected a tokenizer: prompts are text here.")
        if reward_processing_classes is not None:
            raise ValueError(
                "reward_processing_classes is not read here. Give the reward model as a feature with its tokenizer: "
                "resolve_feature({'reward_model': model}, tokenizer=tokenizer)."
            )
        check_enough_prompts(train_dataset, args)
        self.target = target_of(target, reward_funcs, args)
        if processing_class is None:
            source = model if isinstance(model, str) else get_config_model_id(model.config)
            processing_class = load_tokenizer(source, trust_remote_code=args.trust_remote_code)
        with_pad_token(processing_class)

        # TRL would load its reference from the hub id, even where the model was changed since, and only for beta != 0;
        # the base of the target is the model as it was given.
        without_reference = copy.copy(args)
        without_reference.beta, without_reference.reward_weights = 0.0, None
        if isinstance(model, str) and (loaded := load_encoder_decoder(model, args, quantization_config)) is not None:
            model, quantization_config, without_reference.model_init_kwargs = loaded, None, None
        super().__init__(
            model=model,
            reward_funcs=[never_called],
            args=without_reference,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.args.beta, self.args.reward_weights = args.beta, args.reward_weights
        self.args.model_init_kwargs = args.model_init_kwargs
        if self.aux_loss_enabled:
            raise ValueError("A router loss has no place in the target. Set router_aux_loss_coef=0.")
        if args.disable_dropout:
            without_functional_dropout(self.model)
        if self.use_vllm and is_peft_model(self.model):
            self._keep_base_over_syncs()
        self.base_model = self._frozen_copy()
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        models += [] if self.base_model is None else [self.base_model]
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        pad = (self._tokenizer.pad_token_id, self.args.pad_to_multiple_of)
        if self.is_encoder_decoder:
            refuse_for_encoder_decoder(args, sharded=sharded)
            for each in models:
                add_encoder_decoder_head(each)
            self.layout, self._collate = "padded", EncoderDecoderCollator(*pad, decoder_start_token(models[0]))
        else:
            self.layout = set_layout(models, args.layout, sharded=sharded, autocast=args.bf16 or args.fp16)
            self._collate = GroupCollator(*pad)
        compile_layers(self, models)
        self.log_z = RunningLogZ()
        self.baseline = WindowBaseline(args.baseline_window) if args.baseline == "window" else None
        self.kept_proposal = kept_proposal(args, sharded=sharded)
        self._evaluations = 0

    def _keep_base_over_syncs(self) -> None:
        hand_over = self.vllm_generation.sync_weights

        def sync_weights() -> None:
            with base_kept(self.model):
                hand_over()

        self.vllm_generation.sync_weights = sync_weights

    def _frozen_copy(self) -> PreTrainedModel | None:
        """The base, where it is not the policy without its adapter."""
        if is_peft_model(self.model):
            return None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "Full fine-tuning with DeepSpeed or FSDP would need a sharded copy of the base, which is not "
                "supported yet. Use LoRA (peft_config), whose base is the model with its adapter off."
            )
        base = copy.deepcopy(self.model)
        base.__dict__.pop("forward", None)  # TRL's head, which would call the policy's forward
        add_fused_lm_head(base)
        disable_dropout_in_model(base)
        return base.eval().requires_grad_(False)

    # -------------------------------------------------------------------------------------------------------- target

    def fit_target(self) -> None:
        """Find the target's lambdas from samples of the base, and write them to ``output_dir``/target.json."""
        # E_p[phi|c] of one sample is that sample's phi whatever lambda is: each prompt needs many.
        prompts = distinct_prompts(self.train_dataset, max(1, self.args.fit_samples // FIT_SAMPLES_PER_PROMPT))
        per_prompt = math.ceil(self.args.fit_samples / len(prompts))
        ids = self._prompt_ids([row["prompt"] for row in prompts])
        with self._sampling(base=True) as model:
            drawn = draw(
                model, ids, per_prompt=per_prompt, seeds=self._seeds("fit", range(len(ids))), **self._draw_options()
            )
        phi = self._features(prompts, drawn.completion_ids)
        by_prompt = phi.view(len(prompts), per_prompt, -1)
        fit = self.target.fit(by_prompt, min_ess=self.args.fit_min_ess, correct_bias=True)
        each = zip(self.target.names, self.target.lambdas, self.target.pointwise, strict=True)
        found = [f"always {name}" if always else f"lambda({name}) = {value:.3f}" for name, value, always in each]
        if any(self.target.pointwise):
            found.append(f"{fit.samples} satisfy what always holds")
        logger.warning(
            f"Target fitted on {phi.size(0)} samples of the base: {', '.join(found)}; "
            f"effective sample size {fit.ess:.0f}."
        )
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.target.save(Path(self.args.output_dir) / TARGET_FILE)

    def _features(self, rows: list[dict[str, Any]], completion_ids: list[list[list[int]]]) -> Tensor:
        """phi (C * K, J) of K completions of each row."""
        k = len(completion_ids[0])
        columns = {name: [row[name] for row in rows for _ in range(k)] for name in rows[0] if name not in _NOT_COLUMNS}
        flat = [ids for group in completion_ids for ids in group]
        texts = self._tokenizer.batch_decode(flat, skip_special_tokens=True)
        conversational = not isinstance(rows[0]["prompt"], str)
        return self.target.features(
            [row["prompt"] for row in rows for _ in range(k)],
            [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
            completion_ids=flat,
            trainer_state=self.state,
            log_extra=self._log_completion_extra,
            log_metric=self._log_metric,
            **columns,
        )

    # ------------------------------------------------------------------------------------------------------- sampling

    def _prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        prompt_ids, *_ = self._tokenize_prompts(prompts)
        start = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self.eos_token_ids[0]
        prompt_ids = [list(ids) or [start] for ids in prompt_ids]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            needed = (max if self.is_encoder_decoder else sum)((len(ids), self.max_completion_length))
            if context and needed > context:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens and max_completion_length={self.max_completion_length} exceed the "
                    f"model's context of {context}: {str(prompt)[:80]!r}. Shorten or leave out the prompt, or lower "
                    "max_completion_length."
                )
        return prompt_ids

    def _draw_options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_completion_length,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": self._tokenizer.pad_token_id,
        }

    def _seeds(self, what: Any, places: Any) -> list[int]:
        """A seed for each group: the same samples on any number of processes, and after resuming."""
        return [seed_of(self.args.seed, what, place) for place in places]

    @contextlib.contextmanager
    def _sampling(self, base: bool = False) -> Iterator[PreTrainedModel]:
        """The policy or the base, to draw or score with: in evaluation mode and in the run's precision."""
        if base and self.base_model is not None:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.base_model
        else:
            with evaluation_mode(self, without_adapter=base) as model:
                yield model

    @property
    def policy(self) -> nn.Module:
        """The model that is trained, without what wraps it for several processes."""
        return self.accelerator.unwrap_model(self.model)

    def _draw(self, prompt_ids: list[list[int]], per_prompt: int, seeds: list[int]):
        """Completions (C, K) of the proposal, their log-probs under it; None where these are still to be computed."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            flat = self._generate_single_turn([ids for ids in prompt_ids for _ in range(per_prompt)], None, {})
            return [flat[i : i + per_prompt] for i in range(0, len(flat), per_prompt)], None
        kept = self.kept_proposal if self.model.training else None
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(self._sampling(base=kept is not None and kept.is_base))
            if kept is not None:
                stack.enter_context(kept.in_place_of(self.policy))
            drawn = draw(model, prompt_ids, per_prompt=per_prompt, seeds=seeds, **self._draw_options())
        return drawn.completion_ids, drawn.logps

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro-batch of whole groups; drawn for ``steps_per_generation`` of them at once, as in TRL."""
        if not self.model.training:
            k = self.num_generations_eval
            self._evaluations += 1
            return self._groups(generation_batch, k, 1, ("eval", self.state.global_step, self._evaluations))[0]
        steps = self.args.steps_per_generation
        if self._step % steps == 0 or self._buffered_inputs is None:
            what = ("train", self._step // steps)
            self._buffered_inputs = self._groups(generation_batch, self.num_generations, steps, what)
        return self._buffered_inputs[self._step % steps]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = EpochSampler
        return sampler

    @torch.no_grad()
    def _groups(self, rows: list[dict[str, Any]], k: int, parts: int, what: Any) -> list[dict[str, Tensor]]:
        """Draw K completions for each prompt, score them under base and target, cut into ``parts`` micro-batches."""
        rows = rows[::k]  # TRL's sampler repeats every prompt K times in a row
        prompt_ids = self._prompt_ids([row["prompt"] for row in rows])
        first = self.accelerator.process_index * len(rows)
        completion_ids, proposal_logps = self._draw(prompt_ids, k, self._seeds(what, range(first, first + len(rows))))
        size = len(rows) // parts
        batches = []
        for i in range(0, len(rows), size):
            groups = zip(prompt_ids[i : i + size], completion_ids[i : i + size], strict=True)
            examples = [{"prompt_ids": p, "completion_ids": c, "scores": [0.0] * k} for p, c in groups]
            batch = self._collate(examples)
            batches.append({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})
        base_logps = torch.cat([self._logps(batch, base=True) for batch in batches])
        policy_logps = proposal_logps
        if proposal_logps is None or (self.kept_proposal is not None and self.model.training):
            policy_logps = torch.cat([self._logps(batch) for batch in batches])
        policy_logps = policy_logps.to(base_logps.device)
        proposal_logps = policy_logps if proposal_logps is None else proposal_logps.to(base_logps.device)
        phi = self._features(rows, completion_ids).view(len(rows), k, -1).to(base_logps.device)
        target_log_scores = self.target.log_scores(base_logps, phi)
        keys = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in prompt_ids]
        log_z = self._log_z_of(keys, target_log_scores - proposal_logps)
        logs = {"policy_logps": policy_logps, "proposal_logps": proposal_logps, "target_log_scores": target_log_scores}
        self._log_groups(rows, completion_ids, phi, keys, base_logps, log_z, **logs)
        more = {"proposal_logps": proposal_logps, "target_log_scores": target_log_scores, "log_z": log_z}
        if self.baseline is not None:
            more["baseline"] = self._window_baseline(log_z, **logs)
        if self.kept_proposal is not None and self.model.training:
            self._compare_proposal(keys, **logs)
        for j, batch in enumerate(batches):
            batch.pop("scores", None)
            batch.update({name: tensor[j * size : (j + 1) * size] for name, tensor in more.items()})
        return batches

    def _log_z_of(self, keys: list[str], log_weights: Tensor) -> Tensor:
        """log Z (B,) of the prompts, these samples counted in; what all processes drew is counted on each of them."""
        if self.model.training:
            everywhere = gather_object(list(zip(keys, log_weights.tolist(), strict=True)))
            self.log_z.add((key, torch.tensor(weights, dtype=torch.float64)) for key, weights in everywhere)
            return self.log_z.of(keys).to(log_weights.device)
        held_out = RunningLogZ()  # of an evaluation nothing is left in the training
        held_out.add(zip(keys, log_weights, strict=True))
        values = [self.log_z[key] if key in self.log_z else held_out[key] for key in keys]
        return torch.tensor(values, dtype=torch.float64, device=log_weights.device)

    def _window_baseline(self, log_z: Tensor, **logs: Tensor) -> Tensor:
        """(B,) what earlier steps say; then these samples are counted in, for the next ones."""
        before = torch.full_like(log_z, self.baseline.value)
        if self.model.training:
            slopes = mean_slope(**logs, log_z=log_z, divergence=self.args.divergence)
            self.baseline.add(self.accelerator.gather(slopes))
        return before

    def _compare_proposal(self, keys: list[str], **logs: Tensor) -> None:
        logs = {name: self.accelerator.gather(tensor) for name, tensor in logs.items()}
        found = self.kept_proposal.compare(self.policy, gather_object(keys), log_z=self.log_z, **logs)
        self._metrics["train"]["proposal/replaced"].append(float(found is not None and found.replaced))
        if found is not None:
            self._metrics["train"][f"proposal/{self.args.proposal_criterion}_gap"].append(found.gap)

    def _logps(self, batch: dict[str, Tensor], base: bool = False) -> Tensor:
        """(B, K) float64, in the layout of training."""
        with self._sampling(base) as model:
            return self._completion_logps(model, batch)

    def _completion_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) float64, with a gradient where one is wanted."""
        if self.is_encoder_decoder:
            return encoder_decoder_logps(model, batch).double()
        return completion_logps(model, batch, layout=self.layout, token_stats=False).logps.double()

    # ----------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The mean over groups of :func:`~contrastive_align.losses.fdpg`; groups whose Z is still 0 count as 0."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported, as in TRL. Read the logged metrics.")
        some_mass = torch.isfinite(inputs["log_z"])
        losses = fdpg(
            self._completion_logps(model, inputs),
            inputs["proposal_logps"],
            inputs["target_log_scores"],
            log_z=inputs["log_z"],
            divergence=self.args.divergence,
            baseline={"none": None, "window": inputs.get("baseline")}.get(self.args.baseline, self.args.baseline),
            valid=inputs["valid"] & some_mass.unsqueeze(1),
            max_ratio=self.args.max_importance_ratio,
        )
        return losses.mean()

    # -------------------------------------------------------------------------------------------------------- metrics

    def _log_groups(self, rows, completion_ids, phi, keys, base_logps, log_z, **logs: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        k = base_logps.size(1)
        lengths = torch.tensor([[len(ids) for ids in group] for group in completion_ids], device=phi.device)
        ended = torch.tensor(
            [[ids[-1] in self.eos_token_ids for ids in group] for group in completion_ids], device=phi.device
        )
        gather = self.accelerator.gather
        metrics = distribution_metrics(
            **{name: gather(tensor) for name, tensor in logs.items()},
            base_logps=gather(base_logps),
            log_z=gather(log_z),
            phi=gather(phi),
            names=self.target.names,
            keys=gather_object(keys),
            lengths=gather(lengths),
            ended=gather(ended),
            completion_ids=gather_object(completion_ids),
        )
        if mode == "train":
            prompts = torch.tensor([len(rows) * k, int(lengths.sum())], device=phi.device)
            self.state.num_input_tokens_seen += int(gather(prompts).view(-1, 2)[:, 1].sum())
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if self.log_completions:
            texts = self._tokenizer.batch_decode([i for g in completion_ids for i in g], skip_special_tokens=True)
            self._logs["prompt"].extend(gather_object([str(row["prompt"]) for row in rows for _ in range(k)]))
            self._logs["completion"].extend(gather_object(texts))
            for j, name in enumerate(self.target.names):
                self._logs["rewards"][name].extend(gather(phi[..., j].flatten()).tolist())
            log_weights = logs["target_log_scores"] - logs["policy_logps"]
            self._logs["advantages"].extend(gather(log_weights.flatten()).tolist())

    # --------------------------------------------------------------------------------------------- resuming and saving

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(
                resume_from_checkpoint, self.args.output_dir, TARGET_FILE, state_file(0)
            )
            load_state(self, Path(resume_from_checkpoint))
        elif not self.target.fitted or (all(self.target.pointwise) and self.target.last_fit is None):
            self.fit_target()  # nothing to fit where all constraints are pointwise, but that something satisfies them
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        save_state(self, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def objective(self) -> dict[str, Any]:
        return {"divergence": self.args.divergence, "target": str(self.target)}
