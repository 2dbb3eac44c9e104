"""``contrastive-align``: one command for all runs, found without importing torch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from contrastive_align.launch.bundled import find_yaml
from contrastive_align.launch.errors import in_sentences
from contrastive_align.launch.flags import modernise_flags
from contrastive_align.launch.help import command_help, read_aliases, read_options
from contrastive_align.launch.imports import uncollected, wait_briefly
from contrastive_align.launch.quiet import quiet_imports
from contrastive_align.launch.usage import UsageError, nearest
from contrastive_align.ranges import check_numbers


@dataclass(frozen=True)
class Command:
    """A training command: what it does, the class of its run, and the classes of its options."""

    about: str
    example: str
    run: tuple[str, str]  # module of launch/, class
    options: tuple[tuple[str, str], ...]  # source file in the package, class
    base: str  # the class of TRL that the config extends
    inherited: dict[str, str] = field(default_factory=dict)  # options of TRL that matter here -> what they mean


_ROWS = ("launch/arguments.py", "RunArguments")
_CONFIG = ("trainers/configs.py", "ContrastiveConfig")
_FEEDBACK = ("launch/arguments.py", "FeedbackArguments")
_CONTRASTIVE = (_FEEDBACK, ("launch/contrastive.py", "GroupArguments"), _CONFIG)
_LENGTH = {"max_length": "Longest prompt + completion, in tokens."}
_INHERITED = _LENGTH | {
    "beta": "Scale of the implied reward, beta * log(policy / reference).",
    "loss_weights": "Weight of each of several losses; 1 each by default.",
    "precompute_ref_log_probs": "Compute the reference's log-probs once, before training.",
}
COMMANDS = {
    "reward": Command(
        "Align a model on explicit rewards: K completions per prompt, a number each.",
        "contrastive-align reward --loss_type=NCA                           # the bundled model and data\n"
        "contrastive-align reward --model_name_or_path=... --dataset_name=groups.jsonl --loss_type=InfoNCA\n"
        "contrastive-align reward --online                                  # own samples, the bundled reward\n"
        "contrastive-align reward --config=reward_qlora --accelerate_config=multi_gpu --beta=0.01",
        ("contrastive", "RewardRun"),
        _CONTRASTIVE,
        "DPOConfig",
        _INHERITED,
    ),
    "preference": Command(
        "Align a model on preference pairs: chosen and rejected, with or without a prompt.",
        "contrastive-align preference --loss_type=DPO                       # the bundled model and data\n"
        "contrastive-align preference --config=preference_qlora --accelerate_config=multi_gpu",
        ("contrastive", "PreferenceRun"),
        _CONTRASTIVE,
        "DPOConfig",
        _INHERITED,
    ),
    "reference": Command(
        "Write the reference's log-probs of a folder of shards, before training and on any machine.",
        "contrastive-align reference --model_name_or_path=M --dataset_name=FOLDER   # in several jobs at once\n"
        "contrastive-align reward --model_name_or_path=M --dataset_name=FOLDER --loss_type=DPO \\\n"
        "    --dataset_streaming=true --precompute_ref_log_probs=true",
        ("reference", "ReferenceRun"),
        (_ROWS, ("launch/reference.py", "ReferenceArguments"), _CONFIG),
        "DPOConfig",
        _LENGTH | {"precompute_ref_batch_size": "Number of groups in a batch; per_device_train_batch_size by default."},
    ),
    "fdpg": Command(
        "Say what the model should be: prompts and a target instead of completions and scores.",
        'contrastive-align fdpg                                      # the bundled model, "please" in half\n'
        "contrastive-align fdpg --model_name_or_path=M --prompt=A --features='[{contains: king, moment: 1}]'\n"
        "contrastive-align fdpg --model_name_or_path=M --dataset_name=prompts.txt --reward=rewards.py:polite",
        ("fdpg", "FDPGRun"),
        (_ROWS, ("launch/fdpg.py", "FDPGArguments"), ("trainers/configs.py", "FDPGConfig")),
        "RLOOConfig",
        {
            "max_completion_length": "Longest sampled completion, in tokens.",
            "beta": "With --reward: the target is base * exp(reward / beta).",
        },
    ),
    "conditional": Command(
        "Train on a model's own completions, conditioned on how good they are.",
        "contrastive-align conditional                               # the bundled model, quantile tokens\n"
        "contrastive-align conditional --model_name_or_path=M --dataset_name=p.txt --reward=rewards.py:polite\n"
        "contrastive-align ask --model_name_or_path=runs/conditional --prompt='a prompt'",
        ("conditional", "ConditionalRun"),
        (_FEEDBACK, ("launch/conditional.py", "ConditionalArguments"), ("trainers/configs.py", "ConditionalConfig")),
        "SFTConfig",
        _LENGTH,
    ),
}
OTHERS = {
    "steps": "Sample, score, judge, merge and train over JSONL files, as in the jobs of a cluster.",
    "data": "Show what training would see of a file: its shape, scores, lengths and first groups.",
    "ask": "Print what a trained model answers to a prompt, under its best condition.",
    "report": "Rebuild the page of a run, or lay several runs side by side.",
    "sample": "Sample any model or adapter: JSONL, AlpacaEval, MT-bench; --compare prints another beside it.",
    "chat": "Talk in the terminal to the model before and after training, side by side.",
    "merge": "Merge an adapter into its base, and prove that log-probs stay.",
}
_WITH_PARSER = ("report", "sample", "chat", "merge")
_DATA = (("launch/data.py", "DataArguments"), *_CONTRASTIVE)
_DATA_OPTIONS = (
    "output",
    "max_train_samples",
    "max_prompt_length",
    "columns",
    "score_column",
    "on_bad_row",
    "hard_pairs",
)
_DATA_EXAMPLE = (
    "contrastive-align data groups.jsonl\n"
    "contrastive-align data sheet.xlsx --model=NAME --max_length=1024 --columns=prompt=question\n"
    "contrastive-align data rows.csv --score_column=helpfulness --output=groups.jsonl"
)
# Flags of accelerate launch that a run with --accelerate_config takes.
ACCELERATE_FLAGS = (
    "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids", "rdzv_backend",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a command and return what it returns: the summary of a run, or samples.

    Raises:
        UsageError, Fault: see ``launch/errors.py``.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with in_sentences(argv):
        return _main(*argv)


def _main(command: str, *given: str) -> Any:
    rest = list(given)
    quiet_imports()
    wait_briefly()
    if command in ("--help", "-h", "help"):
        return print(_overview())
    if command == "--version":
        return print(version("contrastive_align"))
    if command == "steps":
        return _load("step_commands", "main")(rest)
    if command == "data" and {"--help", "-h"} & set(rest):
        options = {name: o for place in _DATA for name, o in read_options(*place).items() if name in _DATA_OPTIONS}
        return print(command_help(command, OTHERS[command], _DATA_EXAMPLE, options, _LENGTH))
    if command in _WITH_PARSER:
        return _load(command, "main")(rest)
    if command in ("ask", "data"):
        return _load(command, "main")(rest)
    if command not in COMMANDS:
        raise UsageError(f"unknown command '{command}'{nearest(command, [*COMMANDS, *OTHERS])}\n\n{_overview()}")
    found = COMMANDS[command]
    options = {name: option for place in found.options for name, option in read_options(*place).items()}
    if {"--help", "-h"} & set(rest):
        if "--online" not in rest:
            options = {name: option for name, option in options.items() if name not in _of_own_samples(found)}
        return print(command_help(command, found.about, found.example, options, found.inherited))
    rest, launching = _split_accelerate(rest)
    with uncollected():
        _check_flags(rest, found, set(options))
        run = _load(*found.run)
        args = run.parse(rest)
    if launching:
        return _launch(launching, [command, *rest])
    return run(args).execute()


def command_line(argv: Sequence[str] | None = None) -> None:
    """Be the console script: its exit status is not what a command returns, and Ctrl-C is no traceback.

    Where whoever reads the output has read enough, as ``head`` does, the command ends without a word, as by SIGPIPE.
    """
    ended = SystemExit()
    try:
        main(argv)
        sys.stdout.flush()
    except SystemExit as error:
        ended = error
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        ended = SystemExit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest is flushed as Python ends
        ended = SystemExit(141)
    if "torch.distributed" in sys.modules:
        import_module("contrastive_align.trainers.processes").end_one_of_several(ended.code)
    if ended.code is not None:
        raise ended


def _load(module: str, name: str) -> Any:
    with uncollected():
        return getattr(import_module(f"contrastive_align.launch.{module}"), name)


def _check_flags(argv: list[str], command: Command, own: set[str]) -> None:
    """Refuse a misspelled flag before the trainers are imported."""
    import trl

    classes = [getattr(trl, name) for name in (command.base, "ModelConfig", "ScriptArguments", "DatasetMixtureConfig")]
    known = own | {option.name for cls in classes for option in fields(cls)} | {"config"}
    known |= {alias for place in command.options for alias in read_aliases(*place)}
    for name in {flag[2:].partition("=")[0].replace("-", "_") for flag in argv if flag.startswith("--")} - known:
        others = [
            c for c in COMMANDS if name in {option for place in COMMANDS[c].options for option in read_options(*place)}
        ]
        if others:
            raise UsageError(f"--{name} is an option of {' and '.join(others)}, not of this command. Leave it out.")
    modernise_flags(argv, [], known)


def _of_own_samples(command: Command) -> set[str]:
    """Return the options of a command on scored data that mean something with ``--online`` alone."""
    if _CONFIG not in command.options:
        return set()
    of_config = {name for name, option in read_options(*_CONFIG).items() if option.text.startswith("Online")}
    named = [_FEEDBACK, ("launch/contrastive.py", "GroupArguments"), ("trainers/configs.py", "SamplingOptions")]
    return of_config | {name for place in named for name in read_options(*place)} - set(read_options(*_ROWS))


def _overview() -> str:
    about = {name: command.about for name, command in COMMANDS.items()} | OTHERS
    return "\n".join(
        [
            "contrastive-align COMMAND [config.yaml] [--flag=value ...]",
            "",
            "Align language models with more than a thumbs-up.",
            "",
            *(f"  {name:<13}{text}" for name, text in about.items()),
            "",
            "contrastive-align COMMAND --help shows its options, --help_all those of TRL and transformers, too.",
        ]
    )


def _split_accelerate(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--accelerate_config`` and ``ACCELERATE_FLAGS`` out of a command line: what is left, and what they are."""
    left, taken, config = [], [], None
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not token.startswith("--") or name not in ("accelerate_config", *ACCELERATE_FLAGS):
            left.append(token)
            continue
        if not equals and (value := next(tokens, "")) == "":
            raise UsageError(f"--{name} needs a value.")
        if name == "accelerate_config":
            config = find_yaml(value, "accelerate_configs")
        else:
            number = int(value) if re.fullmatch(r"-?\d+", value) else value
            check_numbers(SimpleNamespace(**{name: number}))
            taken += [f"--{name}", value]
    if taken and config is None:
        raise UsageError(
            f"{taken[0]} belongs to --accelerate_config, which is not given. Add --accelerate_config=multi_gpu, or "
            "another that contrastive-align reward --help names."
        )
    return left, ["--config_file", config, *taken] if config else []


def _launch(options: list[str], argv: list[str]) -> None:
    """Launch this command on every process, as ``accelerate launch`` does, and end with their exit status.

    Signals are handed on to the processes, which stop in order and say how to go on.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    before = {number: signal.signal(number, _hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "contrastive_align", *argv]))
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except SignalException as error:
        status = -error.sigval
    except ChildFailedError as error:
        status = max(failure.exitcode for failure in error.failures.values())
    else:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(status if status > 0 else 128 - status)


def _hand_on(number: int, frame: Any) -> None:
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)
