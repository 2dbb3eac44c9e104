"""The names of flags: those of older releases, other names of an option, and what is none. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from contrastive_align.launch.usage import UsageError, nearest


# What a parser takes as a value and not as a flag, in the place of argparse's own, which knows neither -1e-3 nor -inf.
NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)

# Keys of older releases and of the published YAMLs -> today's key.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "warmup_ratio": "warmup_steps",
}
# Keys that are no longer needed, and why.
GONE = {
    "overwrite_output_dir": "an existing output_dir is always written into",
    "save_safetensors": "weights are always saved as safetensors",
}


def modernise_flags(flags: list[str], notes: list[str], known: set[str]) -> list[str]:
    """Rename the flags of older releases, with a note for each.

    Raises:
        UsageError: a flag that is gone, or none of ``known``, with the one that is meant.
    """
    result = []
    for flag, following in zip(flags, [*flags, ""][1:], strict=True):
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            name = name.replace("-", "_")
            if name in RENAMED:
                check_ratio(name, value if equals else following)
                notes.append(f"'--{name}' is now '--{RENAMED[name]}'")
                flag = f"--{RENAMED[name]}{equals}{value}"
            elif name in GONE:
                raise UsageError(f"'--{name}' is gone: {GONE[name]}. Leave it out.")
            elif name == "help_all":
                flag = "--help"  # which is of all options here
            elif name != "help" and flag_name(flag, known) not in known:
                raise UsageError(f"unknown flag '--{name}'{nearest(name, known, '--')}")
        result.append(flag)
    return result


def check_ratio(name: str, value: Any, where: str = "") -> None:
    """Refuse a ``warmup_ratio`` that ``warmup_steps`` would take for a number of steps.

    >>> check_ratio("warmup_ratio", "0.1"), check_ratio("torch_dtype", "auto")
    (None, None)

    Raises:
        UsageError: it is no number from 0 to below 1.
    """
    if name != "warmup_ratio":
        return
    try:
        ratio = float(value)
    except (TypeError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        place = f"{where}: {name}" if where else f"--{name}"
        raise UsageError(f"{place} is {value}, expected a number of 0 or more, below 1: a share of all steps.")


def resolve_aliases(values: dict[str, Any], aliases: dict[str, str], where: str, prefix: str = "") -> dict[str, Any]:
    """Name options by their fields; refuse an option given under two names with different values."""
    for alias, name in aliases.items():
        if alias in values and values.get(name, values[alias]) != values[alias]:
            found = f"both '{prefix}{alias}' ({values[alias]}) and '{prefix}{name}' ({values[name]}) are given"
            raise UsageError(f"{where and where + ': '}{found}, which mean the same. Keep one.")
    return {aliases.get(key, key): value for key, value in values.items()}


def resolve_flag_aliases(flags: list[str], aliases: dict[str, str]) -> list[str]:
    """Do for flags what :func:`resolve_aliases` does for the keys of a YAML file."""
    values: dict[str, list[str]] = {}
    result, option = [], ""
    for flag in flags:
        name, equals, value = flag.partition("=")
        if flag.startswith("--"):
            option = name[2:].replace("-", "_")
            values[option] = [value] if equals else []
            flag = f"--{aliases.get(option, name[2:])}{equals}{value}"
        else:
            values.setdefault(option, []).append(flag)
        result.append(flag)
    resolve_aliases({name: " ".join(given) for name, given in values.items()}, aliases, where="", prefix="--")
    return result


def flag_name(flag: str, known: set[str]) -> str:
    """Return the option that a flag sets, which may begin with ``no_``."""
    name = flag[2:].partition("=")[0].replace("-", "_")
    return name[3:] if name.startswith("no_") and name not in known else name
