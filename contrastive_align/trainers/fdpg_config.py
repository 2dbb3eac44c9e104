"""The options of :class:`~contrastive_align.FDPGTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import RLOOConfig

from contrastive_align.losses.divergences import canonical_divergence_name
from contrastive_align.models.layout import LAYOUTS
from contrastive_align.trainers.options import check_positive, refuse
from contrastive_align.trainers.proposal import CRITERIA


PROPOSALS = ("policy", "kept")
BASELINES = ("leave_one_out", "window", "none")
_PLAIN = "the samples must come from the very distribution whose log-probs weigh them"
_CLIPPED = "PPO's surrogate clips a ratio that f-DPG uses as an importance weight"
# What RLOO offers and f-DPG does not mean: option -> (why, the way out). Any value but TRL's default raises.
NOT_SUPPORTED = {
    "temperature": (_PLAIN, "leave it at 1"),
    "top_p": (_PLAIN, "leave it at 1"),
    "top_k": (_PLAIN, "leave it at 0"),
    "min_p": (_PLAIN, "leave it out"),
    "repetition_penalty": (_PLAIN, "leave it at 1; a constraint on a repetition feature says the same"),
    "generation_kwargs": (_PLAIN, "leave it out"),
    "cache_implementation": ("the sampler keeps a cache of its own", "leave it out"),
    "num_iterations": (_CLIPPED, "raise steps_per_generation: older samples are importance-weighted exactly"),
    "epsilon": (_CLIPPED, "set max_importance_ratio"),
    "epsilon_high": (_CLIPPED, "set max_importance_ratio"),
    "normalize_advantages": ("a pseudo-reward divided by its spread is no gradient of a divergence", "leave it out"),
    "reward_clip_range": ("it would change the target", "clip in the feature itself"),
    "mask_truncated_completions": (
        "completions cut at max_completion_length are samples of the policy like any other",
        "raise max_completion_length, or constrain a feature of the length",
    ),
    "sync_ref_model": ("the base is part of the target", "leave it out"),
    "use_liger_kernel": ("it would replace the head that scores the completions", "leave it out"),
}


@dataclass
class FDPGConfig(RLOOConfig):
    """Options of :class:`~contrastive_align.FDPGTrainer`: those of :class:`trl.RLOOConfig`, and

    Args:
        divergence (`str`, defaults to `"js"`):
            What is minimised between policy and target: kl (DPG, GDC, CDPG), reverse_kl (on `Target.from_reward` the
            KL-controlled reward of RLHF), js, tv, chi2, reverse_chi2 or alpha:<a>.
        baseline (`str`, defaults to `"leave_one_out"`):
            Taken off the pseudo-reward: `"leave_one_out"`, the mean over the other samples of the prompt; `"window"`,
            the mean over all prompts of earlier steps; or `"none"`.
        baseline_window (`int`, defaults to `10`):
            With `baseline="window"`: over how many of the last times samples were drawn.
        proposal (`str`, defaults to `"policy"`):
            What samples are drawn from: `"policy"`, as it is; or `"kept"`, the base at first, replaced by the policy
            when that is nearer to the target (KL-adaptive DPG, GDC). It costs a forward of the policy on the samples
            and, once it was replaced, a copy of the trained weights: of the adapter, or of the whole model.
        proposal_criterion (`str`, defaults to `"kl"`):
            With `proposal="kept"`: nearer by kl, KL(target||.), tv or js.
        proposal_window (`int`, defaults to `10`):
            With `proposal="kept"`: by the samples of how many of the last times samples were drawn.
        max_importance_ratio (`float`, *optional*):
            pi/q is cut here. It is 1 where every optimiser step has samples of its own.
        fit_samples (`int`, defaults to `4096`):
            Samples of the base from which the target's lambdas are found, if they are not known yet.
        fit_min_ess (`float`, defaults to `20.0`):
            Smallest effective sample size of that fit; below it the run stops.
        layout (`str`, defaults to `"auto"`):
            As in :class:`~contrastive_align.ContrastiveConfig`.
        num_generations (`int`, defaults to `16`):
            Samples of a prompt, the K of its group.
        beta (`float`, defaults to `0.05`):
            With reward functions and no target: the target is base * exp(reward / beta).
        disable_dropout (`bool`, defaults to `True`):
            Samples are drawn without dropout, so their log-probs are taken without it.
    """

    divergence: str = field(
        default="js",
        metadata={"help": "Between policy and target: kl, reverse_kl, js, tv, chi2, reverse_chi2 or alpha:<a>."},
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={"help": "Taken off the pseudo-reward.", "choices": list(BASELINES)},
    )
    baseline_window: int = field(
        default=10, metadata={"help": "With baseline='window': its mean is over so many of the last steps."}
    )
    proposal: str = field(
        default="policy",
        metadata={
            "help": "Samples come from the policy, or from one 'kept' until the policy is nearer to the target.",
            "choices": list(PROPOSALS),
        },
    )
    proposal_criterion: str = field(
        default="kl", metadata={"help": "With proposal='kept': nearer by this.", "choices": list(CRITERIA)}
    )
    proposal_window: int = field(
        default=10, metadata={"help": "With proposal='kept': by the samples of so many of the last steps."}
    )
    max_importance_ratio: float | None = field(
        default=None, metadata={"help": "Importance weights policy/proposal are cut here."}
    )
    fit_samples: int = field(
        default=4096, metadata={"help": "Samples of the base for the fit of the target, if it is not fitted."}
    )
    fit_min_ess: float = field(default=20.0, metadata={"help": "Smallest effective sample size of that fit."})
    layout: str = field(
        default="auto",
        metadata={
            "help": "The prompt once for all completions ('shared'), or once for each.",
            "choices": list(LAYOUTS),
        },
    )
    num_generations: int = field(default=16, metadata={"help": "Samples of a prompt."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Samples on a device at once: whole groups of num_generations."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Take log-probs without dropout."})

    def __post_init__(self):
        refuse(self, RLOOConfig, NOT_SUPPORTED, "FDPGTrainer")
        super().__post_init__()
        self.divergence = canonical_divergence_name(self.divergence)
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}, expected one of {', '.join(BASELINES)}.")
        check_positive("baseline_window", self.baseline_window)
        for name, known in (("proposal", PROPOSALS), ("proposal_criterion", CRITERIA)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        check_positive("proposal_window", self.proposal_window)
        if self.proposal == "kept" and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError(
                "proposal='kept' is drawn from by exchanging weights, which use_vllm and "
                "use_transformers_continuous_batching do not see. Leave these out, or set proposal='policy'."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}.")
        if self.max_importance_ratio is not None:
            check_positive("max_importance_ratio", self.max_importance_ratio)
        check_positive("beta", self.beta)
        check_positive("fit_samples", self.fit_samples)
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size} samples, expected a multiple of "
                f"num_generations={self.num_generations}: the samples of a prompt stay together. Raise "
                "gradient_accumulation_steps for larger steps."
            )
        eval_generations = self.num_generations_eval or self.num_generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % eval_generations:
            raise ValueError(
                f"per_device_eval_batch_size is {self.per_device_eval_batch_size} samples, expected a multiple of the "
                f"{eval_generations} samples of a prompt (num_generations_eval)."
            )
