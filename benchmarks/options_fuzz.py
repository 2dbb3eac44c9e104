"""One fault in a sound command line or YAML: each is answered with a sentence that names it and an exit status.

    python benchmarks/options_fuzz.py [--cases 300] [--seed 0] [--only NUMBER ...]

A case is a command of the package on a model of one layer and files of eight rows, which runs in a second, with one
fault: a number outside its range, NaN or infinite, a value of another type, a misspelled option, names of what is not
there, folders and files that are none or damaged, options that contradict each other, packages that are not installed,
YAML that is broken or says something else, and functions of the user's own that fail. The command runs in this process.

- right: a sentence that names the fault, exit status 1 or 2, and for numbers no model loaded before;
- told: the run ends well, and a note or a warning names the option (only where this is what is wanted);
- unclear: a sentence without the name, or a model was loaded for a number;
- silent: exit status 0 without a word;
- crash: a traceback.

Prints a table of faults and outcomes, then each case that is not right or told; the exit status is then 1. One minute.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import accelerate.commands.launch
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DatasetMixtureConfig, ModelConfig

from contrastive_align.launch import cli
from contrastive_align.launch.errors import Fault
from contrastive_align.launch.usage import UsageError
from contrastive_align.ranges import RANGES, WEIGHTS


TEXTS = ("a b", "c", "b b c", "a", "c a", "b", "c c", "a c")
COMMON = {
    "model_name_or_path": "model", "output_dir": "out", "max_steps": "1", "save_strategy": "no", "report_to": "none",
    "disable_tqdm": "true", "logging_steps": "1", "use_cpu": "true", "bf16": "false",
}  # fmt: skip
_SAMPLED = {"dataset_name": "prompts.txt", "reward": "mine.py:reward", "max_completion_length": "4"}
_GROUPS = {"per_device_train_batch_size": "4", "max_length": "64"}
SOUND = {
    "reward": {**COMMON, **_GROUPS, "dataset_name": "groups.jsonl"},
    "preference": {**COMMON, **_GROUPS, "dataset_name": "pairs.jsonl"},
    "fdpg": {
        **COMMON, **_SAMPLED, "num_generations": "2", "per_device_train_batch_size": "8", "eval_samples": "0"
    },
    "conditional": {
        **COMMON, **_SAMPLED, "condition": "phrases", "num_generations": "5", "prompts_per_round": "4",
        "draws_per_round": "8", "eval_prompts": "0",
    },
    "ask": {"model_name_or_path": "model", "prompt": "a", "max_completion_length": "4", "use_cpu": "true"},
    "data": {"dataset_name": "groups.jsonl"},
    "steps sample": {
        "model_name_or_path": "model", "prompts": "generated.jsonl", "output": "sampled.jsonl",
        "num_generations": "2", "max_completion_length": "4",
    },
    "steps score": {"input": "generated.jsonl", "output": "scored.jsonl", "reward": "mine.py:reward"},
    "steps judge": {
        "input": "generated.jsonl", "output": "judged.jsonl",
        "judge": "{model: m, base_url: 'http://localhost:1/v1', prompt: feedback, answers: text, cache: cache}",
    },
    "steps train": {**COMMON, "input": "scored_before.jsonl", "condition": "phrases", "eval_prompts": "0"},
}  # fmt: skip
TRAINING = ("reward", "preference", "fdpg", "conditional")
MINE = """
def reward(completions, **_):
    return [float(len(c)) for c in completions]

def raises(completions, **_):
    return [{}["x"] for _ in completions]

def short(completions, **_):
    return [1.0]

def not_a_number(completions, **_):
    return [float("nan")] * len(completions)

def words(completions, **_):
    return ["good"] * len(completions)

def loss_raises(log_ratios, scores):
    return [][1]

def loss_is_nan(log_ratios, scores):
    return log_ratios.sum(-1) * float("nan")

def loss_is_one(log_ratios, scores):
    return log_ratios.mean()

def loss_asks(log_ratios, weather):
    return log_ratios.sum(-1)
"""


def write_files(folder: Path) -> None:
    """Write what the cases need: models that are sound and that are not, data, functions, configurations."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *"abc"])}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **ends)
    size = {"vocab_size": 6, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**size, **shape, max_position_embeddings=64)).save_pretrained(folder / "model")
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**size, **t5)).save_pretrained(folder / "encoder_decoder")
    for name in ("model", "encoder_decoder"):
        tokenizer.save_pretrained(folder / name)
    _write_damaged_models(folder)

    def lines(name: str, rows: Iterable[dict[str, Any]]) -> None:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))

    answers = [[f" {TEXTS[(i + j + 1) % 8]}" for j in range(3)] for i in range(8)]
    prompts = [{"prompt": text} for text in TEXTS]
    lines("groups.jsonl", [p | {"completions": a, "scores": [0, 1, 2]} for p, a in zip(prompts, answers, strict=True)])
    lines("pairs.jsonl", [p | {"chosen": a[0], "rejected": a[1]} for p, a in zip(prompts, answers, strict=True)])
    lines("generated.jsonl", [p | {"generations": a} for p, a in zip(prompts, answers, strict=True)])
    scored = [{"generations": [*a, *a][:5], "rewards": [0.0, 1.0, 2.0, 3.0, 4.0]} for a in answers]
    lines("scored_before.jsonl", [p | s for p, s in zip(prompts, scored, strict=True)])
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("def reward(:\n")
    (folder / "a_file").write_text("text")
    (folder / "stage3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (folder / "stage5.json").write_text('{"zero_optimization": {"stage": 5}}')
    (folder / "cut.json").write_text('{"zero_optimization": ')
    (folder / "empty").mkdir()


def _write_damaged_models(folder: Path) -> None:
    def copy(name: str, *without: str) -> Path:
        return Path(shutil.copytree(folder / "model", folder / name, ignore=shutil.ignore_patterns(*without)))

    copy("no_weights", "*.safetensors")
    copy("no_tokenizer", "token*")
    (copy("cut_config") / "config.json").write_text("{")
    (copy("empty_config") / "config.json").write_text("{}")
    (copy("cut_tokenizer") / "tokenizer.json").write_text('{"version"')
    (copy("empty_tokenizer") / "tokenizer.json").write_text("{}")
    weights = copy("cut_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    config = json.loads((folder / "model" / "config.json").read_text())
    for name, change in {"classifier": {"architectures": ["LlamaForSequenceClassification"]}, "other_width": {
        "hidden_size": 32}}.items():  # fmt: skip
        (copy(name) / "config.json").write_text(json.dumps(config | change))
    file = copy("nan_weight") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for name, adapter in {"adapter": {}, "adapter_of_none": {"base_model_name_or_path": "no/such_base"}}.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | adapter))
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step"')


# -------------------------------------------------------------------------------------------------------------- faults


@dataclass
class Case:
    """A command line with one fault, and what its answer must name."""

    kind: str
    command: str
    options: dict[str, str | None]  # those of SOUND and the faulty ones, as text; None: the flag alone
    named: str  # a regular expression
    yaml: str | None = None  # the text of a YAML file that has the options in place of the flags
    told: bool = False  # whether a note is enough
    loads_nothing: bool = False
    more: list[str] = field(default_factory=list)  # further tokens of the command line

    def argv(self) -> list[str]:
        flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in self.options.items()]
        if self.yaml is not None:
            Path("run.yaml").write_text(self.yaml, encoding="utf-8")
            flags = ["--config=run.yaml"]
        return [*self.command.split(), *flags, *self.more]


def options_of(command: str) -> dict[str, Any]:
    """Return the options of a training command and their types."""
    run = cli._load(*cli.COMMANDS[command].run)
    classes = (run.arguments_class, run.config_class, ModelConfig, DatasetMixtureConfig)
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    return {f.name: hints[f.name] for cls in classes for f in fields(cls)}


def _case(kind: str, command: str, changes: dict[str, Any], named: str | None = None, **more: Any) -> Case:
    if kind != "contradiction" and any(name.startswith(("lora_", "load_in_", "bnb_")) for name in changes):
        changes = {"use_peft": None, **changes}
    return Case(kind, command, SOUND[command] | changes, named or "|".join(changes), **more)


def number(rng: random.Random) -> Case:
    """A numeric option that is NaN, infinite, outside its range, not whole or no number."""
    command = rng.choice([*TRAINING, *TRAINING, "ask", "steps sample"])
    of_steps = ("num_generations", "temperature", "top_p", "seed", "rows_at_once", "split_number", "total_splits")
    known = options_of(command) if command in TRAINING else of_steps
    if command == "ask":
        known = ("num_generations", "temperature", "top_p", "seed", "max_completion_length")
    name = rng.choice(sorted(RANGES.keys() & set(known)))
    found = RANGES[name]
    tried = ["nan", "inf", "-inf", "1e999", "many", "", "1,5", "-1", "-2", "0", "1.5", "-0.5", "1e-400"]
    tried += [str(found.high + 1)] if found.high is not None else []
    bad = [text for text in tried if not found.takes(_number(text)) and text not in found.also]
    value = rng.choice([text for text in bad if text not in map(str, found.also)])
    changes = {name: f"1 {value}" if name == "loss_weights" else value}
    case = _case("number", command, changes, named=name, loads_nothing=True)
    if name in WEIGHTS:
        return _with_list(case, name, value)
    if command in TRAINING and rng.random() < 0.4 and _number(value) != value:
        written = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(value, value)
        return _in_yaml(case, {name: yaml.safe_load(written)})
    return case


def _with_list(case: Case, name: str, value: str) -> Case:
    """Write weights as two tokens."""
    del case.options[name]
    case.options.pop("reward", None)
    two = {
        "loss_weights": ["--loss_type", "nca", "sft"],
        "reward_weights": ["--reward", "mine.py:reward", "mine.py:reward"],
    }
    case.more = [*two[name], f"--{name}", "1", value] if value else [*two[name], f"--{name}=1"]
    if case.command == "conditional":
        case.more = ["--reward=[mine.py:reward, mine.py:reward]", f"--{name}", "1", value or "many"]
    return case


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _in_yaml(case: Case, changes: dict[str, Any]) -> Case:
    """Write the options as a YAML file, in which ``changes`` are the faulty ones."""
    plain = {name: True if value is None else yaml.safe_load(value) for name, value in case.options.items()}
    case.yaml = yaml.safe_dump(plain | changes, allow_unicode=True)
    return case


def misspelled(rng: random.Random) -> Case:
    """An option with a letter too many, too few, or two exchanged."""
    command = rng.choice(TRAINING)
    known = options_of(command)
    name = rng.choice(sorted(n for n in known if len(n) > 4))
    i = rng.randrange(1, len(name) - 1)
    typo = rng.choice(
        [name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name[:i] + name[i + 1] + name[i] + name[i + 2 :]]
    )
    if typo in known or typo.removeprefix("no_") in known:
        typo = name + "x"
    case = _case("misspelled", command, {typo: "1"}, named=f"unknown (flag|key) '(--)?{typo}'")
    return _in_yaml(case, {typo: 1}) if rng.random() < 0.4 else case


def wrong_type(rng: random.Random) -> Case:
    """A value of another type in a YAML file: a list or mapping for a scalar, text for a truth value, nothing."""
    command = rng.choice(TRAINING)
    known = options_of(command)
    plain = sorted(name for name, hint in known.items() if hint in (int, float, bool, str) and name in RANGES | COMMON)
    name = rng.choice([*plain, "gradient_checkpointing", "shuffle_dataset", "trust_remote_code"])
    name = name if name in known else "seed"
    value = rng.choice([[1, 2], {"a": 1}, None, [[1]], "maybe so"])
    if value == "maybe so" and known[name] is str:
        value = ["maybe", "so"]
    return _in_yaml(_case("wrong type", command, {name: "x"}, named=name), {name: value})


NAMES = {  # option -> what is not there; together with what it needs
    "lr_scheduler_type": "cosin", "optim": "adamm", "layout": "packed", "save_strategy": "often", "dtype": "int3",
    "attn_implementation": "flush", "report_to": "wandbb", "hub_strategy": "never", "ddp_backend": "glue",
    "debug": "everything", "fsdp": "shards", "log_level": "loud", "lr_scheduler_kwargs": '{"num_cicles": 1}',
    "gradient_checkpointing_kwargs": '{"reentrant": true}', "accelerator_config": '{"split": true}',
    "model_init_kwargs": '{"colour": "red"}', "optim_args": "momentom=0.9", "lora_target_modules": "q_prj",
    "lora_modules_to_save": "lm_haed", "lora_task_type": "CAUSAL", "bnb_4bit_quant_type": "nf5",
    "logging_strategy": "sometimes", "eval_strategy": "step", "torch_compile_backend": "inductr",
    "dataset_train_split": "trian", "dataset_config": "mian", "model_revision": "v2",
    "dataloader_multiprocessing_context": "thread",
}  # fmt: skip
NAMES_OF = {
    "reward": {"loss_type": "mca", "columns": "prompt=promt", "on_bad_row": "skip"},
    "preference": {"loss_type": "dpoo", "columns": "chosen=chosn", "on_bad_row": "warn"},
    "fdpg": {"divergence": "jss", "baseline": "mean", "proposal": "old", "reward": "mine.py:rewards"},
    "conditional": {
        "condition": "phrase", "kl_direction": "up", "reward": "mine.py:rewards", "on_bad_row": "skip",
        "vllm_mode": "here",
    },
    "steps sample": {"dtype": "int4", "condition": "best", "sampler": "{address: here}"},
    "steps score": {"reward": "mine.py:rewards"},
    "steps judge": {"judge": "{modl: m}"},
    "ask": {"dtype": "float99", "attn_implementation": "flush"},
}  # fmt: skip


def wrong_name(rng: random.Random) -> Case:
    """A name that is none of those known."""
    command = rng.choice([*TRAINING, *NAMES_OF])
    known = {**(NAMES if command in TRAINING else {}), **NAMES_OF[command]}
    name = rng.choice(sorted(known))
    said = {
        "lora_target_modules": "q_prj", "lora_task_type": "CAUSAL", "lora_modules_to_save": "lm_haed",
        "condition": "condition", "divergence": "divergence", "model_init_kwargs": "colour", "sampler": "address",
        "reward": "rewards", "dataset_train_split": "trian", "fsdp": "fsdp", "judge": "modl",
    }.get(name, name)  # fmt: skip
    return _case("wrong name", command, {name: known[name]}, named=f"{name}|{said}")


DAMAGED = (
    "empty", "no_weights", "no_tokenizer", "cut_config", "empty_config", "cut_tokenizer", "empty_tokenizer",
    "cut_weights", "classifier", "other_width", "adapter", "adapter_of_none", "encoder_decoder", "a_file", "no/such",
    "./nothing", "nan_weight",
)  # fmt: skip


def no_model(rng: random.Random) -> Case:
    """A model that is none, is damaged, or is of another kind."""
    command = rng.choice([*TRAINING, "ask", "steps sample", "steps train"])
    name = rng.choice([m for m in DAMAGED if not (m == "encoder_decoder" and command == "fdpg")])
    return _case("no model", command, {"model_name_or_path": name}, named=f"{re.escape(name)}|such_base")


def no_file(rng: random.Random) -> Case:
    """Data, functions, configurations and folders that are not there or are something else."""
    command = rng.choice([*TRAINING, *TRAINING, "data", "steps score", "steps sample", "steps train"])
    if command in TRAINING:
        tried = [
            ("dataset_name", "nothing.jsonl"), ("dataset_name", "a_file"), ("dataset_name", "no/such"),
            ("dataset_name", "empty"), ("dataset_name", "model"), ("output_dir", "a_file"),
            ("output_dir", "a_file/out"), ("output_dir", "/proc/out"), ("resume_from_checkpoint", "empty"),
            ("resume_from_checkpoint", "nothing"),
            ("resume_from_checkpoint", "a_file"), ("resume_from_checkpoint", "checkpoint-1"),
            ("resume_from_checkpoint", "model"), ("config", "nothing.yaml"), ("config", "empty"),
            ("deepspeed", "nothing.json"), ("deepspeed", "cut.json"), ("deepspeed", "empty"),
            ("accelerator_config", "nothing.json"), ("accelerate_config", "nothing.yaml"),
            ("fsdp_config", "nothing.json"),
        ]  # fmt: skip
        mine = {"fdpg": "reward", "conditional": "reward"}.get(command, "loss_type")
        tried += [(mine, "nothing.py:f"), (mine, "broken.py:reward"), (mine, "a_file:f"), (mine, "empty.py:f")]
        tried += [("judge", "nothing.yaml"), ("condition", "nothing.yaml")] if command == "conditional" else []
    else:
        tried = {
            "data": [
                ("dataset_name", "nothing.csv"), ("output", "a_file/o.jsonl"), ("output", "o.csv"), ("model", "empty")
            ],
            "steps score": [("input", "nothing.jsonl"), ("input", "a_file"), ("output", "a_file/o.jsonl")],
            "steps sample": [("prompts", "nothing.jsonl"), ("prompts", "empty"), ("output", "/proc/o.jsonl")],
            "steps train": [("input", "nothing.jsonl"), ("input", "prompts.txt"), ("output_dir", "a_file")],
        }[command]  # fmt: skip
    name, value = rng.choice(tried)
    place = re.escape(value.split(":")[0].split("/")[0 if not value.startswith("/") else 1])
    changes = {name: value, **({"judge": value, "reward": None} if name == "judge" else {})}
    case = _case("no file", command, changes, named=f"{place}|{name}")
    if name == "judge":
        del case.options["reward"]
    return case


TOGETHER = (
    ("reward", {"bf16": "true", "fp16": "true"}, "fp16|bf16"),
    ("reward", {"fp16": "true"}, "fp16"),
    ("reward", {"load_in_4bit": None, "load_in_8bit": None}, "8 bit|load_in"),
    ("reward", {"lora_alpha": "8"}, "use_peft"),
    ("reward", {"precompute_ref_log_probs": None, "sync_ref_model": None}, "sync_ref_model"),
    ("reward", {"max_length": "8", "max_prompt_length": "8"}, "max_prompt_length"),
    ("reward", {"loss_weights": "1", "loss_type": "nca sft"}, "loss_"),
    ("reward", {"eval_strategy": "steps"}, "evaluation"),
    ("reward", {"load_best_model_at_end": "true"}, "load_best_model_at_end"),
    ("reward", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
    ("reward", {"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type"),
    ("reward", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": NaN}'}, "num_cycles"),
    ("reward", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 1}'}, "lr_end"),
    ("reward", {"dataloader_prefetch_factor": "2"}, "dataloader_prefetch_factor"),
    ("reward", {"dataset_streaming": "true", "test_split_size": "0.5"}, "test_split_size"),
    ("reward", {"features": "[]"}, "features"),
    ("reward", {"max_eval_samples": "2"}, "max_eval_samples"),
    ("reward", {"fsdp_config": '{"version": 2}'}, "fsdp"),
    ("reward", {"dataloader_drop_last": "true", "per_device_train_batch_size": "16"}, "No step"),
    ("preference", {"dataset_name": "groups.jsonl"}, "chosen"),
    ("fdpg", {"features": "[{contains: a, moment: 0.5}]"}, "features"),
    ("fdpg", {"prompt": "a"}, "prompt"),
    ("fdpg", {"per_device_train_batch_size": "7"}, "per_device_train_batch_size"),
    ("fdpg", {"min_p": "0.5"}, "min_p"),
    ("fdpg", {"eval_samples": "10"}, "eval_samples"),
    ("conditional", {"judge": "{model: m, base_url: 'http://localhost:1'}"}, "judge"),
    ("conditional", {"kl_coef": "0", "kl_target": "0.1"}, "kl_target"),
    ("conditional", {"score_column": "score"}, "score_column"),
    ("conditional", {"prompts_per_round": "1000"}, "prompts_per_round"),
    ("conditional", {"num_generations": "4"}, "num_generations|quantiles|completions"),
    ("conditional", {"num_rounds": "0.5", "max_steps": "-1"}, "num_(train_epochs|rounds)"),
    ("conditional", {"num_rounds": "2", "num_train_epochs": "3"}, "num_rounds"),
    ("conditional", {"packing": "true"}, "packing"),
    ("conditional", {"num_processes": "2"}, "num_processes"),
    ("ask", {"learning_rate": "1"}, "learning_rate"),
    ("data", {"max_length": "1"}, "max_length"),
    ("steps sample", {"split_number": "2"}, "split_number"),
    ("steps sample", {"max_completion_length": "100000"}, "max_"),
    ("steps train", {"score_column": "scores"}, "scores"),
)
NOTED = (  # where the run goes on, and a note or a warning names the option
    ("reward", {"temperature_alpha": "1e300"}, "temperature_alpha"),
    ("reward", {"temperature_alpha": "1e-45"}, "temperature_alpha"),
    ("reward", {"warmup_steps": "1e9"}, "warmup_steps"),
    ("reward", {"max_train_samples": "1"}, "max_train_samples"),
    ("conditional", {"max_steps": "2"}, "max_steps"),
)


def contradiction(rng: random.Random) -> Case:
    """Options that do not fit together, or not to the command."""
    command, changes, named = rng.choice(TOGETHER)
    case = _case("contradiction", command, changes, named=named)
    if "loss_weights" in changes:
        case.options.pop("loss_type")
        case.more = ["--loss_type", "nca", "sft"]
    return case


def noted(rng: random.Random) -> Case:
    """A number that has a meaning, which is hardly what is meant."""
    command, changes, named = rng.choice(NOTED)
    return _case("noted", command, changes, named=named, told=True)


MISSING = (
    ("attn_implementation", "flash_attention_2"), ("attn_implementation", "flash_attention_3"), ("report_to", "wandb"),
    ("report_to", "mlflow"), ("deepspeed", "stage3.json"), ("deepspeed", "stage5.json"), ("optim", "galore_adamw"),
    ("optim", "lomo"), ("optim", "schedule_free_adamw"), ("optim", "adamw_torch_8bit"), ("use_liger_kernel", "true"),
    ("use_vllm", "true"), ("accelerate_config", "zero3"), ("accelerate_config", "zero2"),
)  # fmt: skip


def missing_package(rng: random.Random) -> Case:
    """What needs a package that is not installed (or is not supported)."""
    command = rng.choice(TRAINING)
    name, value = rng.choice([m for m in MISSING if m[0] != "use_vllm" or command in ("fdpg", "conditional")])
    said = {"accelerate_config": "[Dd]eep[Ss]peed"}.get(name, f"{name}|{value}")
    return _case("missing package", command, {name: value}, named=said + "|vllm" * (name == "use_vllm"))


BROKEN = {  # how a sound YAML file is broken -> what the answer names
    "a quote that does not end": (lambda text: text + 'run_name: "x', "run.yaml"),
    "a tab": (lambda text: text + "a:\n\tb: 1\n", "run.yaml"),
    "a key twice": (lambda text: text + "seed: 1\nseed: 2\n", "seed"),
    "a list": (lambda text: "- a\n- b\n", "run.yaml"),
    "a scalar": (lambda text: "just words", "run.yaml"),
    "nothing in it": (lambda text: "# nothing", "run.yaml"),
    "an alias of itself": (lambda text: text + "run_name: &a [*a]\n", "run.yaml"),
    "an unknown alias": (lambda text: text + "run_name: *gone\n", "run.yaml"),
    "code": (lambda text: text + "run_name: !!python/name:os.system\n", "run.yaml"),
    "a date": (lambda text: text + "max_prompt_length: 2020-01-01\n", "max_prompt_length"),
    "sexagesimal": (lambda text: text + "max_prompt_length: 1:30\n", "max_prompt_length"),
    "hexadecimal": (lambda text: text + "max_prompt_length: 0x10\n", "max_prompt_length"),
    "env, a list": (lambda text: text + "env: [A]\n", "env"),
    "env, a number as name": (lambda text: text + "env: {5: x}\n", "env"),
    "env, no value": (lambda text: text + "env: {FOO: }\n", "FOO"),
    "env, a name with =": (lambda text: text + "env: {'A=B': x}\n", "A=B"),
    "env, a name with a space": (lambda text: text + "env: {'A B': x}\n", "A B"),
    "env, a list as value": (lambda text: text + "env: {FOO: [1]}\n", "FOO"),
    "env, NUL": (lambda text: text + 'env: {FOO: "a\\0b"}\n', "FOO"),
    "a key of a number": (lambda text: text + "5: x\n", "5"),
    "a key of a truth value": (lambda text: text + "on: x\n", "True"),
    "two documents": (lambda text: text + "---\nseed: 1\n", "run.yaml"),
    "a set": (lambda text: text + "run_name: !!set {x}\n", "run.yaml"),
    "NUL in a path": (lambda text: text.replace("output_dir: out", 'output_dir: "o\\0ut"'), "output_dir|null|NUL"),
}  # fmt: skip


def broken_yaml(rng: random.Random) -> Case:
    """A YAML file that is none, or that says something else than it seems."""
    command = rng.choice(("reward", "preference"))
    how = rng.choice(sorted(BROKEN))
    change, named = BROKEN[how]
    case = _in_yaml(_case(f"YAML: {how}", command, {}, named=named), {})
    case.yaml = change(case.yaml)
    return case


OWN = {
    "loss_type": ("loss_raises", "loss_is_nan", "loss_is_one", "loss_asks"),
    "reward": ("raises", "short", "not_a_number", "words"),
}


def own_function(rng: random.Random) -> Case:
    """A function of the user's own that raises, or returns something else."""
    command = rng.choice([*TRAINING, "steps score"])
    option = "loss_type" if command in ("reward", "preference") else "reward"
    name = rng.choice(OWN[option])
    return _case("own function", command, {option: f"mine.py:{name}"}, named=f"{name}|mine.py")


_JUDGE = "model: m, base_url: 'http://localhost:1/v1'"
SPECS = (  # options that are mappings or lists: the command, the option, its text, what the answer names
    ("fdpg", "features", "[{contains: a, moment: .nan}]", "moment"),
    ("fdpg", "features", "[{contains: a, moment: 2}]", "moment"),
    ("fdpg", "features", "[{contains: a}]", "moment"),
    ("fdpg", "features", "[{contians: a, moment: 0.5}]", "contians"),
    ("fdpg", "features", "[{contains: [], moment: 0.5}]", "contains"),
    ("fdpg", "features", "[]", "features"),
    ("fdpg", "features", "{contains: a, moment: 0.5}", "features"),
    ("fdpg", "features", "[5]", "constraint"),
    ("fdpg", "features", "[{matches: '[', moment: 0.5}]", "matches"),
    ("fdpg", "features", "[{length: bytes, moment: 5}]", "length"),
    ("fdpg", "features", "[{length: words, min: .inf, moment: 5}]", "length"),
    ("fdpg", "features", "[{sum: [[.nan, {contains: a}]], moment: 1}]", "sum"),
    ("fdpg", "features", "[{contains: zzz, moment: 0.5}]", "zzz"),
    ("fdpg", "features", "[{contains: a, moment: 0.5}, {contains: a, moment: 0.7}]", "Two constraints"),
    ("conditional", "condition", "{kind: quantile_tokens, quantiles: 0}", "quantiles"),
    ("conditional", "condition", "{kind: quantile_tokens, quantiles: .nan}", "quantiles"),
    ("conditional", "condition", "{kind: quantile_tokens, quantile: 5}", "quantile"),
    ("conditional", "condition", "{kind: phrases, phrases: []}", "phrases"),
    ("conditional", "condition", "{quantiles: 5}", "kind"),
    ("conditional", "condition", "[phrases]", "condition"),
    ("conditional", "condition", "{kind: categories}", "categories"),
    ("conditional", "sampler", "{base_url: 'http://localhost:1/v1'}", "sampler"),
    ("conditional", "sampler", "{base_url: x, model: m, timeout: .nan}", "timeout|sampler|base_url"),
    ("conditional", "reward", "{classifier: no/such, label: good}", "no/such"),
    ("conditional", "reward", "{contians: a}", "contians"),
    ("conditional", "judge", f"{{{_JUDGE}, temperature: .nan}}", "temperature"),
    ("conditional", "judge", f"{{{_JUDGE}, budget: -1}}", "budget"),
    ("conditional", "judge", f"{{{_JUDGE}, timeout: 0}}", "timeout"),
    ("conditional", "judge", f"{{{_JUDGE}, max_tokens: 1.5}}", "max_tokens"),
    ("conditional", "judge", f"{{{_JUDGE}, colour: red}}", "colour"),
    ("conditional", "judge", f"{{{_JUDGE}, prompt: nothing.txt}}", "nothing.txt"),
    ("conditional", "judge", "[m]", "judge"),
    ("steps judge", "judge", f"{{{_JUDGE}, prompt: feedback, answers: [], cache: c}}", "answers"),
    ("steps judge", "judge", f"{{{_JUDGE}, prompt: feedback, answers: text, cache: a_file}}", "a_file"),
    ("steps sample", "sampler", "{base_url: 5}", "base_url"),
    ("steps sample", "sampler", "{base_url: 'http://localhost:1', extra_body: 5}", "extra_body"),
    ("steps score", "reward", "{contains: 5}", "contains"),
    ("steps score", "reward", "{classifier: model}", "label"),
)


def faulty_spec(rng: random.Random) -> Case:
    """A mapping or list in which a key, a value or a number is wrong."""
    command, option, text, named = rng.choice(SPECS)
    case = _case("spec", command, {option: text}, named=named)
    if option in ("features", "judge") and command in TRAINING:
        del case.options["reward"]
    if option == "judge" and command in TRAINING:
        case.options["condition"] = "text"
    return case


KINDS: tuple[tuple[Callable[[random.Random], Case], int], ...] = (  # with their share of the cases
    (number, 8), (misspelled, 2), (wrong_type, 2), (wrong_name, 4), (no_model, 3), (no_file, 4), (contradiction, 4),
    (noted, 1), (missing_package, 2), (broken_yaml, 3), (own_function, 2), (faulty_spec, 4),
)  # fmt: skip


def make_case(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    kinds, shares = zip(*KINDS, strict=True)
    return rng.choices(kinds, shares)[0](rng)


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Outcome:
    kind: str
    text: str


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """Collect what a run prints and logs."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("transformers", "contrastive_align", "trl")]
    handler = logging.StreamHandler(said)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextlib.contextmanager
def counted_loads() -> Iterator[list[str]]:
    """Count the models that are loaded."""
    loads: list[str] = []
    load = PreTrainedModel.__dict__["from_pretrained"]

    def watched(cls, name, *args, **kwargs):
        loads.append(str(name))
        return load.__func__(cls, name, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(watched)
    try:
        yield loads
    finally:
        PreTrainedModel.from_pretrained = load


def run(case: Case) -> Outcome:
    """Run a case in the present folder."""
    for name in ("out", "sampled.jsonl", "scored.jsonl", "judged.jsonl", "cache"):
        shutil.rmtree(name, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
    environment, error, status = dict(os.environ), None, 0
    accelerate.commands.launch.is_deepspeed_available = lambda: False  # also where it is: a launch takes minutes
    with heard() as said, counted_loads() as loads:
        try:
            cli.main(case.argv())
        except (UsageError, Fault, SystemExit) as ended:
            error, status = ended, ended.code
        except BaseException as raised:
            error = raised
            traceback.print_exc(file=said)
    os.environ.clear()
    os.environ.update(environment)
    text = said.getvalue()
    answer = text[text.find("error:") :] if "error:" in text else text
    if isinstance(error, Fault) or not isinstance(error, SystemExit | types.NoneType):
        return Outcome("crash", text[-1500:])
    if status not in (0, None):
        named = re.search(case.named, answer)
        return Outcome("right" if named and not (case.loads_nothing and loads) else "unclear", answer.strip()[:400])
    notes = "\n".join(line for line in text.splitlines() if re.search(case.named, line))
    return Outcome("told" if case.told and notes else "silent", notes)


def run_cases(seed: int, numbers: Iterable[int], folder: Path) -> dict[int, tuple[Case, Outcome]]:
    """Run cases in a folder: number -> the case and what came of it."""
    write_files(folder)
    found = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        for number in numbers:
            case = make_case(seed, number)
            found[number] = (case, run(case))
    finally:
        os.chdir(before)
    return found


def faults(found: dict[int, tuple[Case, Outcome]]) -> dict[int, tuple[Case, Outcome]]:
    return {number: pair for number, pair in found.items() if pair[1].kind not in ("right", "told")}


def table(found: dict[int, tuple[Case, Outcome]]) -> str:
    kinds = ("right", "told", "unclear", "silent", "crash")
    counts = Counter((case.kind.partition(":")[0], outcome.kind) for case, outcome in found.values())
    lines = [f"| fault | cases | {' | '.join(kinds)} |", f"|---|{'---|' * (len(kinds) + 1)}"]
    for name in sorted({kind for kind, _ in counts}):
        cells = [counts[name, kind] for kind in kinds]
        lines.append(f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    totals = [sum(counts[name, kind] for name, _ in {(k, 0) for k, _ in counts}) for kind in kinds]
    return "\n".join([*lines, f"| all | {sum(totals)} | {' | '.join(map(str, totals))} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the cases to run")
    parser.add_argument("--answers", action="store_true", help="print the answer of every case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="options_fuzz_") as folder:
        found = run_cases(args.seed, args.only or range(args.cases), Path(folder))
    print(table(found))
    for number, (case, outcome) in (found if args.answers else faults(found)).items():
        flags = " ".join(case.argv()) if case.yaml is None else f"{case.command} with {case.yaml!r}"
        print(f"\n{number} {outcome.kind} ({case.kind}, names {case.named}): {flags}\n    {outcome.text}")
    if faults(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
