"""Command line and YAML -> config objects: strict, with the nearest known name for what is unknown."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from contrastive_align.trainers import ContrastiveConfig


# Keys of older releases and of the published YAMLs -> today's key.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "warmup_ratio": "warmup_steps",
    "tokenizer_name_or_path": "",
    "base_model_revision": "model_revision",
    "overwrite_output_dir": "",
    "save_safetensors": "",
}
WHY_GONE = {
    "tokenizer_name_or_path": "the tokenizer is the model's; in Python, pass another as processing_class",
    "overwrite_output_dir": "an existing output_dir is always written into",
    "save_safetensors": "weights are always saved as safetensors",
}


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments, and how much of a dataset is taken.

    Args:
        max_train_samples: take only the first rows of the training split.
        max_eval_samples: take only the first rows of the evaluation split.
    """

    max_train_samples: int | None = field(default=None, metadata={"help": "Only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Only the first N evaluation rows."})


@dataclass
class Arguments:
    """Everything a run was told, and what was chosen for it."""

    script: RunArguments
    training: ContrastiveConfig
    model: ModelConfig
    datasets: DatasetMixtureConfig
    given: set[str]
    notes: list[str]


class UsageError(SystemExit):
    """A wrong command line: the message, and exit status 2."""

    def __init__(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        super().__init__(2)
        self.message = message


def parse(argv: Sequence[str] | None = None, *, prog: str, defaults: dict[str, Any] | None = None) -> Arguments:
    """``[config.yaml] [--flag=value ...]`` -> :class:`Arguments`.

    The YAML may stand first or come with ``--config``; flags go before YAML, YAML before ``defaults`` (these are
    for what was not given). Every key and flag must be known. ``env:`` in the YAML sets environment
    variables, as in TRL.

    Raises:
        UsageError: an unknown key or flag (with the nearest known one), a value of the wrong type, a missing YAML.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser(
        (RunArguments, ContrastiveConfig, ModelConfig, DatasetMixtureConfig),
        prog=prog,
        usage=f"{prog} [config.yaml] [--flag=value ...]    (all flags: {prog} --help)",
        allow_abbrev=False,
    )
    parser.error = lambda message: _usage_error(prog, message)  # argparse would print every flag there is
    known = {action.dest for action in parser._actions} - {"help"}

    config_path, flags = _split_config(argv)
    config = _read_yaml(config_path) if config_path else {}
    notes: list[str] = []
    config = _modernise(config, notes, where=config_path or "")
    for key in config:
        if key not in known:
            raise UsageError(f"{config_path}: unknown key '{key}'{_nearest(key, known)}")
    flags = _modernise_flags(flags, notes, known)
    given = set(config) | {_flag_name(f, known) for f in flags if f.startswith("--")}

    for key, value in (defaults or {}).items():
        if key not in given:
            config[key] = value
    if not _accelerator_available():
        chosen = {"use_cpu": True, "bf16": False} if not {"bf16", "fp16"} & given else {"use_cpu": True}
        chosen = {key: value for key, value in chosen.items() if key not in given}
        if chosen:
            config |= chosen
            notes.append("no accelerator found: " + ", ".join(f"{k}={v}" for k, v in chosen.items()))

    # Scalars and lists go through argparse like flags, so that their types are checked; the rest is set as it is.
    objects = {k: v for k, v in config.items() if v is None or isinstance(v, dict) or _holds_objects(v)}
    parser.set_defaults_with_config(**objects)
    tokens = [token for k, v in config.items() if k not in objects for token in _as_tokens(k, v)]
    try:
        script, training, model, datasets = parser.parse_args_into_dataclasses(tokens + flags, look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return Arguments(script, training, model, datasets, given, notes)


def _usage_error(prog: str, message: str):
    raise UsageError(f"{message}    (all flags: {prog} --help)")


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    configs, rest, i = [], [], 0
    while i < len(argv):
        token = argv[i]
        previous = argv[i - 1] if i else ""
        if token == "--config":
            if i + 1 == len(argv):
                raise UsageError("--config needs the path of a YAML file.")
            configs.append(argv[i + 1])
            i += 1
        elif token.startswith("--config="):
            configs.append(token.split("=", 1)[1])
        elif token.endswith((".yaml", ".yml")) and not (previous.startswith("--") and "=" not in previous):
            configs.append(token)
        else:
            rest.append(token)
        i += 1
    if len(configs) > 1:
        raise UsageError(f"{len(configs)} YAML files are given ({', '.join(configs)}), expected at most one.")
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"'{rest[0]}' is neither a flag nor a .yaml file.")
    return (configs[0] if configs else None), rest


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UsageError(f"no YAML file '{path}' (looked in {Path.cwd()}).")
    try:
        config = yaml.load(Path(path).read_text(), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds a {type(config).__name__}, expected 'key: value' lines.")
    env = config.pop("env", {})
    os.environ.update({key: str(value) for key, value in env.items()})
    return config


class _StrictLoader(yaml.SafeLoader):
    """A key given twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"the key {sorted(twice)} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def _modernise(config: dict[str, Any], notes: list[str], where: str) -> dict[str, Any]:
    """Today's keys for the published ones, a line for each."""
    config = dict(config)
    for old, new in RENAMED.items():
        if old not in config:
            continue
        value = config.pop(old)
        if not new:
            notes.append(f"'{old}' is gone: {WHY_GONE[old]}")
        elif new in config:
            raise UsageError(f"{where}: both '{old}' and '{new}' are given, which mean the same. Keep '{new}'.")
        else:
            notes.append(f"'{old}' is now '{new}'")
            config[new] = value
    if "use_flash_attention_2" in config:
        if config.pop("use_flash_attention_2"):
            config.setdefault("attn_implementation", "flash_attention_2")
        notes.append("'use_flash_attention_2' is now 'attn_implementation: flash_attention_2'")
    if "dataset_mixer" in config:
        config |= _from_mixer(config.pop("dataset_mixer"), config.pop("dataset_splits", None), where)
        notes.append("'dataset_mixer' and 'dataset_splits' are now 'datasets' (or dataset_name and dataset_*_split)")
    return config


def _from_mixer(mixer: Any, splits: Any, where: str) -> dict[str, Any]:
    """{name: fraction} and [train split, test split] of the alignment handbook, in today's keys."""
    splits = splits or ["train", "test"]
    if not isinstance(mixer, dict) or not mixer or not all(isinstance(f, (int, float)) for f in mixer.values()):
        raise UsageError(f"{where}: 'dataset_mixer' is {mixer!r}, expected {{name: fraction}}.")
    if not isinstance(splits, list) or not 1 <= len(splits) <= 2:
        raise UsageError(f"{where}: 'dataset_splits' is {splits!r}, expected [train split, test split].")
    if any(not 0 < fraction <= 1 for fraction in mixer.values()):
        raise UsageError(f"{where}: 'dataset_mixer' has fractions {list(mixer.values())}, expected numbers in (0, 1].")
    keys: dict[str, Any] = {"dataset_train_split": splits[0]}
    if len(splits) == 2:
        keys["dataset_test_split"] = splits[1]
    if len(mixer) == 1 and next(iter(mixer.values())) == 1:
        return keys | {"dataset_name": next(iter(mixer))}
    percent = {name: f"{splits[0]}[:{round(100 * fraction)}%]" for name, fraction in mixer.items()}
    keys["datasets"] = [{"path": name, "split": split} for name, split in percent.items()]
    return keys


def _modernise_flags(flags: list[str], notes: list[str], known: set[str]) -> list[str]:
    result = []
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            name = name.replace("-", "_")
            if RENAMED.get(name):
                notes.append(f"'--{name}' is now '--{RENAMED[name]}'")
                flag = f"--{RENAMED[name]}{equals}{value}"
            elif name in WHY_GONE:
                raise UsageError(f"'--{name}' is gone: {WHY_GONE[name]}")
            elif name != "help" and _flag_name(flag, known) not in known:
                raise UsageError(f"unknown flag '--{name}'{_nearest(name, known, '--')}")
        result.append(flag)
    return result


def _flag_name(flag: str, known: set[str]) -> str:
    name = flag[2:].partition("=")[0].replace("-", "_")
    return name[3:] if name.startswith("no_") and name not in known else name


def _nearest(name: str, known: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean '{prefix}{near[0]}'?" if near else ". See --help for all."


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)


def _as_tokens(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _accelerator_available() -> bool:
    return torch.accelerator.is_available()
