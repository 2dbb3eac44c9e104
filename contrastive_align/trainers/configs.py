"""The options of the three trainers, and what of TRL's options they refuse. Every default of the package is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from transformers.trainer_utils import SaveStrategy
from trl import DPOConfig, RLOOConfig, SFTConfig

from contrastive_align.data.columns import read_options
from contrastive_align.docstrings import option_texts
from contrastive_align.losses.contrastive import LOSSES, canonical_loss_name
from contrastive_align.losses.divergences import find_divergence
from contrastive_align.models.layout import LAYOUTS
from contrastive_align.ranges import Range, check_numbers
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.trainers.trials import check_mappings


Config = TypeVar("Config", bound=type)

# Arguments of TRL's trainers that have no meaning here: name -> the way out.
ARGUMENTS_NOT_SUPPORTED = {
    "compute_metrics": "it reads logits, which are never built. Read trainer.evaluate()'s metrics, or add a callback",
    "preprocess_logits_for_metrics": "no logits are built. Read trainer.evaluate()'s metrics",
    "compute_loss_func": "the loss is this class's. Subclass it and override compute_loss",
    "data_collator": "rows are collated in two forms, with and without condition. Leave it out",
    "formatting_func": "prompts and completions are told apart by their columns. Map the dataset before",
    "reward_processing_classes": (
        "a reward model brings its tokenizer. Give it as a feature: "
        "resolve_feature({'reward_model': model}, tokenizer=tokenizer)"
    ),
}

# Options of TRL and transformers that have no meaning here: option -> (why, the way out). Any value but the default of
# the TRL class raises.
NOT_SUPPORTED_ANYWHERE = {
    "neftune_noise_alpha": ("noise on the policy's embeddings alone would enter every log-ratio", "leave it out"),
    "label_smoothing_factor": ("it smooths labels over the vocabulary, which no loss here has", "leave it out"),
    "use_liger_kernel": (
        "it would replace the head that scores the completions",
        "set model_init_kwargs={'use_kernels': True}, as TRL recommends",
    ),
    "liger_kernel_config": ("it belongs to use_liger_kernel, which is not supported", "leave it out"),
    "auto_find_batch_size": (
        "the samples and metrics of a step that ran out of memory would count twice",
        "lower per_device_train_batch_size and raise gradient_accumulation_steps",
    ),
    "ignore_data_skip": ("a resumed run would train on its first rows again", "leave it out"),
}
NOT_SUPPORTED_CONTRASTIVE = {
    **NOT_SUPPORTED_ANYWHERE,
    "ld_alpha": ("LD-DPO compares the lengths of a pair", "use trl.DPOTrainer for it"),
    "f_divergence_type": ("f-DPO is defined on pair differences", "leave it out, or use trl.DPOTrainer"),
    "f_alpha_divergence_coef": ("f-DPO is defined on pair differences", "leave it out, or use trl.DPOTrainer"),
    "label_smoothing": (
        "soft labels come from the scores here",
        "for conservative DPO with error rate e, use loss_type='info_nca' and scores for which "
        "softmax(scores / temperature_alpha) is (1-e, e)",
    ),
    "use_weighting": ("WPO weighting is defined on pairs", "leave it out, or use trl.DPOTrainer"),
    "discopop_tau": ("the discopop loss is not offered here", "use trl.DPOTrainer"),
    "padding_free": ("TRL itself has switched it off for DPO", "leave it out"),
    "truncation_mode": (
        "cutting whole sequences at the left would give every completion of a group another prompt",
        "set max_prompt_length, which keeps the end of the prompt",
    ),
    "train_sampling_strategy": ("groups are drawn in random order", "leave it out"),
    "pad_token": ("TRL deprecates it", "set tokenizer.pad_token and pass it as processing_class"),
}
_OTHER_SAMPLES = "the samples must come from the very distribution whose log-probs weigh them"
_CLIPS = "PPO's surrogate clips a ratio that f-DPG uses as an importance weight"
NOT_SUPPORTED_FDPG = {
    **NOT_SUPPORTED_ANYWHERE,
    "min_p": (_OTHER_SAMPLES, "leave it out"),
    "repetition_penalty": (_OTHER_SAMPLES, "leave it at 1; a constraint on a repetition feature says the same"),
    "generation_kwargs": (_OTHER_SAMPLES, "leave it out"),
    "cache_implementation": ("the sampler keeps a cache of its own", "leave it out"),
    "num_iterations": (_CLIPS, "raise steps_per_generation: older samples are importance-weighted exactly"),
    "epsilon": (_CLIPS, "set max_importance_ratio"),
    "epsilon_high": (_CLIPS, "set max_importance_ratio"),
    "normalize_advantages": ("a pseudo-reward divided by its spread is no gradient of a divergence", "leave it out"),
    "reward_clip_range": ("it would change the target", "clip in the feature itself"),
    "mask_truncated_completions": (
        "completions cut at max_completion_length are samples of the policy like any other",
        "raise max_completion_length, or constrain a feature of the length",
    ),
    "sync_ref_model": ("the base is part of the target", "leave it out"),
    "dataloader_drop_last": ("every step is filled already: prompts that do not fill one are left out", "leave it out"),
}
_OWN_ROWS = "rows are made here, from prompts and the pool's completions"
NOT_SUPPORTED_CONDITIONAL = {
    **NOT_SUPPORTED_ANYWHERE,
    "packing": ("completions of a batch are packed by layout='shared' without cutting any", "leave it out"),
    "eval_packing": ("evaluation samples from the model", "leave it out"),
    "padding_free": ("layout='shared' has no padding", "leave it out"),
    "completion_only_loss": ("the loss is over completions, always", "leave it out"),
    "assistant_only_loss": ("the loss is over completions, always", "leave it out"),
    "loss_type": ("the loss is likelihood + KL - entropy", "set kl_coef and entropy_coef"),
    "dataset_text_field": (_OWN_ROWS, "give a column 'prompt'"),
    "dataset_kwargs": (_OWN_ROWS, "leave it out"),
    "truncation_mode": ("a completion that is cut keeps its beginning", "leave it out"),
    "shuffle_dataset": ("prompts and draws are in a random order, from the seed", "leave it out"),
    "chat_template_path": ("cloning a template adds tokens that nothing would train", "set tokenizer.chat_template"),
    "eos_token": ("it would move the end of the completions", "set tokenizer.eos_token and pass it"),
    "pad_token": ("TRL deprecates it", "set tokenizer.pad_token and pass it as processing_class"),
    "train_sampling_strategy": ("draws are balanced over the conditions", "leave it out"),
    "dataloader_persistent_workers": ("workers would go on reading the round before", "leave it out"),
    "dataloader_drop_last": ("a round has whole steps already", "leave it out"),
}
# Refused where the groups are the policy's own samples.
NOT_SUPPORTED_ONLINE = {
    "max_tokens_per_batch": ("the groups of later rounds are not known beforehand", "leave it out"),
    "precompute_ref_log_probs": ("there are no groups before the first round", "leave it out"),
    "sync_ref_model": ("rounds move the reference", "set reference='round'"),
    "dataloader_drop_last": ("a round has whole steps already", "leave it out"),
    "dataloader_persistent_workers": ("workers would go on reading the round before", "leave it out"),
    "first_score_bonus": ("the first of a group's own samples is like any other", "leave it out"),
    "hard_pairs": ("own samples are no pairs", "leave it out"),
    "max_prompt_length": ("samples are of whole prompts, and those without room are left out", "leave it out"),
}
REFERENCES = ("round", "start")
KL_DIRECTIONS = ("reverse", "forward")
VLLM_MODES = ("server", "colocate")
VLLM_TEMPERATURES = (0.01, 2)  # vLLM moves a lower one there, and refuses a higher one
PROPOSALS = ("policy", "kept")
PROPOSAL_CRITERIA = ("kl", "tv", "js")
BASELINES = ("leave_one_out", "window", "none")
ON_BAD_ROW = ("raise", "drop")
AUTO = "auto"


def check_options(config: Any, base: type, table: dict[str, tuple[str, str]], trainer: str) -> None:
    """Refuse options without a meaning, and numbers outside their range, before TRL reads them.

    Args:
        config: the options.
        base: the class of TRL whose defaults the options of ``table`` must have.
        table: option -> why it has no meaning, the way out.
        trainer: its name.

    Raises:
        ValueError: naming the option, and the reason and the way out or the range.
    """
    defaults = {f.name: f.default for f in fields(base)}
    for name, (why, way_out) in table.items():
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not supported by {trainer}: {why}. Way out: {way_out}."
            )
    check_numbers(config)
    check_mappings(config)


def option_of(base: type, name: str) -> Any:
    """Return an option of another dataclass, for a class of one's own: its default and its help.

    Raises:
        TypeError: the other class has no such option.
    """
    found = next((f for f in fields(base) if f.name == name), None)
    if found is None:
        raise TypeError(
            f"{base.__name__} has no option {name!r}: TRL renamed or dropped it. Use a version that has it."
        )
    return field(default=found.default, metadata=dict(found.metadata))


def _number_or_auto(value: Any) -> float | str:
    """Read text as a number or as the word auto; return what is neither as text.

    >>> _number_or_auto("1e-4"), _number_or_auto(" Auto"), _number_or_auto("warm")
    (0.0001, 'auto', 'warm')
    """
    if str(value).strip().lower() == AUTO:
        return AUTO
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def describe_options(**choices: tuple[str, ...]) -> Callable[[Config], Config]:
    """Give the fields of a config the help that its docstring has for them, and the choices of some of them.

    The command line shows both, so that an option is described in one place.
    """

    def describe(cls: Config) -> Config:
        help_of = option_texts(cls.__doc__ or "")
        cls.choices = {**getattr(cls, "choices", {}), **choices}
        for option in fields(cls):
            if option.name in vars(cls).get("__annotations__", {}):
                described = {"help": help_of.get(option.name)} | dict(option.metadata)
                if option.name in choices:
                    described["choices"] = list(choices[option.name])
                option.metadata = MappingProxyType(described)
        return cls

    return describe


def check_choices(config: Any) -> None:
    """Raise ValueError where an option is none of its choices."""
    for name, known in config.choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected one of {', '.join(known)}.")


@describe_options(vllm_mode=VLLM_MODES)
@dataclass(kw_only=True)
class SamplingOptions:
    """Options of a trainer that samples rounds itself.

    Args:
        prompts_per_round (`int`, *optional*):
            Number of prompts sampled in a round; by default all prompts of the dataset. The next round goes on with the
            prompts that follow.
        num_generations (`int`, defaults to `8`):
            Number of completions sampled for a prompt, the K of its group.
        max_completion_length (`int`, defaults to `256`):
            Longest sampled completion, in tokens. A completion that is cut there is trained on without an EOS token.
        temperature (`float`, defaults to `1.0`):
            Sampling temperature. 1 samples from the policy itself; a lower one prefers likely tokens.
        top_k (`int`, defaults to `0`):
            Sample from the k likeliest tokens only. 0 samples from all tokens.
        top_p (`float`, defaults to `1.0`):
            Nucleus sampling: sample from the smallest set of tokens whose probabilities add up to `top_p`. 1 samples
            from all tokens.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the sum that is the score; 1 each by default.
        pool_dir (`str`, *optional*):
            Folder of the pool, which keeps the samples of all rounds; `output_dir`/pool by default.
        rows_at_once (`int`, defaults to `256`):
            Largest number of completions decoded in one batch. With a colocated vLLM it is vLLM's `max_num_seqs` on
            each GPU.
        ds3_gather_for_generation (`bool`, defaults to `True`):
            Under ZeRO-3 and FSDP2, gather all weights once before sampling. `False` gathers one layer at a time in each
            decoding step: slower, for a model that does not fit on one device.
        use_vllm (`bool`, defaults to `False`):
            Sample with vLLM, as in :class:`trl.RLOOConfig`. vLLM receives the weights before each round and each
            evaluation. Its random numbers are its own, so `seed` does not repeat its samples; samples that the pool
            already has are not drawn again. Tested with a stand-in for TRL's client, not with vLLM on a GPU.
        vllm_mode, vllm_model_impl, vllm_enable_sleep_mode, vllm_server_base_url, vllm_server_host,
        vllm_server_port, vllm_server_timeout, vllm_group_port, vllm_gpu_memory_utilization, vllm_max_model_length,
        vllm_tensor_parallel_size:
            With `use_vllm`: the same option as in :class:`trl.RLOOConfig`.
    """

    prompts_per_round: int | None = None
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    reward_weights: list[float] | None = None
    pool_dir: str | None = None
    rows_at_once: int = 256
    ds3_gather_for_generation: bool = True
    use_vllm: bool = option_of(RLOOConfig, "use_vllm")
    vllm_mode: str = option_of(RLOOConfig, "vllm_mode")
    vllm_model_impl: str = option_of(RLOOConfig, "vllm_model_impl")
    vllm_enable_sleep_mode: bool = option_of(RLOOConfig, "vllm_enable_sleep_mode")
    vllm_server_base_url: str | None = option_of(RLOOConfig, "vllm_server_base_url")
    vllm_server_host: str = option_of(RLOOConfig, "vllm_server_host")
    vllm_server_port: int = option_of(RLOOConfig, "vllm_server_port")
    vllm_server_timeout: float = option_of(RLOOConfig, "vllm_server_timeout")
    vllm_group_port: int = option_of(RLOOConfig, "vllm_group_port")
    vllm_gpu_memory_utilization: float = option_of(RLOOConfig, "vllm_gpu_memory_utilization")
    vllm_max_model_length: int | None = option_of(RLOOConfig, "vllm_max_model_length")
    vllm_tensor_parallel_size: int = option_of(RLOOConfig, "vllm_tensor_parallel_size")

    def check_sampling(self, better: str) -> None:
        """Refuse, once the other options are set, those that rounds of samples cannot have.

        Args:
            better: a metric that evaluation gives, and what it is for.

        Raises:
            ValueError: naming the option and the way out.
        """
        if self.metric_for_best_model in ("loss", "eval_loss"):  # which the Trainer takes where none is given
            raise ValueError(
                "load_best_model_at_end (or a scheduler) follows the metric 'loss', which evaluate does not give here. "
                f"Set metric_for_best_model to one that it does: {better}."
            )
        lowest, highest = VLLM_TEMPERATURES
        if self.use_vllm and not lowest <= self.temperature <= highest:
            raise ValueError(
                f"temperature is {self.temperature} with use_vllm, which takes {lowest:g} to {highest:g}. Change it, "
                "or leave use_vllm out."
            )
        if self.save_only_model and self.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "save_only_model=True leaves checkpoints that no run can go on from, and the pool of one that is "
                "stopped would be lost. Leave it out; save_total_limit=1 keeps one checkpoint."
            )


@describe_options(layout=LAYOUTS, on_bad_row=ON_BAD_ROW, reference=REFERENCES)
@dataclass
class ContrastiveConfig(DPOConfig, SamplingOptions):
    """Options of :class:`~contrastive_align.ContrastiveTrainer` beside those of :class:`trl.DPOConfig`.

    Args:
        loss_type (`list[str]`, defaults to `["nca"]`):
            One or more of nca, info_nca, biased_nca, dpo, dpo_best_vs_rest, plackett_luce, sft; several are summed with
            `loss_weights`. Case and punctuation do not matter (InfoNCA). TRL's names sigmoid, nca_pair and bco_pair
            mean dpo, nca and biased_nca. A loss of your own is `file.py:function`, a name given to `register_loss`, or
            in Python the function itself.
        temperature_alpha (`float` or `"auto"`, defaults to `"auto"`):
            Softness of the labels softmax(scores / temperature_alpha) of a group (NCA and InfoNCA). `"auto"` takes the
            temperature at which the mean entropy of the labels is half of the largest possible, or midway between its
            limits where tied best scores keep it higher; a resumed run keeps its own. Pairs always have hard labels,
            and a stream needs a number. The published 1e-4 makes labels one-hot unless scores are equal.
        max_prompt_length (`int`, *optional*):
            Longest prompt, in tokens; of a longer one the end is kept. By default prompts stay whole, and groups whose
            prompt leaves no room under `max_length` are dropped and counted.
        on_bad_row (`str`, defaults to `"raise"`):
            `"raise"` stops at the first row that cannot be trained on and names it; `"drop"` leaves such rows out,
            counts them and shows the first.
        columns (`str` or `dict`, *optional*):
            Which column holds which part of a group, where its name does not say so:
            `prompt=question,completions=answers`, or a mapping. Parts: prompt, system, history, completions, scores,
            completion, score, chosen, rejected, tools. `+` joins columns: `completions=left+right`. `prompt=` with
            nothing after it: the prompt is what chosen and rejected share.
        score_column (`str`, *optional*):
            Which column holds the score, where several could: `helpfulness`.
        hard_pairs (`bool`, defaults to `False`):
            Give pairs the scores (1, 0), even rated ones, as `preference` does.
        layout (`str`, defaults to `"auto"`):
            `"shared"`: the completions of a group share one copy of their prompt, which is computed once. `"padded"`: a
            row for each completion. `"auto"` tries `"shared"` on a small batch and, where the log-probs differ, warns
            and takes `"padded"`.
        max_tokens_per_batch (`int`, *optional*):
            Fill batches by tokens: groups of similar length, up to this many tokens and `per_device_train_batch_size`
            groups, drawn anew in every epoch. The tokens counted are those that the layout computes: each prompt once
            and its completions (shared), or rows times the longest row (padded). An optimiser step remains
            `gradient_accumulation_steps` batches on every process, and its loss the mean over their groups. By default
            a batch has a fixed number of groups.
        first_score_bonus (`float`, defaults to `0.0`):
            Added to the score of each group's first completion. The published run adds 0.01, which at temperature_alpha
            = 1e-4 decides every tie.
        ref_log_probs_folder (`str`, *optional*):
            Folder that `contrastive-align reference` wrote; by default beside the data.
        allow_pickled_adapter (`bool`, defaults to `False`):
            Accept an adapter in a pickle, read with weights_only=True.
        online (`bool`, defaults to `False`):
            Train on the policy's own samples: the dataset gives the prompts, a reward or judge the scores
            (`contrastive-align reward --online -h`).
        num_rounds (`int`, defaults to `4`):
            Online: number of rounds of sampling and training. A round is an epoch of the Trainer.
        draws_per_round (`int`, *optional*):
            Online: number of groups trained on in a round, rounded up to whole optimiser steps; by default as many as a
            round samples. No group comes twice before every group has come once.
        reference (`str`, defaults to `"round"`):
            Online: which model implied rewards are measured from. `"round"`: the policy at the beginning of each round,
            from which the round's samples are drawn, as NCA assumes. `"start"`: the model that the run starts with.
        keep (`int`, defaults to `0`):
            Online: number of earlier rounds whose groups a round trains on again.
        resample (`int`, defaults to `0`):
            Online: how many more times a prompt is sampled while all its completions score the same. Groups whose
            scores stay equal are left out and counted.
        scored_share (`float`, defaults to `0.5`):
            Online, with `scored_dataset`: share of a round's groups that are taken from it.
    """

    loss_type: list[str] = field(default_factory=lambda: ["nca"])
    temperature_alpha: float | str | None = "auto"  # None is refused: it makes HfArgumentParser read text
    max_prompt_length: int | None = None
    on_bad_row: str = "raise"
    columns: dict[str, str] | str | None = None
    score_column: str | None = None
    hard_pairs: bool = False
    layout: str = "auto"
    max_tokens_per_batch: int | None = None
    first_score_bonus: float = 0.0
    ref_log_probs_folder: str | None = None
    allow_pickled_adapter: bool = False
    online: bool = False
    num_rounds: int = 4
    draws_per_round: int | None = None
    reference: str = "round"
    keep: int = 0
    resample: int = 0
    scored_share: float = 0.5

    def __post_init__(self):
        if isinstance(self.loss_type, str) or callable(self.loss_type):
            self.loss_type = [self.loss_type]
        self.loss_type = [canonical_loss_name(name) for name in self.loss_type]
        self.temperature_alpha = _number_or_auto(self.temperature_alpha)
        check_options(self, DPOConfig, NOT_SUPPORTED_CONTRASTIVE, "ContrastiveTrainer")
        _check_loss_weights(self.loss_type, self.loss_weights)
        _name_checkpointing_anew(self)
        super().__post_init__()
        check_choices(self)
        read_options(self.columns, self.score_column)
        if self.max_tokens_per_batch is not None:
            self._check_batches_by_tokens()
        if None not in (self.max_prompt_length, self.max_length) and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length} with max_length {self.max_length}, expected a number "
                "from 1 up to less than max_length, so that completions have room."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches=True cuts batches by rows, which would cut groups apart. Leave "
                "it out."
            )
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config.even_batches=False lets processes run out of batches at different steps. Leave it "
                "out: the rows repeated to fill the last batch weigh nothing."
            )
        if self.online:
            self.go_online()

    @classmethod
    def of_own_samples(cls) -> dict[str, Any]:
        """Return the options that mean something online alone, and their defaults."""
        own = {f.name for f in fields(SamplingOptions)}
        own |= {"num_rounds", "draws_per_round", "reference", "keep", "resample", "scored_share"}
        return {f.name: f.default for f in fields(cls) if f.name in own}

    def go_online(self) -> None:
        """Make an epoch a round; refuse options that own samples cannot have.

        Raises:
            ValueError: naming the option and the way out.
        """
        self.online = True
        defaults = {f.name: f.default for f in fields(ContrastiveConfig)}
        for name, (why, way_out) in NOT_SUPPORTED_ONLINE.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported online: {why}. Way out: {way_out}.")
        if self.num_train_epochs not in (defaults["num_train_epochs"], self.num_rounds):
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs:g} online, where an epoch is a round. Set num_rounds "
                f"(it is {self.num_rounds}); draws_per_round says how many groups are trained on in a round."
            )
        self.num_train_epochs = self.num_rounds
        self.check_sampling("'reward', the mean reward of samples of the evaluation prompts")

    def _check_batches_by_tokens(self) -> None:
        if self.accelerator_config.split_batches:
            raise ValueError(
                "accelerator_config.split_batches=True cuts batches of one size into equal parts, and with "
                "max_tokens_per_batch batches differ in size. Leave one of the two out."
            )
        if self.dataloader_drop_last:
            raise ValueError(
                "dataloader_drop_last=True drops the batch that falls short of the batch size, and with "
                "max_tokens_per_batch none does. Leave it out: every group is trained on once an epoch."
            )


def _name_checkpointing_anew(args: Any) -> None:
    """Give transformers the new name of what TRL's configs call ``gradient_checkpointing``, which it deprecates."""
    for end in ("checkpointing", "checkpointing_kwargs"):
        old, new = f"gradient_{end}", f"activation_{end}"
        if hasattr(args, new) and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def _check_loss_weights(names: list[str], weights: list[float] | None) -> None:
    if not names:
        raise ValueError(f"loss_type is empty, expected one or more of {', '.join(LOSSES)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type names a loss twice: {names}. Name each once and set its weight in loss_weights.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} numbers for the {len(names)} losses {names}, expected one each."
        )


@describe_options(layout=LAYOUTS, baseline=BASELINES, proposal=PROPOSALS, proposal_criterion=PROPOSAL_CRITERIA)
@dataclass
class FDPGConfig(RLOOConfig):
    """Options of :class:`~contrastive_align.FDPGTrainer` beside those of :class:`trl.RLOOConfig`.

    Args:
        divergence (`str`, defaults to `"js"`):
            Divergence between policy and target that training minimises: kl (DPG, GDC, CDPG), reverse_kl (with
            `Target.from_reward` the KL-controlled reward of RLHF), js, tv, chi2, reverse_chi2 or alpha:<a>. A
            divergence of your own is `file.py:function` or a name given to ``register_divergence``.
        baseline (`str`, defaults to `"leave_one_out"`):
            What is subtracted from the pseudo-reward: `"leave_one_out"`, the mean over the prompt's other samples;
            `"window"`, the mean over all prompts of earlier steps; or `"none"`.
        baseline_window (`int`, defaults to `10`):
            With `baseline="window"`: number of most recent generations that the mean is over.
        proposal (`str`, defaults to `"policy"`):
            Model that samples are drawn from. `"policy"`: the current policy. `"kept"`: the base at first, replaced by
            the policy whenever the policy is nearer to the target (KL-adaptive DPG, GDC). `"kept"` costs a forward pass
            of the policy on the samples and, after the first replacement, a copy of the trained weights.
        proposal_criterion (`str`, defaults to `"kl"`):
            With `proposal="kept"`: divergence from the target by which policy and proposal are compared: kl
            (KL(target||.)), tv or js.
        proposal_window (`int`, defaults to `10`):
            With `proposal="kept"`: number of most recent generations that the comparison uses.
        temperature (`float`, defaults to `1.0`):
            Sampling temperature in training. Samples are weighted with pi/q, where q is the distribution at this
            temperature, so that the gradient remains that of the policy. Evaluation always samples at 1.
        top_k (`int`, defaults to `0`):
            Train on samples from the k likeliest tokens of each position only; 0 takes all tokens. The policy is not
            trained on other tokens; the share of the target's mass there is printed when training begins and at each
            evaluation.
        top_p (`float`, defaults to `1.0`):
            As `top_k`, with the smallest set of tokens whose probabilities add up to `top_p`, after temperature and
            top_k.
        max_importance_ratio (`float`, *optional*):
            Upper limit of the importance weight pi/q. The weight is 1 where each optimiser step draws its samples from
            the current policy.
        fit_samples (`int`, defaults to `4096`):
            Number of samples of the base with which the search for the target's lambdas begins, over many prompts
            chosen at random. More are drawn until the moments are known to `fit_tolerance`. Not used if the target has
            its lambdas.
        fit_max_samples (`int`, *optional*):
            Largest number of samples that the search for the lambdas draws; 16 times `fit_samples` by default.
        fit_tolerance (`float`, defaults to `0.01`):
            Standard error of the fitted moments at which the search for the lambdas ends, as a share of each feature's
            range.
        fit_min_ess (`float`, defaults to `20.0`):
            Smallest effective sample size that the fit of the lambdas may have. The run stops below it.
        layout, allow_pickled_adapter:
            As in :class:`~contrastive_align.ContrastiveConfig`.
        num_generations (`int`, defaults to `16`):
            Number of completions sampled for a prompt, the K of its group.
        per_device_train_batch_size (`int`, defaults to `16`):
            Number of completions that a device trains on at once, a multiple of `num_generations`.
        beta (`float`, defaults to `0.05`):
            With reward functions and no target: the target is base * exp(reward / beta).
        disable_dropout (`bool`, defaults to `True`):
            Switch dropout off in training, as samples are drawn without it.
    """

    RANGES: ClassVar[dict[str, Range]] = {"num_generations": Range(2, whole=True)}

    divergence: str = "js"
    baseline: str = "leave_one_out"
    baseline_window: int = 10
    proposal: str = "policy"
    proposal_criterion: str = "kl"
    proposal_window: int = 10
    temperature: float = option_of(RLOOConfig, "temperature")
    top_k: int = option_of(RLOOConfig, "top_k")
    top_p: float = option_of(RLOOConfig, "top_p")
    max_importance_ratio: float | None = None
    fit_samples: int = 4096
    fit_max_samples: int | None = None
    fit_tolerance: float = 0.01
    fit_min_ess: float = 20.0
    layout: str = option_of(ContrastiveConfig, "layout")
    allow_pickled_adapter: bool = option_of(ContrastiveConfig, "allow_pickled_adapter")
    num_generations: int = 16
    per_device_train_batch_size: int = 16
    disable_dropout: bool = True

    def __post_init__(self):
        check_options(self, RLOOConfig, NOT_SUPPORTED_FDPG, "FDPGTrainer")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size} samples, expected a multiple of "
                f"num_generations={self.num_generations}: the samples of a prompt stay together. Raise "
                "gradient_accumulation_steps for larger steps."
            )
        _name_checkpointing_anew(self)
        super().__post_init__()
        self.divergence = find_divergence(self.divergence)
        check_choices(self)
        if self.proposal == "kept" and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError(
                "proposal='kept' is drawn from by exchanging weights, which use_vllm and "
                "use_transformers_continuous_batching do not see. Leave these out, or set proposal='policy'."
            )
        adjustment = Adjustment(self.temperature, self.top_k, self.top_p)
        if adjustment.changes:
            for name, why in {
                "use_vllm": "it does not tell which tokens it chose from",
                "use_transformers_continuous_batching": "it does not tell which tokens it chose from",
                "proposal": "it compares the policy with the distribution that samples are drawn from",
            }.items():
                if getattr(self, name) in (True, "kept"):
                    raise ValueError(f"{adjustment} with {name}={getattr(self, name)!r}: {why}. Leave out one of them.")
        eval_generations = self.num_generations_eval or self.num_generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % eval_generations:
            raise ValueError(
                f"per_device_eval_batch_size is {self.per_device_eval_batch_size} samples, expected a multiple of the "
                f"{eval_generations} samples of a prompt (num_generations_eval)."
            )


# Options of completions that are there already.
OF_SCORED = ("score_column", "feedback_column", "negate_score")


@describe_options(layout=LAYOUTS, kl_direction=KL_DIRECTIONS, on_bad_row=ON_BAD_ROW)
@dataclass
class ConditionalConfig(SFTConfig, SamplingOptions):
    """Options of :class:`~contrastive_align.ConditionalTrainer` beside those of :class:`trl.SFTConfig`.

    Args:
        num_train_epochs (`float`, defaults to `4`):
            Number of rounds: sample, score, add to the pool, train. From scored data, number of passes over the draws.
        num_generations (`int`, defaults to `10`):
            Number of completions sampled for a prompt, the K of its group.
        draws_per_round (`int`, *optional*):
            Number of completions trained on in a round, balanced over the conditions and rounded up to whole optimiser
            steps; by default as many as a round samples. From scored data: by default as many as the data hold.
        drop_factor (`float`, defaults to `0.0`):
            Share of each condition's earlier samples that leaves the pool in a round. 0 keeps all samples; 1 keeps
            those of the newest round only.
        kl_coef (`float`, defaults to `0.05`):
            Weight of the KL to the reference, which is in nats per completion token. With 0 no reference is loaded.
        kl_direction (`str`, defaults to `"reverse"`):
            Direction of that KL. `"reverse"`: KL(policy || reference), as in Quark. `"forward"`: KL(reference ||
            policy), as in ALT.
        entropy_coef (`float`, defaults to `0.06`):
            Weight of the entropy bonus; the entropy is in nats per completion token.
        kl_target (`float`, *optional*):
            KL in nats per token that training aims at by adapting `kl_coef` after every step. By default `kl_coef` is
            fixed.
        entropy_target (`float`, *optional*):
            Entropy in nats per token that training aims at by adapting `entropy_coef` after every step. By default
            `entropy_coef` is fixed.
        coef_horizon (`int`, defaults to `10000`):
            With `kl_target` or `entropy_target`: number of completions over which the coefficient adapts. A larger one
            adapts more slowly.
        unfrozen_layers_ratio (`float`, defaults to `1.0`):
            Share of the layers that is trained, counted from the top; the lower layers are frozen.
        layout (`str`, defaults to `"auto"`):
            `"shared"`: all rows of a batch are packed into one, without padding. `"padded"`: a row for each completion.
            `"auto"` tries `"shared"` on a small batch and, where the log-probs differ, warns and takes `"padded"`.
        disable_dropout (`bool`, defaults to `True`):
            Switch dropout off in training, as completions are sampled and the reference is computed without it.
        columns (`str` or `dict`, *optional*):
            Which column holds which part, where its name does not say so: `prompt=question,completions=answers`.
        score_column (`str`, *optional*):
            Train on scored completions: the column that holds the score, where several could be it.
        feedback_column (`str`, *optional*):
            Train on judged completions: the column that holds the judge's words; by default `feedback`.
        negate_score (`bool`, defaults to `False`):
            Scores of the data are better when lower, such as toxicity.
        on_bad_row (of scored data), allow_pickled_adapter:
            As in :class:`~contrastive_align.ContrastiveConfig`.
    """

    num_train_epochs: float = 4
    num_generations: int = field(default=10, kw_only=True)  # not the first of all, as a field of a base would be
    draws_per_round: int | None = None
    drop_factor: float = 0.0
    kl_coef: float = 0.05
    kl_direction: str = "reverse"
    entropy_coef: float = 0.06
    kl_target: float | None = None
    entropy_target: float | None = None
    coef_horizon: int = 10_000
    unfrozen_layers_ratio: float = 1.0
    layout: str = "auto"
    disable_dropout: bool = True
    columns: dict[str, str] | str | None = None
    score_column: str | None = None
    feedback_column: str | None = None
    negate_score: bool = False
    on_bad_row: str = option_of(ContrastiveConfig, "on_bad_row")
    allow_pickled_adapter: bool = option_of(ContrastiveConfig, "allow_pickled_adapter")

    def __post_init__(self):
        check_options(self, SFTConfig, NOT_SUPPORTED_CONDITIONAL, "ConditionalTrainer")
        best = (self.metric_for_best_model or "").split("/")[0]  # of several evaluation sets, their names are in it
        if self.greater_is_better is None and best.split("_")[-1] == "nll":
            self.greater_is_better = False  # else everything is, whose name does not end in "loss"
        _name_checkpointing_anew(self)
        super().__post_init__()
        check_choices(self)
        read_options(self.columns, self.score_column)
        self.check_sampling("'reward_given/<quantile_0>' for instance, or from scored data 'nll/<quantile_0>'")
        for name, coefficient in (("kl_target", self.kl_coef), ("entropy_target", self.entropy_coef)):
            if getattr(self, name) is not None and coefficient == 0:
                raise ValueError(
                    f"{name} adapts {name.replace('target', 'coef')}, which is 0 and would stay so. Give it a start."
                )
