"""What a command line is answered with where it is wrong: one message, the option that is meant, exit status 2."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from contrastive_align.ranges import RANGES, Range


SECONDS_TO_BE_ENDED = 3  # a launcher ends the other processes within 0.1 s of the first that failed


class UsageError(SystemExit):
    """A wrong command line; prints the message and exits with status 2.

    Of several processes the main one speaks first: its launcher ends those that would say the same.
    """

    def __init__(self, message: str):
        message, process = as_flags(message), os.environ.get("RANK", "0")
        if process != "0":
            time.sleep(SECONDS_TO_BE_ENDED)
        print(f"error: {message}" if process == "0" else f"error in process {process}: {message}", file=sys.stderr)
        super().__init__(2)
        self.message = message


# What the same ideas are called elsewhere (TRL, LLaMA-Factory, axolotl, OpenRLHF, alignment-handbook, verl), without
# case and punctuation -> our options. The first that the command has is meant.
MEANT = {
    "model_name_or_path": (
        "adapter_path, lora_path, lora_weights, peft_path, model, model_name, model_path, model_id, "
        "base_model, pretrain, actor_model, checkpoint_path, pretrained_model_name_or_path, policy, "
        "sft_model_path, adapter_name_or_path"
    ),
    "model_revision": "revision",
    "dataset_name": (
        "dataset, data, data_path, dataset_path, train_file, train_files, train_data, data_files, "
        "dataset_dir, dataset_id, input, input_file, prompts, prompt_data, prompts_file, train_dataset"
    ),
    "dataset_config": "dataset_config_name, subset, data_config",
    "dataset_train_split": "split, train_split, dataset_split",
    "dataset_test_split": "eval_split, test_split, validation_split, eval_dataset, eval_file",
    "max_train_samples": (
        "max_rows, num_rows, limit_rows, n_rows, subset_size, max_samples, num_train_samples, n_train, limit, "
        "train_samples"
    ),
    "max_eval_samples": "max_test_samples, n_eval, eval_limit, num_eval_samples",
    "output_dir": "output, out, out_dir, output_path, save_path, save_dir, ckpt_path, default_local_dir, run_dir, o",
    "learning_rate": "lr, actor_learning_rate, peak_lr, lr_rate",
    "lr_scheduler_type": "scheduler, lr_scheduler, schedule, lr_schedule, lr_decay_style",
    "warmup_steps": "warmup, lr_warmup_ratio, num_warmup_steps, lr_warmup_steps",
    "weight_decay": "wd, decay, l2",
    "optim": "optimizer, optimiser, optimizer_name",
    "max_grad_norm": "clip, max_norm, clip_grad, grad_clip, gradient_clipping, gradient_clip_val, grad_norm",
    "num_rounds": "rounds, iterations, num_iterations, n_rounds, sampling_rounds",
    "num_train_epochs": "epochs, num_epochs, n_epochs, total_epochs, max_epochs, train_epochs",
    "max_steps": "steps, num_steps, total_steps, train_steps, num_train_steps, total_training_steps, iters",
    "per_device_train_batch_size": (
        "train_bs, bsz, batch_size, bs, micro_batch_size, micro_train_batch_size, train_batch_size, batch, "
        "per_device_batch_size, per_gpu_train_batch_size, ppo_micro_batch_size"
    ),
    "per_device_eval_batch_size": "eval_bs, eval_batch_size, val_batch_size, test_batch_size",
    "gradient_accumulation_steps": (
        "grad_accum, gradient_accumulation, accumulation_steps, accumulate_grad_batches, grad_acc, ga, "
        "grad_accumulation_steps"
    ),
    "gradient_checkpointing": (
        "grad_ckpt, use_gradient_checkpointing, grad_checkpointing, gradient_checkpoint, "
        "activation_checkpointing, recompute"
    ),
    "max_length": (
        "cutoff_len, sequence_len, max_seq_length, max_seq_len, max_len, seq_length, block_size, model_max_length"
    ),
    "max_prompt_length": "prompt_max_len, max_prompt_len, max_source_length, max_input_length",
    "max_completion_length": (
        "max_completion_len, max_target_len, generate_max_length, max_new_tokens, generate_max_len, "
        "max_response_length, max_target_length, response_length, max_tokens, completion_length, "
        "max_generate_tokens"
    ),
    "num_generations": (
        "num_responses, num_candidates, responses_per_prompt, group_num, k, n, num_samples, n_samples, "
        "num_return_sequences, n_samples_per_prompt, samples_per_prompt, rollout_n, num_completions, "
        "group_size, best_of"
    ),
    "prompts_per_round": "rollout_batch_size, prompts_per_step, num_prompts",
    "temperature": "temp, sampling_temperature, rollout_temperature",
    "temperature_alpha": "alpha, tau, label_temperature, score_temperature, reward_temperature, temp_alpha",
    "loss_type": "loss, pref_loss, dpo_loss, objective, rl, loss_name, losses, algorithm, method, rlhf_type, rl_type",
    "divergence": "f, f_divergence, loss, f_divergence_type, objective, loss_type, algorithm",
    "beta": "pref_beta, dpo_beta, rl_beta, nca_beta, beta_dpo",
    "kl_coef": "kl_coeff, init_kl_coef, kl, kl_weight, kl_penalty, kl_loss_coef, beta",
    "entropy_coef": "ent_coef, entropy, entropy_coeff, entropy_weight",
    "kl_direction": "kl_type, kl_estimator",
    "reward": (
        "reward_model, reward_fn, reward_func, rewards, reward_function, reward_functions, reward_model_path, "
        "rm, reward_pretrain, remote_rm_url, custom_reward_function, score, reward_model_name_or_path, "
        "reward_funcs"
    ),
    "columns": (
        "prompt_key, input_key, output_key, chosen_key, rejected_key, prompt_column, chosen_column, rejected_column, "
        "completions_column, response_column, column, text_column, column_mapping, field_mapping, remove_columns"
    ),
    "reward_weights": "reward_weight, reward_scale",
    "features": "constraints, feature, constraint, target, moments",
    "condition": "conditions, quantiles, control, control_tokens, phrases",
    "judge": "judge_model, llm_judge, judge_config, annotator",
    "score_column": "score, scores, score_key, label_column, reward_column, label_key",
    "feedback_column": "feedback, feedback_key, critique",
    "use_peft": "lora, use_lora, peft, qlora, use_qlora, finetuning_type, adapter, peft_type, train_type",
    "lora_r": "lora_rank, rank, r, lora_dim",
    "lora_alpha": "alpha, lora_scale",
    "lora_target_modules": "lora_target, target_modules, lora_target_linear, lora_modules",
    "load_in_4bit": (
        "quant_method, quantization_method, quantize, quantization_bit, qlora, use_4bit, load_4bit, "
        "quantization, bits, quant_bits, int4, use_qlora"
    ),
    "load_in_8bit": "use_8bit, load_8bit, int8",
    "dtype": "precision, torch_type, model_dtype, data_type, weights_dtype",
    "bf16": "mixed_precision, precision, use_bf16, bfloat16, half",
    "attn_implementation": (
        "attn_backend, attention_backend, flash_attn, flash_attention, use_flash_attn, use_flash_attention, "
        "attention, attn"
    ),
    "resume_from_checkpoint": (
        "ckpt, resume_ckpt, load_from, checkpoint_dir, resume, resume_from, load_checkpoint, resume_path, "
        "auto_resume, continue, checkpoint"
    ),
    "report_to": "wandb, use_wandb, tensorboard, logger, log_to, tracker, log_with, use_tensorboard",
    "run_name": "wandb_run_name, wandb_name, experiment_name, name, wandb_run_id, exp_name",
    "project": "wandb_project, project_name, wandb_entity",
    "logging_steps": "log_every, log_steps, log_interval, logging, print_every, log_freq",
    "save_steps": "save_every, save_interval, checkpoint_every, save_freq, save, checkpointing_steps, saves_per_epoch",
    "save_total_limit": "max_checkpoints, keep_last, max_ckpt_num, limit_checkpoints",
    "eval_steps": "eval_every, eval_interval, val_every, evals_per_epoch, evaluation_steps, test_freq, val_steps",
    "eval_samples": "n_samples, num_samples, measured_samples, eval_sample_size",
    "layout": "packing_strategy, pack, packing, packed, shared_prompt, padding_free, sample_packing, share_prompts",
    "on_bad_row": "skip_bad_rows, drop_bad_rows, skip_errors, on_error, ignore_errors",
    "use_cpu": "cpu, device, no_cuda",
    "use_vllm": "vllm, infer_backend, rollout_backend, vllm_enable",
    "dataset_num_proc": "num_proc, num_workers, workers, dataset_processes, n_proc, dataset_workers",
    "push_to_hub": "push, hub, upload, export_to_hub",
    "trust_remote_code": "remote_code, allow_remote_code",
    "accelerate_config": "config_file, n_gpus, num_gpus, gpus, nproc_per_node, ngpus, zero_stage, devices",
    "config": "yaml, config_path, cfg, recipe, config_yaml",
    "seed": "random_seed, rng_seed, set_seed",
    "test_split_size": "val_size, val_set_size, val_ratio, eval_ratio, test_size, holdout, eval_size, validation_size",
    "deepspeed": "deepspeed_config, ds_config, zero",
    "use_bnb_nested_quant": "double_quant, double_quantization, bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type": "nf4, quant_type, quantization_type",
    "lora_modules_to_save": "modules_to_save, additional_target",
    "use_liger_kernel": "liger, use_liger, liger_kernel, enable_liger_kernel",
    "save_strategy": "save_checkpoint, save_checkpoints",
    "eval_strategy": "evaluate, evaluation, evaluation_strat, do_val",
    "adam_epsilon": "eps, adam_eps, epsilon",
    "torch_compile": "compile, use_torch_compile",
    "hub_token": "token, hf_token, auth_token",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "lora_dropout": "dropout",
    "first_score_bonus": "score_bonus, tie_bonus, tie_breaker",
    "loss_weights": "loss_weight, loss_coef, loss_coefs",
    "precompute_ref_log_probs": "precompute_ref_logps, cache_ref, precompute_reference, cache_reference",
    "max_tokens_per_batch": "batch_tokens, max_tokens, tokens_per_gpu, max_token_len_per_gpu",
    "eval_prompts": "num_eval_prompts",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "help": "usage, h, info, man",
}
# What needs no option, or has another place than the command line.
NO_OPTION = {
    "tokenizer, tokenizer_name, tokenizer_path, tokenizer_type, tokenizer_name_or_path, processor": (
        "The tokenizer is that in the model's folder"
    ),
    "template, chat_template, apply_chat_template, chat_template_path, system_prompt, default_system": (
        "The tokenizer's own chat template renders conversations; a system prompt is the first message of a row's "
        "'prompt'"
    ),
    "num_processes, num_machines, tensor_parallel_size, tp_size, tp, gpu_memory_utilization, zero3, zero2, fsdp2": (
        "Processes and engines are those of --accelerate_config, such as multi_gpu, zero2, zero3 or fsdp2"
    ),
    "early_stopping, early_stopping_patience, patience": (
        "Early stopping is transformers' EarlyStoppingCallback, which a trainer takes in Python"
    ),
    "shuffle, shuffle_dataset, no_shuffle": "The rows are shuffled in every pass, by --seed",
    "overwrite_cache, reload": "Files are read anew when they have changed",
    "stage": "The command says what is trained, such as contrastive-align preference",
    "simpo_gamma, orpo_alpha, kto_weight, pref_ftx, cpo_alpha, gamma": (
        "Losses on pairs alone (SimPO, ORPO, KTO) are in TRL; --loss_type nca sft mixes the likelihood of the best in"
    ),
    "upcast, pure_bf16, half_precision, amp": (
        "Precision is --bf16 or --fp16 for the computation, --dtype for the weights"
    ),
    "gpu, gpu_id, cuda, cuda_device, cuda_visible_devices": (
        "Which GPU is used is said by the environment variable CUDA_VISIBLE_DEVICES"
    ),
    "plot_loss, visual_inference": "--report_to=tensorboard draws the curves",
    "ref_model, reference_model, ref_model_name, ref_model_path, reference_model_name_or_path, "
    "reference_free, sync_ref": "The reference is the model that training starts from",
    "topp, topk, min_p, sampling_params, vllm_server, vllm_tp": (
        "Completions are sampled with --temperature, --top_k and --top_p, by the model itself or with --use_vllm"
    ),
    "num_beams, do_sample": "Completions are always sampled; there is no beam search",
    "logging_dir, log_dir, tb_dir, tensorboard_dir": (
        "TensorBoard's files lie in the output_dir; the environment variable TENSORBOARD_LOGGING_DIR moves them"
    ),
    "soft_labels, one_hot, hard_labels": (
        "--temperature_alpha decides how soft the labels are: near 0, the best completion takes all"
    ),
}
_SENTENCES = {guess: text for guesses, text in NO_OPTION.items() for guess in guesses.split(", ")}
_OPTIONS: dict[str, list[str]] = {}  # guess -> the options that may be meant
for _option, _guesses in MEANT.items():
    for _guess in _guesses.split(", "):
        _OPTIONS.setdefault(_guess, []).append(_option)


LOG_LEVELS = ("debug", "info", "warning")


class UsageParser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors.

    Args:
        log_level: whether it has the flag of this name, for which errors print a traceback (see ``launch/errors.py``).
        options: as of ``ArgumentParser``.
    """

    def __init__(self, *, log_level: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if log_level:
            text = "Level of log messages; debug shows the traceback of an error."
            self.add_argument("--log_level", choices=LOG_LEVELS, help=text)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{in_own_words(message)}    (all flags: {self.prog} -h)")


def check_flags(args: argparse.Namespace, ranges: Mapping[str, Range]) -> None:
    """Raise UsageError where a number was given that is outside the range of its flag."""
    for name, expected in ranges.items():
        value = getattr(args, name)
        if value is not None and not expected.takes(value):
            raise UsageError(f"--{name} is {value!r}, expected {expected}.")


def as_flags(text: str) -> str:
    """Write the options that a message of the data's rooms names as a command line does.

    >>> as_flags("drop the row (on_bad_row='drop'), or say columns='prompt=a question'")
    "drop the row (--on_bad_row=drop), or say --columns='prompt=a question'"
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[3]
        return f"--{name}={value}" if re.fullmatch(r"[\w=,.:-]*", value) else f"--{name}='{value}'"

    text = re.sub(r"\bresume_from_checkpoint=True\b", "--resume_from_checkpoint=true", text)
    return re.sub(r"\b(columns|score_column|feedback_column|on_bad_row)=(['\"])(.*?)\2", flag, text)


def in_own_words(message: str) -> str:
    """Say what argparse says of a flag's value as the other messages do.

    >>> in_own_words("argument --seed: invalid int value: 'x'")
    "--seed is 'x', expected a whole number of 0 or more, up to 4294967295."
    >>> in_own_words("argument --save_strategy/--save-strategy: invalid choice: 'step' (choose from 'no', 'steps')")
    "--save_strategy is 'step', expected one of no, steps. Did you mean 'steps'?"
    """
    found = re.match(r"argument --(\w+)(?:/--[\w-]+)*: (.*)", message, re.DOTALL)
    if not found:
        return message
    name, said = found.groups()
    if wrong := re.fullmatch(r"invalid (\w+) value: '(.*)'", said, re.DOTALL):
        expected = RANGES.get(name) or {"int": "a whole number", "float": "a number"}.get(wrong[1], f"a {wrong[1]}")
        return f"--{name} is {wrong[2]!r}, expected {expected}."
    if wrong := re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", said, re.DOTALL):
        known = [word.strip("'") for word in wrong[2].split(", ")]
        near = difflib.get_close_matches(wrong[1].lower(), known, 1, 0.5)
        return f"--{name} is {wrong[1]!r}, expected one of {', '.join(known)}." + (
            f" Did you mean {near[0]!r}?" if near else ""
        )
    if wrong := re.match(r"Truthy value expected: got (.*) but", said):
        return f"--{name} is {wrong[1]!r}, expected true or false."
    return f"--{name} needs a value: --{name}=VALUE." if said == "expected one argument" else message


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return the sentence that offers the option that is meant: by ``MEANT``, by its words, or by its spelling.

    ``NO_OPTION`` has sentences for what no option does.

    >>> nearest("lr", ["learning_rate", "lora_r"], "--"), nearest("betta", ["beta", "bf16"])
    (". Did you mean '--learning_rate'?", ". Did you mean 'beta'?")
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(".", "_").strip("_")
    meant = {guess: found for guess, options in _OPTIONS.items() if (found := [o for o in options if o in known])}
    meant |= {option: [option] for option in known}
    same_words = [option for option in known if set(words.split("_")) < set(option.split("_"))]
    if words in meant:
        found = meant[words]
    elif words in _SENTENCES and prefix:
        return f". {_SENTENCES[words]}."
    elif same_words and len(words) > 3:
        found = sorted(same_words, key=lambda option: (len(option), option))
    else:
        near = difflib.get_close_matches(
            words, [guess for guess in meant if guess[0] == words[0] and guess[2:]], 1, 0.7
        )
        near = near or difflib.get_close_matches(words, [guess for guess in meant if len(guess) > 2], 1, 0.85)
        found = meant[near[0]] if near else []
    return f". Did you mean '{prefix}{found[0]}'?" if found else ". See --help for all."
