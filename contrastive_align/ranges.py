"""The range of every numeric option, in one table: option -> the numbers that it takes."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, all of them finite.

    Args:
        low, high: the limits, where there are any.
        above, below: whether the limit itself is left out.
        whole: only whole numbers.
        also: other values that are taken.
        of_steps: a whole number of steps, or a share of all steps below 1.

    >>> print(Range(0, 1, below=True)), print(Range(0, above=True)), print(Range(1, whole=True, also=(-1,)))
    a finite number of 0 or more, below 1
    a finite number above 0
    a whole number of 1 or more, or -1
    (None, None, None)
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    whole: bool = False
    also: tuple[Any, ...] = ()
    of_steps: bool = False

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f" above {self.low:g}" if self.above else f" of {self.low:g} or more")
        if self.high is not None:
            parts.append(f"below {self.high:g}" if self.below else f"up to {self.high:.10g}")
        text = ("a whole number" if self.whole else "a finite number") + ", ".join(parts)
        text += " (below 1: a share of all steps)" if self.of_steps else ""
        return ", or ".join([text, *(repr(value) for value in self.also if value is not None)])

    def takes(self, value: Any) -> bool:
        """Whether the option may have this value."""
        if any(value is other or value == other for other in self.also):
            return True
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        if (self.whole or (self.of_steps and value >= 1)) and value != int(value):
            return False
        low, high = self.low, self.high
        return (low is None or value > low or (value == low and not self.above)) and (
            high is None or value < high or (value == high and not self.below)
        )


_ANY, _FROM_0, _ABOVE_0 = Range(), Range(0), Range(0, above=True)
_SHARE, _SOME_SHARE, _BELOW_1 = Range(0, 1), Range(0, 1, above=True), Range(0, 1, below=True)
_COUNT, _COUNT_FROM_0, _STEPS = Range(1, whole=True), Range(0, whole=True), Range(0, above=True, of_steps=True)
_PORT, _SEED = Range(1, 65535, whole=True), Range(0, 2**32 - 1, whole=True)

_NAMES: dict[Range, str] = {
    _ANY: "reward_weights",
    _FROM_0: (
        "learning_rate weight_decay eval_delay router_aux_loss_coef loss_weights first_score_bonus kl_coef "
        "entropy_coef fit_min_ess llm_int8_threshold"
    ),
    _ABOVE_0: (
        "adam_epsilon num_train_epochs beta temperature kl_target entropy_target max_importance_ratio lora_alpha alpha "
        "alpha_pattern vllm_server_timeout fraction fit_tolerance"
    ),
    _SHARE: "ref_model_mixup_alpha drop_factor qrs_acceptance scored_share",
    _SOME_SHARE: "top_p unfrozen_layers_ratio vllm_gpu_memory_utilization",
    _BELOW_1: "adam_beta1 adam_beta2 lora_dropout rank_dropout module_dropout",
    _COUNT: (
        "gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size eval_accumulation_steps "
        "dataset_num_proc save_total_limit torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb "
        "ddp_timeout precompute_ref_batch_size ref_model_sync_steps max_prompt_length max_completion_length "
        "max_tokens_per_batch baseline_window proposal_window fit_samples num_generations num_generations_eval "
        "generation_batch_size steps_per_generation prompts_per_round draws_per_round coef_horizon rows_at_once "
        "max_train_samples max_eval_samples vllm_max_model_length vllm_tensor_parallel_size lora_r rank_pattern "
        "total_splits concurrency num_processes num_machines fit_max_samples num_rounds"
    ),
    _COUNT_FROM_0: (
        "dataloader_num_workers eval_samples eval_prompts report_prompts num_completions_to_print split_number "
        "machine_rank keep resample top_k"
    ),
    _STEPS: "logging_steps eval_steps save_steps",
    _PORT: "vllm_server_port vllm_group_port",
    _SEED: "seed data_seed",
    Range(0, of_steps=True): "warmup_steps",
    Range(0, also=(None,)): "max_grad_norm",
    Range(0, 1, above=True, below=True): "test_split_size",
    Range(2, whole=True): "max_length",
    Range(0, 65535, whole=True): "main_process_port",
    Range(1, whole=True, also=(-1,)): "max_steps",
    Range(0, whole=True, also=(-1,)): "local_rank",
    Range(1, whole=True, also=("auto",)): "pad_to_multiple_of",
    Range(0, above=True, also=("auto",)): "temperature_alpha",
}
# Of this package, TRL, transformers, accelerate, PEFT, quantisation and the steps. A list of weights, or a pattern of
# PEFT (module -> number), has the range of each number.
RANGES = {name: found for found, names in _NAMES.items() for name in names.split()}
WEIGHTS = ("loss_weights", "reward_weights")  # of which one at least counts


def check_numbers(options: Any) -> None:
    """Raise ValueError where a numeric option is outside its range, or is no number.

    Args:
        options: an object with options as attributes, whose class may have ``RANGES`` that differ from those here. None
            is taken where the class says so, or says nothing.
    """
    values = vars(options)
    declared: dict[str, Any] = {}
    for cls in reversed(type(options).__mro__):  # not fields(), whose types HfArgumentParser changes
        declared |= inspect.get_annotations(cls)
    for name, expected in {**RANGES, **getattr(options, "RANGES", {})}.items():
        if name not in values:
            continue
        kind = str(declared.get(name, "None"))
        if values[name] is None and ("None" in kind or "Optional" in kind):
            continue
        for place, value in _places(name, values[name]):
            if not expected.takes(value):
                raise ValueError(f"{place} is {value!r}, expected {expected}.")
        if name in WEIGHTS and values[name] and not any(values[name]):
            raise ValueError(f"{name} is {values[name]}, expected at least one that is not 0.")


def _places(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Return the numbers of an option, each with its place."""
    if name in WEIGHTS:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {value!r}, expected a list of numbers.")
        return [(f"{name}[{i}]", each) for i, each in enumerate(value)]
    if name.endswith("_pattern") and isinstance(value, Mapping):
        return [(f"{name}[{key!r}]", each) for key, each in value.items()]
    return [(name, value)]
