"""Parse a command line and a YAML file into config objects; unknown names are errors with a suggestion."""

from __future__ import annotations

import argparse
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from contrastive_align.launch.bundled import find_yaml
from contrastive_align.launch.flags import (
    GONE,
    NEGATIVE_NUMBER,
    RENAMED,
    check_ratio,
    flag_name,
    modernise_flags,
    resolve_aliases,
    resolve_flag_aliases,
)
from contrastive_align.launch.usage import UsageError, in_own_words, nearest
from contrastive_align.ranges import Range, check_numbers
from contrastive_align.trainers import ContrastiveConfig


SEVERAL = r"\[?[\w.:/-]+(,\s*[\w.:/-]+)+\]?"  # names or numbers with commas between


def option(default: Any, help: str, **more: Any) -> Any:
    """Define a field of an arguments class with its line of ``--help``, and more for argparse, such as ``nargs``."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class RunArguments(ScriptArguments):
    """Add limits on the number of rows to TRL's script arguments."""

    ALIASES: ClassVar[dict[str, str]] = {}  # another name of an option on the command line and in YAML -> the option
    RANGES: ClassVar[dict[str, Range]] = {}  # that differ from those of every command

    max_train_samples: int | None = option(None, "Take only the first N training rows.")
    max_eval_samples: int | None = option(None, "Take only the first N evaluation rows.")
    report_prompts: int = option(32, "Held-out prompts whose samples report.html shows; 0: none.")
    preflight_only: bool = option(False, "Run the checks before the first step, and stop there.")

    def __post_init__(self):
        check_numbers(self)


@dataclass
class FeedbackArguments(RunArguments):
    """Name the prompts that are sampled, and what says how good a completion is.

    ``judge`` and ``sampler`` are mappings of the arguments of :class:`~contrastive_align.judge.judge.Judge` and
    :class:`~contrastive_align.sampling.server.ServerSampler`; ``reward`` may be a list, summed by ``reward_weights``
    (see ``targets.features``). Rewards are measured on ``eval_prompts`` of the evaluation split, or of the training
    split without one, with ``num_generations`` completions each.
    """

    ALIASES: ClassVar[dict[str, str]] = {"reward_funcs": "reward"}

    prompt: str | None = option(None, "A single prompt to sample from, instead of a dataset.")
    reward: list | str | dict | None = option(
        None,
        "What scores a completion: file.py:function, a reward-model id, '{classifier: ..., label: ...}', or several.",
        nargs="+",
    )
    judge: dict | str | None = option(
        None, "A model that judges completions: a YAML file, or '{model: name, base_url: address, budget: 1000}'."
    )
    sampler: dict | str | None = option(
        None, "A server that samples, for LoRA runs only: '{base_url: address, model: name}'."
    )
    eval_prompts: int = option(
        100, "Held-out prompts whose samples are scored before and after (with a judge 16 by default); 0: none."
    )

    SPECS: ClassVar[tuple[str, ...]] = ("reward", "judge", "sampler")  # given as text, or as a YAML file

    def __post_init__(self):
        super().__post_init__()
        for name in self.SPECS:
            setattr(self, name, read_spec(name, getattr(self, name)))
        if isinstance(self.reward, list):
            several = [read_spec("reward", one) for one in self.reward]
            self.reward = several[0] if len(several) == 1 else several
        if self.reward is not None and self.judge is not None:
            raise ValueError("both reward and judge are given. Give one: what says how good a completion is.")

    @property
    def has_feedback(self) -> bool:
        """Whether something says how good new completions are."""
        return self.reward is not None or self.judge is not None


@dataclass
class Arguments:
    """The parsed options of a run, the names that were given, and notes on defaults chosen for it."""

    script: RunArguments
    training: Any  # a ContrastiveConfig, or what ``parse`` was given instead
    model: ModelConfig
    datasets: DatasetMixtureConfig
    given: set[str]
    notes: list[str]
    command_line: str = ""

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names of the data set, or of those in the mixture."""
        named = self.script.dataset_name
        return (named,) if named else tuple(part.path for part in self.datasets.datasets)

    @property
    def dataset(self) -> str | None:
        """The name of the data set or mixture; None for one prompt and for the bundled data."""
        return ", ".join(self.dataset_names) or None

    @property
    def bundled_data(self) -> bool:
        """Whether neither a data set nor a prompt is given, so that the bundled data are used."""
        named = (self.script.dataset_name, getattr(self.script, "prompt", None))
        return named == (None, None) and not self.datasets.datasets


def parse(
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    defaults: dict[str, Any] | None = None,
    script: type[RunArguments] = RunArguments,
    training: type = ContrastiveConfig,
) -> Arguments:
    """Parse ``[config.yaml] [--flag=value ...]``.

    The YAML file comes first or with ``--config``, which takes the name of a bundled one, too. Flags override the YAML
    file, which overrides ``defaults``. Every key and flag must be a field of ``script``, ``training`` or TRL's
    dataclasses, or one of the script's ``ALIASES``; anything else is a UsageError, with the option that is meant.
    ``env:`` in the YAML file sets environment variables, as in TRL.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    classes = (script, training, ModelConfig, DatasetMixtureConfig)
    usage = f"{prog} [config.yaml] [--flag=value ...]"
    parser = TrlParser(classes, prog=prog, usage=usage, allow_abbrev=False)

    def refuse(message: str):  # argparse would print every flag there is
        said = in_own_words(message)
        placed = _with_place(said.removeprefix("--"), config, config_path, flags)
        raise UsageError(placed if placed.startswith(f"{config_path}: ") else f"{said}    (all flags: {prog} --help)")

    parser.error = refuse
    parser._negative_number_matcher = NEGATIVE_NUMBER
    actions = {action.dest: action for action in parser._actions}
    aliases = script.ALIASES
    known = set(actions) - {"help"} | set(aliases)

    config_path, flags = _split_config(argv)
    notes: list[str] = []
    config = _modernise(_read_config(config_path), notes, where=config_path) if config_path else {}
    for key in config:
        if key not in known:
            raise UsageError(f"{config_path}: unknown key '{key}'{nearest(str(key), known)}")
    config = resolve_aliases(config, aliases, where=config_path or "")
    _check_kinds(config, classes, where=config_path or "")
    flags = resolve_flag_aliases(modernise_flags(flags, notes, known), aliases)
    given = set(config) | {flag_name(f, known) for f in flags if f.startswith("--")}

    config |= {key: value for key, value in (defaults or {}).items() if key not in given}
    if not _accelerator_available():
        chosen = {} if "use_cpu" in given else {"use_cpu": True}
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by accelerate, whose word it is
        chosen |= {} if {"bf16", "fp16"} & given or launched != "no" else {"bf16": False}
        if chosen:
            config |= chosen
            notes.append("no accelerator found: " + ", ".join(f"{k}={v}" for k, v in chosen.items()))

    # Scalars and lists pass through argparse like flags, which checks their types; mappings are set directly.
    objects = {k: v for k, v in config.items() if _is_object(v, actions[k])}
    parser.set_defaults_with_config(**objects)
    tokens = [token for k, v in config.items() if k not in objects for token in _as_tokens(actions[k], v)]
    _refuse_commas(tokens, actions, where=config_path)
    _refuse_commas(flags, actions)
    options = {"look_for_args_file": False, "return_remaining_strings": True}
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(tokens + flags, **options)
        for each in [*parsed, *parsed[-1].datasets]:
            check_numbers(each)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(_with_place(str(error), config, config_path, flags)) from error
    if unused:
        raise UsageError(f"'{' '.join(unused)}' belongs to no flag. Usage: {usage}")
    if parsed[0].max_train_samples == 1:
        notes.append("max_train_samples=1: one row is trained on")
    for steps, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if steps in given and getattr(parsed[1], strategy) == "no":
            notes.append(f"{steps} has no effect: {strategy} is no")
    return Arguments(*parsed, given, notes)


def _with_place(text: str, config: dict[str, Any], config_path: str | None, flags: list[str]) -> str:
    """Name an option at the beginning of a sentence as it was given: as a flag, or with the YAML file that has it."""
    name = re.match(r"\w*", text)[0]
    if name in {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}:
        return f"--{text}"
    return f"{config_path}: {text}" if name in config and config_path else text


def _refuse_commas(tokens: list[str], actions: dict[str, argparse.Action], where: str | None = None) -> None:
    """Refuse several values with commas between them where an option takes a list."""
    option = ""
    for token in tokens:
        name, _, value = token.partition("=") if token.startswith("--") else (option, "", token)
        option = name
        action = actions.get(name[2:].replace("-", "_"))
        if action is None or action.nargs not in ("*", "+") or not re.fullmatch(SEVERAL, value):
            continue
        parts = re.split(r",\s*", value.strip("[]"))
        if where:
            raise UsageError(f"{where}: {action.dest} is {value!r}, expected a list: [{', '.join(parts)}]")
        raise UsageError(f"--{action.dest} is {value!r}, expected spaces between: --{action.dest} {' '.join(parts)}")


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    if argv[-1:] == ["--config"]:
        raise UsageError("--config needs the path of a YAML file.")
    configs, rest = [], []
    for previous, token in zip(["", *argv], argv, strict=False):
        is_value = previous.startswith("--") and "=" not in previous
        if token.startswith("--config="):
            configs.append(token.split("=", 1)[1])
        elif previous == "--config" or (
            token.endswith((".yaml", ".yml")) and not token.startswith("-") and not is_value
        ):
            configs.append(token)
        elif token != "--config":
            rest.append(token)
    if len(configs) > 1:
        raise UsageError(f"{len(configs)} YAML files are given ({', '.join(configs)}), expected at most one.")
    if rest and not rest[0].startswith("-"):
        raise UsageError(f"'{rest[0]}' is neither a flag nor a .yaml file.")
    return (configs[0] if configs else None), rest


def read_spec(name: str, value: Any) -> Any:
    """Parse a mapping or list given as text or as a YAML file; return other values unchanged.

    >>> read_spec("condition", "{kind: phrases, phrases: toxicity}"), read_spec("condition", "phrases")
    ({'kind': 'phrases', 'phrases': 'toxicity'}, 'phrases')
    """
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return read_yaml(value)
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    return load_yaml(value, f"{name} is {value!r}, which")


def read_yaml(path: str) -> Any:
    """Read a YAML file, or a bundled one by its name; raise UsageError if it does not exist or is not YAML."""
    try:
        return load_yaml(Path(find_yaml(path, "yamls")).read_bytes(), path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_config(path: str) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise UsageError(f"{path} {found}, expected 'key: value' lines.")
    env = config.pop("env", None) or {}
    if not isinstance(env, dict):
        raise UsageError(f"{path}: 'env' is a {type(env).__name__}, expected 'NAME: value' lines.")
    for key, value in env.items():
        named = isinstance(key, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
        if not named or value is None or isinstance(value, dict | list) or "\0" in str(value):
            raise UsageError(
                f"{path}: 'env' has {key!r}: {value!r}, expected a variable's name (letters, digits, _) and its text."
            )
    os.environ.update({key: str(value) for key, value in env.items()})
    return config


def load_yaml(text: str | bytes, what: str) -> Any:
    """Load YAML text in which no key is given twice; raise ValueError if ``what`` is not such YAML."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """Read YAML whose values are those of JSON, with the numbers of YAML 1.2: 010 is 10, 1e-5 a number, 1:30 a text.

    Refused are a key that is given twice, of which YAML would take the last, an alias inside what it stands for, and
    aliases of aliases that unfold to more than ``MOST_NODES`` values.
    """

    MOST_NODES = 100_000
    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count(node, set(), [self.MOST_NODES])
        return node

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # <<: may stand more than once
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"the key {sorted(twice)} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_undefined)


def _count(node: yaml.Node, inside: set[int], left: list[int]) -> None:
    """Count the values that a node unfolds to, off those that are left."""
    left[0] -= 1
    if id(node) in inside:
        raise yaml.YAMLError(f"an alias stands inside what it is an alias of (line {node.start_mark.line + 1} on)")
    if left[0] < 0:
        raise yaml.YAMLError("its aliases unfold to too many values")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _count(part, inside | {id(node)}, left)


def _modernise(config: dict[str, Any], notes: list[str], where: str) -> dict[str, Any]:
    """Rename the keys of older releases, with a note for each."""
    config = dict(config)
    for old in GONE.keys() & config.keys():
        notes.append(f"'{old}' is gone: {GONE[old]}")
        del config[old]
    for old, new in RENAMED.items():
        if old in config and new in config:
            raise UsageError(f"{where}: both '{old}' and '{new}' are given, which mean the same. Keep '{new}'.")
        if old in config:
            check_ratio(old, config[old], where)
            notes.append(f"'{old}' is now '{new}'")
            config[new] = config.pop(old)
    if "use_flash_attention_2" in config:
        if config.pop("use_flash_attention_2"):
            config.setdefault("attn_implementation", "flash_attention_2")
        notes.append("'use_flash_attention_2' is now 'attn_implementation: flash_attention_2'")
    if "dataset_mixer" in config:
        for new in ("dataset_name", "datasets"):
            if new in config:
                raise UsageError(f"{where}: both 'dataset_mixer' and '{new}' are given. Keep '{new}'.")
        config |= _from_mixer(config.pop("dataset_mixer"), config.pop("dataset_splits", None), where)
        notes.append("'dataset_mixer' and 'dataset_splits' are now 'datasets' (or dataset_name and dataset_*_split)")
    return config


def _from_mixer(mixer: Any, splits: Any, where: str) -> dict[str, Any]:
    """Convert the alignment handbook's {name: fraction} and [train split, test split] to today's keys."""
    splits = splits or ["train", "test"]
    if not isinstance(mixer, dict) or not mixer or not all(isinstance(f, (int, float)) for f in mixer.values()):
        raise UsageError(f"{where}: 'dataset_mixer' is {mixer!r}, expected {{name: fraction}}.")
    if not isinstance(splits, list) or not 1 <= len(splits) <= 2:
        raise UsageError(f"{where}: 'dataset_splits' is {splits!r}, expected [train split, test split].")
    fractions = list(mixer.values())
    found = f"{where}: 'dataset_mixer' has fractions {fractions}"
    if any(not 0 < fraction <= 1 for fraction in fractions):
        raise UsageError(f"{found}, expected numbers in (0, 1].")
    keys: dict[str, Any] = dict(zip(("dataset_train_split", "dataset_test_split"), splits, strict=False))
    if fractions == [1]:
        return keys | {"dataset_name": next(iter(mixer))}
    if any(abs(100 * fraction - round(100 * fraction)) > 1e-6 for fraction in fractions):
        raise UsageError(f"{found}, expected whole hundredths (0.25). Use max_train_samples for a smaller part.")
    parts = [{"path": name, "split": f"{splits[0]}[:{round(100 * part)}%]"} for name, part in mixer.items()]
    return keys | {"datasets": parts}


def _check_kinds(config: dict[str, Any], classes: Sequence[type], where: str) -> None:
    """Refuse null, a mapping or a list for a key that takes none; argparse checks the rest."""
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    defaults = {f.name: f.default for cls in classes for f in fields(cls)}
    for key, value in config.items():
        kind = next((kind for kind in (type(None), dict, list) if isinstance(value, kind)), None)
        if kind is None or _admits(hints[key], kind) or (value is None and defaults[key] is None):
            continue
        expected = getattr(hints[key], "__name__", str(hints[key]))
        found = "empty" if value is None else f"{value!r}, a {kind.__name__}"
        raise UsageError(f"{where}: '{key}' is {found}, expected {expected}. Give one value, or leave the key out.")


def _admits(hint: Any, kind: type) -> bool:
    inner = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return hint in (kind, typing.Any) or typing.get_origin(hint) is kind or any(_admits(h, kind) for h in inner)


def _is_object(value: Any, action: argparse.Action) -> bool:
    if isinstance(value, list):
        return action.nargs is None or any(isinstance(v, (dict, list)) for v in value) or not value
    return value is None or isinstance(value, dict)


def _as_tokens(action: argparse.Action, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{action.dest}", *map(str, value)]
    means_no = value is False and "no" in (action.choices or ())  # YAML reads a bare no as False
    return [f"--{action.dest}={'no' if means_no else value}"]


def _accelerator_available() -> bool:
    return torch.accelerator.is_available()
