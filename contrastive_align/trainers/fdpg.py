"""FDPGTrainer: trl.RLOOTrainer towards a target. Wiring only; the mathematics is in losses/ and targets/."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging
from trl import RLOOTrainer

from contrastive_align.data import GroupCollator
from contrastive_align.data.formats import distinct_prompts, random_prompts
from contrastive_align.losses import fdpg
from contrastive_align.losses.divergences import DIVERGENCES, mean_slope
from contrastive_align.losses.estimators import RunningLogZ
from contrastive_align.models.loading import decoder_start_token
from contrastive_align.models.logps import beside, completion_logps, completion_objective, per_completion
from contrastive_align.rounds.long_prompts import rows_of_long_prompts, surely_fits, without_rows
from contrastive_align.rounds.reward_log import RewardLog
from contrastive_align.rounds.samplers import hand_over_without_rounding
from contrastive_align.sampling.adjust import Adjustment, Support, adjusted_logps
from contrastive_align.sampling.decode import Drawn, draw, seed_of
from contrastive_align.targets import Target
from contrastive_align.targets.evaluate import reward_arguments
from contrastive_align.targets.features import weighted_sum
from contrastive_align.targets.fit import PER_PROMPT, fit_adaptively
from contrastive_align.trainers.adaptive_proposal import AdaptiveProposal, WindowBaseline
from contrastive_align.trainers.base import (
    AlignmentTrainer,
    AnyDataset,
    EvalDataset,
    compile_layers,
    disable_functional_dropout,
    save_tensors,
)
from contrastive_align.trainers.configs import FDPGConfig
from contrastive_align.trainers.encoder_decoder import (
    EncoderDecoderCollator,
    add_encoder_decoder_head,
    check_options_for_encoder_decoder,
    encoder_decoder_logps,
    encoder_decoder_objective,
    other_encoder_decoder_batches,
)
from contrastive_align.trainers.metrics import distribution_metrics, target_mass_lost
from contrastive_align.trl_seam import DrawsGroups, Method, nothing_loaded_by_trl, whole_parameters


logger = logging.get_logger(__name__)

FIT_GROWTH = 16  # times the first samples of a fit, which its budget is by default
FIT_REPORTS, FIT_SILENCE = 10.0, 60.0  # seconds between lines on its progress: at first, and at most
COLLAPSED = 0.5  # share of samples drawn with probability 1 from which on a truncated proposal has collapsed
LOST_MASS_SAMPLES = 32  # prompts, and samples of each, from which the mass outside a truncated proposal is estimated
TARGET_FILE = "target.json"
PROPOSAL_FILE = "proposal.pt"


class FDPGTrainer(DrawsGroups, AlignmentTrainer, RLOOTrainer):
    r"""Train a language model towards a target distribution under an f-divergence, from its own samples.

    .. math:: \nabla D_f(\pi \| p) = E_{y \sim q}\Big[\frac{\pi(y)}{q(y)}\, f'\Big(\frac{\pi(y)}{p(y)}\Big)\,
        \nabla \log \pi(y)\Big], \qquad p(y|c) = P(y|c) / Z_c

    f-DPG, arXiv:2302.08215. DPG, GDC and CDPG are ``divergence="kl"``; RLHF with a KL penalty is
    ``divergence="reverse_kl"`` on ``Target.from_reward``. A subclass of :class:`trl.RLOOTrainer` that takes its
    arguments: prompts in, ``num_generations`` samples each, features by TRL's reward functions.

    The base a(y|c) of the target is the reference: the model as it was given, its adapter off (LoRA) or a frozen copy.
    Causal models continue the prompt; encoder-decoder models (T5, BART, Marian) read it in the encoder.

    ```python
    from contrastive_align import FDPGConfig, FDPGTrainer
    from contrastive_align.targets import Constraint, Target

    target = Target([Constraint({"contains": "please"}, moment=0.5)])
    trainer = FDPGTrainer(model, args=FDPGConfig(output_dir="out"), train_dataset=prompts, target=target)
    trainer.train()  # finds the target's lambdas first, from samples of the base
    ```

    Args:
        model: as in TRL; a folder or hub id may also be a LoRA adapter (see ``models.loading.resolve_start``).
        args, train_dataset, eval_dataset, processing_class, callbacks: as in TRL.
        optimizers, quantization_config, peft_config: as in TRL.
        reward_funcs: as in TRL; with no ``target``, theirs is base * exp(weighted sum of rewards / args.beta).
        target: the distribution to train towards. Unknown lambdas are fitted when training starts.

    Raises:
        ValueError: an option or model this trainer does not support, with the way out.
        InfeasibleMoment: a moment that no lambda reaches on samples of the base.
        FeatureError: a feature that raises, or answers with something else than a number for each completion.
    """

    config, suffix = FDPGConfig, "FDPG"
    data_report: Mapping[str, int] = MappingProxyType({})  # how many rows there are, and how many prompts are too long
    takes_encoder_decoders = True
    columns = ("prompt", "image", "images")
    method = Method(
        name="f-DPG",
        tags=("trl", "contrastive-align", "fdpg"),
        paper="Aligning Language Models with Preferences through f-divergence Minimization",
        arxiv="2302.08215",
        key="go2023aligning",
        authors=(
            r"Dongyoung Go and Tomasz Korbak and Germ{\'{a}}n Kruszewski and Jos Rozen and Nahyeon Ryu and "
            "Marc Dymetman"
        ),
        year=2023,
        venue="International Conference on Machine Learning",
    )

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: FDPGConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
        *,
        target: Target | None = None,
    ):
        args = self.own_args(args, model)
        told = {"reward_processing_classes": reward_processing_classes}
        self.refuse_arguments(model, processing_class, peft_config, train_dataset, **told)
        check_enough_prompts(train_dataset, args)
        self.target = target_of(target, reward_funcs, args)
        start = self.load_start(model, args, processing_class, quantization_config, peft_config)
        adapter = start["peft_config"] is not None or is_peft_model(start["model"])
        self.reference: PreTrainedModel | None = None if adapter else self.frozen_copy(start["model"])
        with nothing_loaded_by_trl(args):
            super().__init__(
                **start,
                reward_funcs=[features_are_read_by_the_target] * len(args.reward_weights or [1.0]),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if self.aux_loss_enabled:
            raise ValueError("A router loss has no place in the target. Set router_aux_loss_coef=0.")
        if args.disable_dropout:
            disable_functional_dropout(self.model)
        if self.use_vllm and is_peft_model(self.model):
            hand_over_without_rounding(self.vllm_generation, self.model)
        self.place_reference()
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        pad = (self.processing_class.pad_token_id, args.pad_to_multiple_of)
        self.collate: GroupCollator | EncoderDecoderCollator
        if self.is_encoder_decoder:
            check_options_for_encoder_decoder(args)
            self.check_engine()
            self.check_loaded()
            models = self.base_models()
            for each in models:
                with whole_parameters(each):
                    add_encoder_decoder_head(each)
            self.collate = EncoderDecoderCollator(*pad, decoder_start_token(models[0]))
            self.layout = "padded"
            compile_layers(self, models)
        else:
            self.collate = GroupCollator(*pad)
            self.choose_layout()
            self.leave_room_for_prompts()
            self.max_completion_length = args.max_completion_length
        self._drop_long_prompts()
        self.adjustment = Adjustment(args.temperature, args.top_k, args.top_p)
        self.log_z, self.reward_log = RunningLogZ(), RewardLog()
        self.baseline = WindowBaseline(args.baseline_window) if args.baseline == "window" else None
        self.adaptive_proposal: AdaptiveProposal | None = None
        if args.proposal == "kept":
            if self.uses_engine:
                raise ValueError(
                    "proposal='kept' exchanges the trained weights, which DeepSpeed and FSDP keep in a form of their "
                    "own. Set proposal='policy', or train without them."
                )
            self.adaptive_proposal = AdaptiveProposal(args.proposal_criterion, args.proposal_window)
        self.add_callback(_FitsTarget(self))
        self._evaluation: _Evaluation | None = None
        self._first_group: dict[str, Any] | None = None
        self._told_collapse = False

    @property
    def policy(self) -> nn.Module:
        """The model that is trained, without what wraps it for several processes."""
        return self.accelerator.unwrap_model(self.model)

    # -------------------------------------------------------------------------------------------------------- target

    def fit_target(self) -> None:
        """Find the target's lambdas from samples of the base, and write them to ``output_dir``/target.json.

        The prompts are a random choice over the whole dataset; see ``targets.fit.fit_adaptively``.
        """
        args, target, rows = self.args, self.target, self.train_dataset
        at_most = max(1, self.fit_budget // PER_PROMPT)
        prompts = self._some_prompts(at_most)
        there_are_more = len(prompts) == at_most
        population = len(prompts) if not there_are_more else len(rows) if isinstance(rows, Dataset) else math.inf
        told = _FitProgress(target, self.fit_budget)

        def drawn(places: range, call: int, n: int) -> Tensor:
            chosen = [prompts[i] for i in places]
            ids = self.prompt_ids_of([row["prompt"] for row in chosen])
            found = draw(model, ids, per_prompt=n, seeds=self._seeds(("fit", call), places), **self._draw_options())
            return self._features(chosen, found.completion_ids).view(len(chosen), n, -1)

        with self.sampling_from(reference=True) as model:
            fit = fit_adaptively(
                lambda phi: target.fit(phi, min_ess=args.fit_min_ess, correct_bias=True, population=population),
                drawn,
                prompts=len(prompts),
                samples=args.fit_samples,
                most=self.fit_budget,
                tolerance=args.fit_tolerance,
                report=told,
            )
        each = zip(self.target.names, self.target.lambdas, self.target.pointwise, strict=True)
        errors = iter(fit.lambda_se.tolist())
        found = [
            f"always {name}" if always else f"lambda({name}) = {value:.3f} +- {next(errors):.3f}"
            for name, value, always in each
        ]
        if any(self.target.pointwise):
            found.append(f"{fit.samples} satisfy what always holds")
        logger.warning(
            f"Target fitted: {', '.join(found)}, from {told.samples} samples of {len(fit.log_z)} prompts; "
            f"effective sample size {fit.ess:.0f}."
        )
        for line in target.unsure_moments():
            logger.warning(line)
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.target.save(Path(self.args.output_dir) / TARGET_FILE)

    def _some_prompts(self, at_most: int) -> list[Any]:
        """Return distinct prompts of the training data: a random choice, or the first ones of a stream."""
        rows = self.train_dataset
        if isinstance(rows, Dataset):
            return random_prompts(rows, at_most, seed=self.args.seed)
        return distinct_prompts(rows, at_most)

    def tell_lost_mass(self) -> None:
        """Log how much of the target's mass lies where top-k and top-p draw nothing, from samples of the base."""
        n = LOST_MASS_SAMPLES
        chosen = self._some_prompts(n)
        ids = self.prompt_ids_of([row["prompt"] for row in chosen])
        with self.sampling_from(reference=True) as model:
            seeds, options = self._seeds("lost mass", range(len(ids))), self._draw_options()
            drawn = draw(model, ids, per_prompt=n, seeds=seeds, watched=self.adjustment, **options)
        phi = self._features(chosen, drawn.completion_ids).view(len(chosen), n, -1)
        scores = self.target.log_scores(drawn.logps, phi.to(drawn.logps.device))
        lost, error = target_mass_lost(drawn.inside, scores, drawn.logps)
        logger.warning(
            f"Samples are drawn with {self.adjustment}: {lost:.3f} +- {error:.3f} of the target's mass lies outside "
            "what these leave of the base. The policy is trained towards the rest."
        )

    @property
    def fit_budget(self) -> int:
        """The most samples that the fit of the target draws."""
        return self.args.fit_max_samples or FIT_GROWTH * self.args.fit_samples

    def _features(
        self, rows: list[dict[str, Any]], completion_ids: Sequence[Sequence[list[int]]], *, logged: bool = False
    ) -> Tensor:
        """Return phi (C * K, J) of K completions of each row. ``logged``: what the features log goes into the log."""
        texts = [self.processing_class.batch_decode(list(group), skip_special_tokens=True) for group in completion_ids]
        found = reward_arguments(rows, completion_ids, texts)
        return self.target.features(**found, trainer_state=self.state, **(self.reward_log.keywords if logged else {}))

    # ------------------------------------------------------------------------------------------------------- sampling

    def prompt_ids_of(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts, at least one each.

        Raises:
            ValueError: a prompt that leaves no room for a completion in the model's context.
        """
        prompt_ids, room = self._ids(prompts), self._room()
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if len(ids) > room:
                raise ValueError(
                    f"A prompt of {len(ids)} tokens and max_completion_length={self.max_completion_length} exceed the "
                    f"model's context of {min(self.context_limits().values())}: {str(prompt)[:80]!r}. Shorten or leave "
                    "out the prompt, or lower max_completion_length."
                )
        return prompt_ids

    def _ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        bos: Any = self.processing_class.bos_token_id
        start = bos if bos is not None else self.eos_token_ids[0]
        return [ids or [start] for ids in self.prompt_token_ids(prompts)]

    def _room(self) -> int:
        """Tokens that a prompt may have; encoder and decoder have a context each."""
        context = min(self.context_limits().values(), default=2**31)
        return context - (0 if self.is_encoder_decoder else self.max_completion_length)

    def _drop_long_prompts(self) -> None:
        """Leave prompts without room for a completion out of the datasets, and count those of training."""
        rows = self.train_dataset
        self.train_dataset = self.usable_rows(rows, "train_dataset")
        if isinstance(rows, Dataset):
            self.data_report = {"rows": len(rows), "too_long": len(rows) - len(self.train_dataset)}
        if self.data_report.get("too_long"):
            check_enough_prompts(self.train_dataset, self.args)
        if isinstance(self.eval_dataset, dict):
            parts = self.eval_dataset.items()
            self.eval_dataset = {name: self.usable_rows(part, f"eval_dataset {name!r}") for name, part in parts}
        else:
            self.eval_dataset = self.usable_rows(self.eval_dataset, "eval_dataset")

    def usable_rows(self, dataset: Any, name: str) -> Any:
        """Return the rows of a dataset whose prompt leaves room for a completion; a stream as it is.

        Raises:
            ValueError: no row is left.
        """
        if not isinstance(dataset, Dataset):
            return dataset
        room = self._room()

        def length(row: int, prompt: Any) -> int:
            return 0 if surely_fits(prompt, room) else len(self._ids([prompt])[0])

        limits = self.context_limits() | {"max_completion_length": self.max_completion_length}
        return without_rows(dataset, rows_of_long_prompts(dataset, length, room, name=name, limits=limits), name=name)

    def _draw_options(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_completion_length,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": self.processing_class.pad_token_id,
        }

    def _seeds(self, what: Any, places: Any) -> list[int]:
        """Return a seed for each group: the same samples on any number of processes, and after resuming."""
        return [seed_of(self.args.seed, what, place) for place in places]

    @contextlib.contextmanager
    def _proposal(self, given: Callable[..., contextlib.AbstractContextManager]) -> Iterator[PreTrainedModel]:
        """Give what is drawn from: the policy, or in training the weights that are kept.

        Args:
            given: :meth:`sampling_from` or :meth:`scoring_by`.
        """
        kept = self.adaptive_proposal if self.model.training else None
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(given(reference=kept is not None and kept.is_base))
            if kept is not None:
                stack.enter_context(kept.in_place_of(self.policy))
            yield model

    def _draw(self, prompt_ids: list[list[int]], per_prompt: int, seeds: list[int]) -> Drawn | None:
        """Draw completions (C, K) of the proposal; None where an engine draws.

        For training under temperature, top-k and top-p; else of the policy as it is, with what these would leave.
        """
        if self.use_vllm or self.use_transformers_continuous_batching:
            return None
        options: dict[str, Any] = {}
        if self.model.training:
            options = {**vars(self.adjustment), "supports": self.adjustment.truncates}
        elif self.adjustment.truncates:
            options = {"watched": self.adjustment}
        with self._proposal(self.sampling_from) as model:
            return draw(model, prompt_ids, per_prompt=per_prompt, seeds=seeds, **self._draw_options(), **options)

    @torch.no_grad()
    def draw_groups(self, rows: list[dict[str, Any]], *, training: bool) -> list[dict[str, Tensor]]:
        """Draw K completions for each prompt and score them under reference and target, as micro-batches of groups."""
        if training:
            k, parts, what = self.num_generations, self.args.steps_per_generation, ("train", self.generation)
        else:
            k, parts, what = self.num_generations_eval, 1, ("eval", self.state.global_step)
        self.reward_log = RewardLog()
        rows = rows[::k]  # TRL's sampler repeats every prompt K times in a row
        prompt_ids = self.prompt_ids_of([row["prompt"] for row in rows])
        first, evaluation = self.accelerator.process_index * len(rows), None if training else self._evaluation
        if evaluation is not None:
            first += evaluation.begun
        drawn = self._draw(prompt_ids, k, self._seeds(what, range(first, first + len(rows))))
        completion_ids = self.generate_by_engine(prompt_ids, k) if drawn is None else drawn.completion_ids
        size = len(rows) // parts
        groups = [
            {"prompt_ids": p, "completion_ids": list(c), "scores": [0.0] * k}
            for p, c in zip(prompt_ids, completion_ids, strict=True)
        ]
        batches = [self.on_device(self.collate(groups[i : i + size])) for i in range(0, len(rows), size)]
        base_logps = torch.cat([self._logps(batch, reference=True) for batch in batches])
        # Scored as in the loss: on policy their ratio is 1, in 16 bits too, where the sampler's differ by more.
        with self._proposal(self.scoring_by) as model:
            if training and self.adjustment.changes:
                found = [self._adjusted_logps(model, batch, drawn, i * size) for i, batch in enumerate(batches)]
                policy_logps, proposal_logps = (torch.cat(parts) for parts in zip(*found, strict=True))
                self.record(self._weights_of(policy_logps - proposal_logps), training=True)
                if self.adjustment.truncates:
                    self._watch_support(proposal_logps)
                policy_logps = self._on_the_support(policy_logps, proposal_logps)
            else:
                policy_logps = proposal_logps = torch.cat([self._completion_logps(model, batch) for batch in batches])
        if self.adaptive_proposal is not None and training:
            policy_logps = torch.cat([self._logps(batch) for batch in batches])
        if drawn is not None:
            gap = self.accelerator.gather(drawn.logps.to(proposal_logps) - proposal_logps)
            found = {"mean": gap.mean(), "std": gap.std(correction=0), "max": gap.abs().max()}
            self.record({f"sampling/logp_gap/{name}": x.item() for name, x in found.items()}, training=training)
        if training and self.reference_is_proven is False:
            self._prove_reference_on(groups[0], batches[0], base_logps[:size])
        phi = self._features(rows, completion_ids, logged=True).view(len(rows), k, -1).to(base_logps.device)
        self.record(self.reward_log.take_metrics(), training=training)
        target_log_scores = self.target.log_scores(base_logps, phi)
        keys = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in prompt_ids]
        log_z = self._log_z_of(keys, target_log_scores - proposal_logps)
        logs = {"policy_logps": policy_logps, "proposal_logps": proposal_logps, "target_log_scores": target_log_scores}
        found = self._log_groups(rows, completion_ids, keys, phi=phi, base_logps=base_logps, **logs)
        if drawn is not None and drawn.inside is not None:
            found["inside"] = self.accelerator.gather(drawn.inside.to(base_logps.device))
        more = {"proposal_logps": proposal_logps, "target_log_scores": target_log_scores, "log_z": log_z}
        if evaluation is not None:
            evaluation.add(found)
            more["counted"] = torch.arange(first, first + len(rows), device=log_z.device) < evaluation.groups
        else:
            self.record(distribution_metrics(names=self.target.names, **found), training=training)
        if self.baseline is not None:
            more["baseline"] = self._window_baseline(log_z, **logs)
        if self.adaptive_proposal is not None and training:
            self._compare_proposal(keys, **logs)
        for j, batch in enumerate(batches):
            batch.pop("scores", None)
            batch.update({name: tensor[j * size : (j + 1) * size] for name, tensor in more.items()})
        return batches

    def _log_z_of(self, keys: list[str], log_weights: Tensor) -> Tensor:
        """Return log Z (B,) of the prompts. The samples that any process has drawn for a prompt are counted in."""
        if self.model.training:
            everywhere = gather_object(list(zip(keys, log_weights.tolist(), strict=True)))
            self.log_z.add((key, torch.tensor(weights, dtype=torch.float64)) for key, weights in everywhere)
            return self.log_z.of(keys).to(log_weights.device)
        held_out = RunningLogZ()  # of an evaluation nothing is left in the training
        held_out.add(zip(keys, log_weights, strict=True))
        values = [self.log_z[key] if key in self.log_z else held_out[key] for key in keys]
        return torch.tensor(values, dtype=torch.float64, device=log_weights.device)

    def _window_baseline(self, log_z: Tensor, **logs: Tensor) -> Tensor:
        """(B,) the baseline that earlier steps give; then these samples are counted in, for the next ones."""
        before = torch.full_like(log_z, self.baseline.value)
        if self.model.training:
            slopes = mean_slope(**logs, log_z=log_z, divergence=self.args.divergence)
            self.baseline.add(self.accelerator.gather(slopes))
        return before

    def _compare_proposal(self, keys: list[str], **logs: Tensor) -> None:
        everywhere = {name: self.accelerator.gather(tensor) for name, tensor in logs.items()}
        found = self.adaptive_proposal.compare(self.policy, gather_object(keys), log_z=self.log_z, **everywhere)
        metrics = {"proposal/replaced": float(found is not None and found.replaced)}
        if found is not None:
            name = f"proposal/{self.args.proposal_criterion}_gap"
            metrics |= {name: found.gap, f"{name}/se": found.gap_se}
        self.record(metrics, training=True)

    # ----------------------------------------------------------------------------------------------- log-probs, loss

    def _logps(self, batch: dict[str, Tensor], *, reference: bool = False) -> Tensor:
        """(B, K) float64, in the layout of training."""
        with self.scoring_by(reference=reference) as model:
            return self._completion_logps(model, batch)

    def _completion_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) float64, with a gradient where one is wanted."""
        if self.is_encoder_decoder:
            return encoder_decoder_logps(model, batch).double()
        return completion_logps(model, batch, layout=self.layout, token_stats=False).logps.double()

    @torch.no_grad()
    def _adjusted_logps(
        self, model: nn.Module, batch: dict[str, Tensor], drawn: Drawn, first: int
    ) -> tuple[Tensor, Tensor]:
        """(B, K) float64 twice, in the layout of training: under the model, and under what its samples came from.

        Args:
            first: the place of the batch's first group among those drawn.

        Raises:
            RuntimeError: a token that is not among those it was chosen from.
        """
        groups, support = slice(first, first + len(batch["valid"])), None
        if drawn.supports is not None:
            support = Support.join([each for group in drawn.supports[groups] for each in group])
        objective = partial(adjusted_logps, temperature=self.adjustment.temperature, support=support)
        if self.is_encoder_decoder:
            tokens = encoder_decoder_objective(model, batch, objective)
        else:
            tokens = completion_objective(model, batch, objective, layout=self.layout)
        outside = torch.isneginf(tokens[:, 1])
        if outside.any():
            ids = [i for group in drawn.completion_ids[groups] for row in group for i in row]
            token = ids[int(outside.nonzero()[0])]
            raise RuntimeError(
                f"{int(outside.sum())} of {len(outside)} tokens are not among those they were chosen from "
                f"({self.adjustment}), the first being {self.processing_class.decode([token])!r} (id {token}). Their "
                "importance weights would be infinite: the sampler drew from something else than it reports."
            )
        lengths = _lengths(batch)
        index = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths.to(tokens.device))
        sums = tokens.new_zeros(len(lengths), 2).index_add(0, index, tokens)
        valid = batch["valid"].to(tokens.device)
        return per_completion(sums[:, 0], valid), per_completion(sums[:, 1], valid)

    def _on_the_support(self, policy_logps: Tensor, proposal_logps: Tensor) -> Tensor:
        r"""(B, K) log-probs of the policy given that a truncated proposal can draw the sample.

        .. math:: \log \pi(y) - \log \pi(S), \qquad \pi(S) = E_q[\pi / q]

        As log Z is then the target's on S, policy and target are compared there. With the policy's own log-probs, all
        of its mass would be pulled into S, the next S would be smaller, and so on to a single completion.
        """
        if not self.adjustment.truncates:
            return policy_logps
        ratios = (policy_logps - proposal_logps).detach()
        return policy_logps - (ratios.logsumexp(1, keepdim=True) - math.log(ratios.size(1)))

    def _weights_of(self, log_ratios: Tensor) -> dict[str, float]:
        """Describe the importance weights pi/q: their mean, 1 less the policy's mass outside the support, and ESS."""
        weights = self.accelerator.gather(log_ratios).exp().flatten()
        ess = weights.sum().square() / (len(weights) * weights.square().sum())
        error = weights.std() * len(weights) ** -0.5
        found = {"mean": weights.mean(), "mean/se": error, "ess": ess}
        return {f"sampling/importance_weight/{name}": value.item() for name, value in found.items()}

    def _watch_support(self, proposal_logps: Tensor) -> None:
        """Log the share of samples whose support was one token throughout, and say once when it is large.

        From them nothing is learnt: all samples of the prompt are equal, and no other completion is ever drawn again.
        """
        certain = self.accelerator.gather((proposal_logps == 0).double()).mean().item()
        self.record({"sampling/certain": certain}, training=True)
        if certain >= COLLAPSED and not self._told_collapse:
            self._told_collapse = True
            logger.warning(
                f"{certain:.0%} of the samples of step {self.state.global_step} are the only completion of their "
                f"prompt that {self.adjustment} leaves of the policy. Nothing is learnt from these prompts any more, "
                "and the policy does not reach the target there. Start anew with a lower learning_rate, or a larger "
                "top_p or top_k."
            )

    def _prove_reference_on(self, group: dict[str, Any], batch: dict[str, Tensor], reference: Tensor) -> None:
        # Scored by the forward pass that scores the reference, not by the sampler's.
        if self._first_group is None:
            self._first_group = group
        policy, lengths = self.policy_logps_of(batch)
        self.prove_reference(policy, reference[batch["valid"].to(reference.device)], lengths, batch)

    def policy_logps_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs (N,), and their tokens."""
        lengths, logps = _lengths(batch), self._logps(batch)
        return logps[batch["valid"].to(logps.device)], lengths.to(logps.device)

    def batch_of(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a group as a batch on the accelerator."""
        return self.on_device(self.collate([group]))

    def other_batches(self, batch: dict[str, Tensor], rows: int) -> list[list[dict[str, Tensor]]]:
        """Return the completions of a batch in other batches, of the first ``rows`` one by one."""
        if "labels" in batch:
            return other_encoder_decoder_batches(batch, rows, self.free_columns(batch))
        return super().other_batches(batch, rows)

    def reference_group(self) -> dict[str, Any] | None:
        """Return the first group that was drawn."""
        return self._first_group

    def reference_logps_of(self, group: dict[str, Any]) -> list[float]:
        """Log-probs (K) of a group under the base."""
        batch = self.batch_of(group)
        return self._logps(batch, reference=True)[batch["valid"]].tolist()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Return the mean of :func:`~contrastive_align.losses.fdpg` over groups; a group whose Z is 0 counts as 0."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported, as in TRL. Read the logged metrics.")
        if self.model.training and self.reference_is_proven is False and self._first_group:  # resumed between draws
            with torch.no_grad():
                self._prove_reference_on(self._first_group, inputs, self._logps(inputs, reference=True))
        policy_logps = self._completion_logps(model, inputs)
        inputs = beside(policy_logps, inputs)
        if self.model.training:
            policy_logps = self._on_the_support(policy_logps, inputs["proposal_logps"])
        some_mass = inputs["log_z"] != -math.inf
        if not (self.first_step_is_finite or torch.isfinite(policy_logps).all()):
            return policy_logps.sum()  # NaN or infinite: the check of the first step finds out why
        losses = fdpg(
            policy_logps,
            inputs["proposal_logps"],
            inputs["target_log_scores"],
            log_z=inputs["log_z"],
            divergence=self.args.divergence,
            baseline={"none": None, "window": inputs.get("baseline")}.get(self.args.baseline, self.args.baseline),
            valid=inputs["valid"] & some_mass.unsqueeze(1),
            max_ratio=self.args.max_importance_ratio,
        )
        counted = inputs.get("counted")
        return losses.mean() if counted is None else losses[counted].sum() / counted.sum().clamp(min=1)

    # -------------------------------------------------------------------------------------------------------- metrics

    def _log_groups(
        self,
        rows: list[dict[str, Any]],
        completion_ids: Sequence[Sequence[list[int]]],
        keys: list[str],
        *,
        phi: Tensor,
        **logs: Tensor,
    ) -> dict[str, Any]:
        """Return what is measured of the groups of all processes."""
        training, gather = self.model.training, self.accelerator.gather
        k = phi.size(1)
        lengths = torch.tensor([[len(ids) for ids in group] for group in completion_ids], device=phi.device)
        ended = torch.tensor(
            [[ids[-1] in self.eos_token_ids for ids in group] for group in completion_ids], device=phi.device
        )
        found = {name: gather(tensor) for name, tensor in logs.items()}
        found |= {"phi": gather(phi), "lengths": gather(lengths), "ended": gather(ended)}
        found |= {"keys": gather_object(keys), "completion_ids": gather_object(list(completion_ids))}
        if training:
            self.state.num_input_tokens_seen += int(found["lengths"].sum())
        if self.log_completions:
            texts = self.processing_class.batch_decode([i for g in completion_ids for i in g], skip_special_tokens=True)
            extra = self.reward_log.take_columns(len(texts))
            log_weights = logs["target_log_scores"] - logs["policy_logps"]
            self.log_completion_rows(
                {
                    "prompt": gather_object([str(row["prompt"]) for row in rows for _ in range(k)]),
                    "completion": gather_object(texts),
                    "advantages": gather(log_weights.flatten()).tolist(),
                },
                {name: gather(phi[..., j].flatten()).tolist() for j, name in enumerate(self.target.names)},
                extra,
            )
        return found

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return the loss of a batch, as TRL does; the loop counts each group once."""
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._evaluation is not None:
            self._evaluation.add_loss(found[0], self.accelerator)
        return found

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run Trainer's evaluation; loss and metrics are those of all groups together, each counted once.

        They do not depend on the batches or the number of processes: a prompt's samples are those of its place.
        """
        groups = len(dataloader.dataset) if has_length(dataloader.dataset) else math.inf
        self._evaluation = evaluation = _Evaluation(groups)
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        finally:
            self._evaluation = None
        self.record(distribution_metrics(names=self.target.names, **evaluation.together()), training=False)
        output.metrics[f"{metric_key_prefix}_loss"] = evaluation.loss
        return output

    # --------------------------------------------------------------------------------------------- resuming and saving

    def fit_where_needed(self) -> None:
        """Fit the target, unless it is known."""
        # Where all constraints are pointwise there is nothing to fit, but that something satisfies them.
        if self.resumed_from is None and (
            not self.target.fitted or (all(self.target.pointwise) and self.target.last_fit is None)
        ):
            self.fit_target()

    @property
    def state_files(self) -> tuple[str, ...]:
        """The target, and the state of every process."""
        return TARGET_FILE, *(state_file(process) for process in range(self.accelerator.num_processes))

    def save_own_state(self, folder: Path) -> None:
        """Write target and proposal once; running log Z, windows and the groups already drawn for each process."""
        state = {**self.drawn_state(), "log_z": self.log_z.state_dict(), "first_group": self._first_group}
        if self.baseline is not None:
            state["baseline"] = self.baseline.state_dict()
        if self.adaptive_proposal is not None:
            state["proposal"] = self.adaptive_proposal.state_dict()
        if self.args.should_save:
            self.target.save(folder / TARGET_FILE)
            if self.adaptive_proposal is not None and not self.adaptive_proposal.is_base:
                save_tensors(self.adaptive_proposal.weights, folder / PROPOSAL_FILE)
        save_tensors(state, folder / state_file(self.args.process_index))

    def load_state(self, checkpoint: Path) -> None:
        """Read what :meth:`save_own_state` has written.

        Raises:
            ValueError: the proposal is missing, or that of another model.
        """
        self.target.load(checkpoint / TARGET_FILE)
        file = checkpoint / state_file(self.args.process_index)
        device = self.accelerator.device
        state = torch.load(file, map_location="cpu" if device.type == "cpu" else device, weights_only=True)  # not cpu:0
        self.load_drawn_state(state)
        self.log_z.load_state_dict(state["log_z"])
        self._first_group = state.get("first_group")
        if self.baseline is not None and "baseline" in state:  # else the run began with another baseline
            self.baseline.load_state_dict(state["baseline"])
        if self.adaptive_proposal is not None and "proposal" in state:  # else it begins with the base
            file, weights = checkpoint / PROPOSAL_FILE, None
            if state["proposal"]["replacements"]:
                if not file.is_file():
                    raise ValueError(f"{file} is missing, but the proposal was replaced. The checkpoint is not whole.")
                weights = torch.load(file, map_location="cpu", weights_only=True)
            self.adaptive_proposal.load_state_dict(state["proposal"], weights, self.policy)

    def functions(self) -> dict[str, dict[str, str | None]]:
        """Return divergence and features."""
        name = self.args.divergence
        return {"divergence": {name: DIVERGENCES.hashes.get(name)}, "features": self.target.sources}

    def objective(self) -> dict[str, Any]:
        """Return divergence and target, for the model card."""
        return {"divergence": DIVERGENCES.describe(self.args.divergence), "target": str(self.target)}


def _lengths(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens of each completion of a batch (N,)."""
    return batch["labels"].ne(-100).sum(1) if "labels" in batch else batch["completion_mask"].sum(1)


def state_file(process: int) -> str:
    """Return the file of a checkpoint with the state of one process."""
    return f"fdpg_state_{process}.pt"


def target_of(target: Target | None, reward_funcs: Any, args: FDPGConfig) -> Target:
    """Return the target as given, or base * exp(weighted sum of rewards / beta).

    Raises:
        TypeError: a target of another class.
        ValueError: both are given, or none.
    """
    if target is not None:
        if not isinstance(target, Target):
            raise TypeError(f"target is a {type(target).__name__}, expected a contrastive_align.targets.Target.")
        if reward_funcs:
            raise ValueError("Both target and reward_funcs are given, expected one: put the rewards into the target.")
        if args.reward_weights is not None:
            raise ValueError("reward_weights weighs reward_funcs, and a target is given. Leave it out.")
        return target
    if not reward_funcs:
        raise ValueError(
            "Nothing to train towards. Give target=Target([...]), or reward_funcs for base * exp(reward / beta)."
        )
    return Target.from_reward(weighted_sum(reward_funcs, args.reward_weights), args.beta)


def check_enough_prompts(dataset: Dataset | IterableDataset | None, args: FDPGConfig) -> None:
    """Refuse a dataset that does not fill one step: TRL's sampler leaves out what does not, and would train on nothing.

    Raises:
        ValueError: fewer rows than samples are drawn for at once, over all processes.
    """
    needed = args.generation_batch_size // args.num_generations
    if not isinstance(dataset, Dataset) or len(dataset) >= needed:
        return
    distinct = len(distinct_prompts(dataset, needed)) if "prompt" in dataset.column_names else 0
    raise ValueError(
        f"train_dataset has {len(dataset)} rows ({distinct} distinct prompts), and samples are drawn for {needed} at "
        f"once: generation_batch_size={args.generation_batch_size} samples over all processes, num_generations="
        f"{args.num_generations} for each. No step would be filled. Lower per_device_train_batch_size or "
        "steps_per_generation (gradient_accumulation_steps, where that is left out), raise num_generations, or repeat "
        f"the rows: concatenate_datasets([train_dataset] * {-(-needed // max(1, len(dataset)))})."
    )


def features_are_read_by_the_target(**columns: Any) -> list[float]:
    """Stand in for the reward function that TRL asks for."""
    raise AssertionError("TRL computed rewards by itself: FDPGTrainer's draw_groups was not used.")


class _Evaluation:
    """What one pass over an evaluation set finds. Groups that fill up the last batches are not counted again.

    Args:
        groups: the prompts of the set; infinite where a stream does not tell.
    """

    def __init__(self, groups: float) -> None:
        self.groups, self.begun = groups, 0  # places that batches have begun before this one
        self._parts: list[dict[str, Any]] = []
        self._loss = self._counted = 0.0

    def add(self, found: dict[str, Any]) -> None:
        """Add the groups of a batch, of all processes in their order."""
        self._n = len(found["keys"])
        counted = int(max(0, min(self._n, self.groups - self.begun)))
        self._parts.append({name: values[:counted] for name, values in found.items()})
        self.begun += self._n

    def add_loss(self, loss: Tensor, accelerator: Accelerator) -> None:
        """Add a batch's mean loss of each process."""
        losses, counted = accelerator.gather(loss.detach().double()[None]).tolist(), len(self._parts[-1]["keys"])
        rows = self._n // len(losses)
        for process, value in enumerate(losses):
            weight = min(max(counted - process * rows, 0), rows)
            self._loss, self._counted = self._loss + weight * value, self._counted + weight

    @property
    def loss(self) -> float:
        return self._loss / max(1.0, self._counted)

    def together(self) -> dict[str, Any]:
        """Return what :meth:`add` was given, of all batches."""
        found = {name: [part[name] for part in self._parts] for name in self._parts[0]}
        return {
            name: torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]
            for name, parts in found.items()
        }


class _FitProgress:
    """Says at once what moments the base has, and from then on, ever more rarely, how far the fit is."""

    def __init__(self, target: Target, budget: int) -> None:
        self.target, self.budget, self.samples = target, budget, 0
        self._begun, self._next = time.perf_counter(), 0.0

    def __call__(self, phi: Tensor, samples: int) -> None:
        now, self.samples = time.perf_counter() - self._begun, samples
        if now < self._next:
            return
        self._next = now + min(max(FIT_REPORTS, 2 * now), FIT_SILENCE)
        means, error = phi.mean(1), phi.size(0) ** -0.5
        spread = means.std(0) * error if len(means) > 1 else phi.flatten(0, 1).std(0) * phi.size(1) ** -0.5
        moments = zip(self.target.names, means.mean(0).tolist(), spread.tolist(), strict=True)
        base = ", ".join(f"{name} {mean:.3f} +- {se:.3f}" for name, mean, se in moments)
        left = now / self.samples * max(0, self.budget - self.samples)
        logger.warning(
            f"Fitting the target: the base has {base}; {self.samples} of at most {self.budget} samples, "
            f"{left:.0f} s more."
        )


class _FitsTarget(TrainerCallback):
    """Fits the target when training begins, and every process has its part of the weights."""

    def __init__(self, trainer: FDPGTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.fit_where_needed()
        if self.trainer.adjustment.truncates and self.trainer.resumed_from is None:
            self.trainer.tell_lost_mass()
