"""The options of :class:`~contrastive_align.ContrastiveTrainer`; every default of the package is here."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from contrastive_align.losses import LOSSES, canonical_loss_name
from contrastive_align.models.layout import LAYOUTS
from contrastive_align.trainers.options import check_positive, refuse


# What TRL's class offers and groups of K do not have: option -> (why, the way out). Any value but TRL's default raises.
NOT_SUPPORTED = {
    "ld_alpha": ("LD-DPO compares the lengths of a pair", "use trl.DPOTrainer for it"),
    "f_divergence_type": ("f-DPO is defined on pair differences", "leave it out, or use trl.DPOTrainer"),
    "f_alpha_divergence_coef": ("f-DPO is defined on pair differences", "leave it out, or use trl.DPOTrainer"),
    "label_smoothing": (
        "soft labels come from the scores here",
        "set scores and temperature_alpha: scores (1-e, e)-like gaps on info_nca are conservative DPO",
    ),
    "use_weighting": ("WPO weighting is defined on pairs", "leave it out, or use trl.DPOTrainer"),
    "discopop_tau": ("the discopop loss is not offered here", "use trl.DPOTrainer"),
    "label_smoothing_factor": ("soft labels come from the scores here", "leave it out"),
    "padding_free": ("TRL itself has switched it off for DPO", "leave it out"),
    "truncation_mode": (
        "cutting whole sequences at the left would give every completion of a group another prompt",
        "set max_prompt_length, which keeps the end of the prompt",
    ),
    "neftune_noise_alpha": (
        "noise on the policy's embeddings alone would enter every log-ratio",
        "leave it out",
    ),
    "train_sampling_strategy": ("groups are drawn in random order", "leave it out"),
    "pad_token": ("TRL deprecates it", "set tokenizer.pad_token and pass it as processing_class"),
}


@dataclass
class ContrastiveConfig(DPOConfig):
    """Options of :class:`~contrastive_align.ContrastiveTrainer`: those of :class:`trl.DPOConfig`, and

    Args:
        loss_type (`list[str]`, defaults to `["nca"]`):
            Names in ``contrastive_align.losses.LOSSES``: nca, info_nca, biased_nca, dpo, dpo_best_vs_rest,
            plackett_luce, sft. Free of case and punctuation (NCA, InfoNCA); TRL's sigmoid, nca_pair and bco_pair are
            dpo, nca and biased_nca. Several are summed with ``loss_weights``.
        temperature_alpha (`float`, defaults to `1e-4`):
            Labels are softmax(scores / temperature_alpha) over the completions of a group (NCA and InfoNCA). The
            default, the published run's, makes them one-hot unless scores are equal.
        max_prompt_length (`int`, *optional*):
            Longest prompt in tokens; longer ones keep their end. Without it prompts stay whole and groups whose prompt
            leaves no room under `max_length` are dropped and counted.
        on_bad_row (`str`, defaults to `"raise"`):
            `"raise"` stops at the first row that cannot be trained on, with row and column; `"drop"` leaves such rows
            out, counts them and shows the first.
        layout (`str`, defaults to `"auto"`):
            `"shared"`: the completions of a group share one copy of their prompt, which is computed once. `"padded"`: a
            row for each completion. `"auto"` tries the first on a small batch and takes the second, with a warning,
            where the model gives other log-probs.
        max_tokens_per_batch (`int`, *optional*):
            Training batches by tokens: groups of similar length share one, as many as stay within this many tokens and
            within `per_device_train_batch_size` groups, drawn anew every epoch from `data_seed` or `seed`. Counted is
            what the layout computes: every prompt once and its completions (shared), or rows x the longest (padded). An
            optimiser step remains `gradient_accumulation_steps` batches on every process and its loss the mean over
            the groups in them, of which there are fewer in a step of long ones. Without it the order is TRL's.
        first_score_bonus (`float`, defaults to `0.0`):
            Added to the score of every group's first completion. The published run adds 0.01, which at
            temperature_alpha = 1e-4 decides every tie for the first.
        allow_pickled_adapter (`bool`, defaults to `False`):
            Read an `adapter_model.bin` (a pickle), with `weights_only=True`.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["nca"],
        metadata={"help": f"Losses, summed with loss_weights: {', '.join(LOSSES)}. Case and punctuation are free."},
    )
    temperature_alpha: float = field(
        default=1e-4, metadata={"help": "Labels are softmax(scores / temperature_alpha) over a group's completions."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; longer prompts keep their end."}
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "Stop at a bad row ('raise') or leave it out and count it ('drop').",
            "choices": ["raise", "drop"],
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "The prompt once for all completions ('shared'), or once for each.",
            "choices": list(LAYOUTS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Training batches of groups of similar length with at most so many tokens, and at most "
            "per_device_train_batch_size groups."
        },
    )
    first_score_bonus: float = field(
        default=0.0,
        metadata={"help": "Added to the score of each group's first completion (0.01 repeats the published run)."},
    )
    allow_pickled_adapter: bool = field(
        default=False, metadata={"help": "Read an adapter_model.bin (a pickle), with weights_only=True."}
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.loss_type = [canonical_loss_name(name) for name in self.loss_type]
        _check_loss_weights(self.loss_type, self.loss_weights)
        refuse(self, DPOConfig, NOT_SUPPORTED, "ContrastiveTrainer")
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("per_device_train_batch_size", self.per_device_train_batch_size)
        check_positive("per_device_eval_batch_size", self.per_device_eval_batch_size)
        check_positive("temperature_alpha", self.temperature_alpha)
        if self.max_tokens_per_batch is not None:
            self._check_batches_by_tokens()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}.")
        if self.on_bad_row not in ("raise", "drop"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}, expected 'raise' or 'drop'.")
        if self.max_prompt_length is not None:
            longest = self.max_length - 1 if self.max_length is not None else self.max_prompt_length
            if not 1 <= self.max_prompt_length <= longest:
                raise ValueError(
                    f"max_prompt_length is {self.max_prompt_length} with max_length {self.max_length}, expected a "
                    "number from 1 up to less than max_length, so that completions have room."
                )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}, expected at least 2: a prompt and a completion token.")
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

    def _check_batches_by_tokens(self) -> None:
        check_positive("max_tokens_per_batch", self.max_tokens_per_batch)
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


def _check_loss_weights(names: list[str], weights: list[float] | None) -> None:
    if not names:
        raise ValueError(f"loss_type is empty, expected one or more of {', '.join(LOSSES)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type names a loss twice: {names}. Name each once and set its weight in loss_weights.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} numbers for the {len(names)} losses {names}, expected one each."
        )
