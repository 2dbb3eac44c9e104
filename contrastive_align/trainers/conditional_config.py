"""The options of :class:`~contrastive_align.ConditionalTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.trainer_utils import SaveStrategy
from trl import RLOOConfig, SFTConfig

from contrastive_align.models.layout import LAYOUTS
from contrastive_align.trainers.options import as_in, check_positive, refuse


_ROWS = "rows are made here, from prompts and the pool's completions"
# What SFT offers and conditional training does not mean: option -> (why, the way out). Any value but TRL's default
# raises.
NOT_SUPPORTED = {
    "packing": ("completions of a batch are packed by layout='shared' without cutting any", "leave it out"),
    "eval_packing": ("evaluation samples from the model", "leave it out"),
    "padding_free": ("layout='shared' has no padding", "leave it out"),
    "completion_only_loss": ("the loss is over completions, always", "leave it out"),
    "assistant_only_loss": ("the loss is over completions, always", "leave it out"),
    "loss_type": ("the loss is likelihood + KL - entropy", "set kl_coef and entropy_coef"),
    "dataset_text_field": (_ROWS, "give a column 'prompt'"),
    "dataset_kwargs": (_ROWS, "leave it out"),
    "truncation_mode": ("a completion that is cut keeps its beginning", "leave it out"),
    "shuffle_dataset": ("prompts and draws are in a random order, from the seed", "leave it out"),
    "chat_template_path": ("cloning a template adds tokens that nothing would train", "set tokenizer.chat_template"),
    "eos_token": ("it would move the end of the completions", "set tokenizer.eos_token and pass it"),
    "pad_token": ("TRL deprecates it", "set tokenizer.pad_token and pass it as processing_class"),
    "label_smoothing_factor": ("the entropy term has its place", "set entropy_coef"),
    "use_liger_kernel": ("it would replace the head that computes the loss", "leave it out"),
    "neftune_noise_alpha": ("noise on the policy's embeddings alone would enter the KL", "leave it out"),
    "train_sampling_strategy": ("draws are balanced over the conditions", "leave it out"),
    "dataloader_persistent_workers": ("workers would go on reading the round before", "leave it out"),
    "dataloader_drop_last": ("a round has whole steps already", "leave it out"),
    "auto_find_batch_size": ("how many steps a round has is set before", "set per_device_train_batch_size"),
    "ignore_data_skip": ("a resumed round would train on its first rows again", "leave it out"),
}
KL_DIRECTIONS = ("reverse", "forward")
VLLM_MODES = ("server", "colocate")
VLLM_TEMPERATURES = (0.01, 2)  # vLLM moves a lower one there, and refuses a higher one


@dataclass
class ConditionalConfig(SFTConfig):
    """Options of :class:`~contrastive_align.ConditionalTrainer`: those of :class:`trl.SFTConfig`, and

    Args:
        num_train_epochs (`float`, defaults to `4`):
            Online, an epoch is a round: sample, feedback, pool, train. From scored data, a pass over its draws.
        prompts_per_round (`int`, *optional*):
            Prompts sampled in a round; all of the dataset's by default. The next round goes on where this one stopped.
        num_generations (`int`, defaults to `10`):
            Completions sampled for a prompt, the K of its group.
        draws_per_round (`int`, *optional*):
            Completions trained on in a round, balanced over the conditions and rounded up to whole optimiser steps. By
            default as many as a round samples; from scored data, as many as it holds.
        max_completion_length (`int`, defaults to `256`):
            Longest sampled completion in tokens. One that is cut there is trained on without an EOS.
        temperature, top_p (`float`, default to `1.0`):
            Of sampling.
        drop_factor (`float`, defaults to `0.0`):
            Share of the earlier samples of each condition that leaves the pool in a round: 0 keeps all, 1 none.
        kl_coef (`float`, defaults to `0.05`):
            Weight of the KL to the reference, in nats per completion token. 0 loads no reference.
        kl_direction (`str`, defaults to `"reverse"`):
            `"reverse"`: KL(policy || reference), Quark. `"forward"`: KL(reference || policy), ALT.
        entropy_coef (`float`, defaults to `0.06`):
            Weight of the entropy bonus, in nats per completion token.
        kl_target, entropy_target (`float`, *optional*):
            With these the coefficients are adapted after every step, so that KL or entropy comes to them.
        coef_horizon (`int`, defaults to `10000`):
            Completions over which a coefficient adapts.
        unfrozen_layers_ratio (`float`, defaults to `1.0`):
            Share of the layers that is trained, from the top; the lower ones are frozen.
        reward_weights (`list[float]`, *optional*):
            Of several reward functions; 1 each by default.
        layout (`str`, defaults to `"auto"`):
            `"shared"`: the rows of a batch stand in one packed row, without padding. `"padded"`: as usual. `"auto"`
            tries the first on a small batch and takes the second, with a warning, where the log-probs differ.
        pool_dir (`str`, *optional*):
            Where the pool is; `output_dir`/pool by default.
        rows_at_once (`int`, defaults to `256`):
            Completions decoded together at most; with a colocated vLLM, its `max_num_seqs` of a GPU.
        use_vllm, vllm_mode, vllm_model_impl, vllm_enable_sleep_mode, vllm_server_base_url, vllm_server_host,
        vllm_server_port, vllm_server_timeout, vllm_group_port, vllm_gpu_memory_utilization, vllm_max_model_length,
        vllm_tensor_parallel_size:
            As in :class:`trl.RLOOConfig`: vLLM draws the completions, and is handed the weights before each round and
            each evaluation. It draws with random numbers of its own, so that `seed` does not repeat them; what the
            pool has is not drawn again. Tested with a stand-in for TRL's client, not with vLLM on a GPU.
        disable_dropout (`bool`, defaults to `True`):
            Completions are sampled without dropout, and the reference has none.
        on_bad_row (`str`, defaults to `"raise"`):
            Scored data: as in :class:`~contrastive_align.ContrastiveConfig`.
        allow_pickled_adapter (`bool`, defaults to `False`):
            As in :class:`~contrastive_align.ContrastiveConfig`.
    """

    num_train_epochs: float = field(default=4, metadata={"help": "Rounds; from scored data, passes over its draws."})
    prompts_per_round: int | None = field(default=None, metadata={"help": "Prompts sampled in a round (default: all)."})
    num_generations: int = field(default=10, metadata={"help": "Completions sampled for a prompt."})
    draws_per_round: int | None = field(
        default=None, metadata={"help": "Completions trained on in a round (default: as many as it samples)."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest sampled completion in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling."})
    drop_factor: float = field(
        default=0.0, metadata={"help": "Share of earlier samples that leaves the pool in a round: 0 none, 1 all."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference; 0 loads none."})
    kl_direction: str = field(
        default="reverse",
        metadata={"help": "KL(policy || reference) or KL(reference || policy).", "choices": list(KL_DIRECTIONS)},
    )
    entropy_coef: float = field(default=0.06, metadata={"help": "Weight of the entropy bonus."})
    kl_target: float | None = field(default=None, metadata={"help": "Adapt kl_coef to this KL, nats per token."})
    entropy_target: float | None = field(
        default=None, metadata={"help": "Adapt entropy_coef to this entropy, nats per token."}
    )
    coef_horizon: int = field(default=10_000, metadata={"help": "Completions over which a coefficient adapts."})
    unfrozen_layers_ratio: float = field(default=1.0, metadata={"help": "Share of the layers trained, from the top."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of several reward functions."})
    layout: str = field(
        default="auto",
        metadata={"help": "Rows packed into one without padding ('shared'), or padded.", "choices": list(LAYOUTS)},
    )
    pool_dir: str | None = field(default=None, metadata={"help": "Where the pool is (default: output_dir/pool)."})
    rows_at_once: int = field(default=256, metadata={"help": "Completions decoded together at most."})
    use_vllm: bool = as_in(RLOOConfig, "use_vllm")
    vllm_mode: str = as_in(RLOOConfig, "vllm_mode")
    vllm_model_impl: str = as_in(RLOOConfig, "vllm_model_impl")
    vllm_enable_sleep_mode: bool = as_in(RLOOConfig, "vllm_enable_sleep_mode")
    vllm_server_base_url: str | None = as_in(RLOOConfig, "vllm_server_base_url")
    vllm_server_host: str = as_in(RLOOConfig, "vllm_server_host")
    vllm_server_port: int = as_in(RLOOConfig, "vllm_server_port")
    vllm_server_timeout: float = as_in(RLOOConfig, "vllm_server_timeout")
    vllm_group_port: int = as_in(RLOOConfig, "vllm_group_port")
    vllm_gpu_memory_utilization: float = as_in(RLOOConfig, "vllm_gpu_memory_utilization")
    vllm_max_model_length: int | None = as_in(RLOOConfig, "vllm_max_model_length")
    vllm_tensor_parallel_size: int = as_in(RLOOConfig, "vllm_tensor_parallel_size")
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "Stop at a bad row ('raise') or leave it out and count it ('drop').",
            "choices": ["raise", "drop"],
        },
    )
    allow_pickled_adapter: bool = field(
        default=False, metadata={"help": "Read an adapter_model.bin (a pickle), with weights_only=True."}
    )

    def __post_init__(self):
        refuse(self, SFTConfig, NOT_SUPPORTED, "ConditionalTrainer")
        best = (self.metric_for_best_model or "").split("/")[0]  # of several evaluation sets, their names are in it
        if self.greater_is_better is None and best.split("_")[-1] == "nll":
            self.greater_is_better = False  # else everything is, whose name does not end in "loss"
        super().__post_init__()
        if self.metric_for_best_model in ("loss", "eval_loss"):  # which the Trainer takes where none is given
            raise ValueError(
                "load_best_model_at_end (or a scheduler) follows the metric 'loss', which evaluate does not give here. "
                "Set metric_for_best_model to one that it does: 'reward_given/<quantile_0>' for instance, or from "
                "scored data 'nll/<quantile_0>'."
            )
        for name in ("num_generations", "max_completion_length", "temperature", "coef_horizon", "rows_at_once"):
            check_positive(name, getattr(self, name))
        for name in ("prompts_per_round", "draws_per_round", "kl_target", "entropy_target"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name, low in (("kl_coef", 0), ("entropy_coef", 0), ("drop_factor", 0), ("top_p", 1e-9)):
            value, high = getattr(self, name), 1 if name in ("drop_factor", "top_p") else float("inf")
            if not low <= value <= high or value == float("inf"):
                raise ValueError(f"{name} is {value}, expected a number from {low:g} to {high:g}.")
        if not 0 < self.unfrozen_layers_ratio <= 1:
            raise ValueError(f"unfrozen_layers_ratio is {self.unfrozen_layers_ratio}, expected above 0, up to 1 (all).")
        if self.kl_direction not in KL_DIRECTIONS:
            raise ValueError(f"kl_direction is {self.kl_direction!r}, expected {' or '.join(KL_DIRECTIONS)}.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}.")
        if self.vllm_mode not in VLLM_MODES:
            raise ValueError(f"vllm_mode is {self.vllm_mode!r}, expected {' or '.join(VLLM_MODES)}.")
        lowest, highest = VLLM_TEMPERATURES
        if self.use_vllm and not lowest <= self.temperature <= highest:
            raise ValueError(
                f"temperature is {self.temperature} with use_vllm, which takes {lowest:g} to {highest:g}. Change it, "
                "or leave use_vllm out."
            )
        if self.on_bad_row not in ("raise", "drop"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}, expected 'raise' or 'drop'.")
        for name, coefficient in (("kl_target", self.kl_coef), ("entropy_target", self.entropy_coef)):
            if getattr(self, name) is not None and coefficient == 0:
                raise ValueError(
                    f"{name} adapts {name.replace('target', 'coef')}, which is 0 and would stay so. Give it a start."
                )
        if self.max_length is not None and self.max_length <= 1:
            raise ValueError(f"max_length is {self.max_length}, expected at least 2: a prompt and a completion token.")
        if self.save_only_model and self.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "save_only_model=True leaves checkpoints that no run can go on from, and the pool of one that is "
                "stopped would be lost. Leave it out; save_total_limit=1 keeps one checkpoint."
            )
