"""The help of the training commands, read from the source of their options: nothing is imported, so it is quick."""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from contrastive_align.docstrings import option_texts
from contrastive_align.launch.bundled import bundled


ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
# The groups of the options, in the order shown. An option without one stands in the last.
GROUPS = {
    "Prompts and feedback": ("prompt, reward, reward_weights, judge, condition, features"),
    "Rows": (
        "online, max_train_samples, max_eval_samples, max_prompt_length, columns, score_column, negate_score, "
        "feedback_column, on_bad_row, hard_pairs, output"
    ),
    "Objective": (
        "loss_type, temperature_alpha, first_score_bonus, divergence, beta, kl_coef, kl_direction, kl_target, "
        "entropy_coef, entropy_target, coef_horizon, baseline, baseline_window, max_importance_ratio, fit_samples, "
        "fit_max_samples, fit_tolerance, fit_min_ess"
    ),
    "Sampling and rounds": (
        "num_rounds, prompts_per_round, num_generations, draws_per_round, max_completion_length, temperature, top_k, "
        "top_p, reference, keep, resample, scored_dataset, scored_share, drop_factor, ties, pool_dir, rows_at_once, "
        "sampler, proposal, proposal_criterion, proposal_window, use_vllm"
    ),
    "Measuring": "eval_samples, eval_prompts, eval_reward, qrs_acceptance, best, report_prompts, preflight_only",
    "Computing": (
        "layout, max_tokens_per_batch, per_device_train_batch_size, ref_log_probs_folder, unfrozen_layers_ratio, "
        "disable_dropout, allow_pickled_adapter, ds3_gather_for_generation"
    ),
}
SHOWN_AS = {"num_train_epochs": "num_rounds"}  # where a command defines it itself
# Options of TRL and transformers that most runs set.
COMMON = {
    "model_name_or_path": "The model, or the adapter to go on from: a hub id or a folder.",
    "dataset_name": "The data: a hub id, a folder or a file (.jsonl, .csv, .xlsx ...).",
    "output_dir": "Folder for the model and its report; runs/<command> by default.",
    "use_peft, lora_r, load_in_4bit": "Train a LoRA adapter, of rank lora_r, on a base in 4 bits (QLoRA).",
    "learning_rate, num_train_epochs, max_steps, per_device_train_batch_size, gradient_accumulation_steps": (
        "Learning rate, length and batch size of training, as in transformers."
    ),
    "eval_strategy, save_strategy": "no, steps or epoch: when to evaluate, when to save.",
    "logging_steps": "Number of steps between two lines of the log.",
    "resume_from_checkpoint": "true: go on from the newest complete checkpoint. Or the folder of one.",
}


@dataclass
class Option:
    """One option: its name, its default as Python text (None: it is TRL's), and what it means."""

    name: str
    default: str | None
    text: str


def read_aliases(file: str, class_name: str) -> dict[str, str]:
    """Return the ``ALIASES`` that a class defines itself, from its source file in the package."""
    (node,) = (n for n in _classes(file) if n.name == class_name)
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "ALIASES"]
    return ast.literal_eval(lines[0].value) if lines and lines[0].value else {}


@functools.cache
def _classes(file: str) -> list[ast.ClassDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def read_options(file: str, class_name: str) -> dict[str, Option]:
    """Return the options that a dataclass defines itself, from its source file in the package."""
    classes = {node.name: node for node in _classes(file)}
    node = classes[class_name]
    texts = option_texts((ast.get_docstring(node, clean=False) or "") + "\n")
    options = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            options |= read_options(file, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id.islower():
            name, default, text = line.target.id, line.value, texts.get(line.target.id, "")
            kind = default.func.id if isinstance(default, ast.Call) and isinstance(default.func, ast.Name) else ""
            if kind == "option" and isinstance(default, ast.Call):
                default, text = default.args[0], ast.literal_eval(default.args[1])
            elif kind == "field" and isinstance(default, ast.Call):
                factory = default.keywords[0].value
                default = factory.body if isinstance(factory, ast.Lambda) else factory
            elif kind == "option_of" and isinstance(default, ast.Call) and isinstance(default.args[0], ast.Name):
                if default.args[0].id not in classes:
                    options[name] = Option(name, None, text)
                    continue
                inherited = read_options(file, default.args[0].id)[name]
                options[name] = inherited if "As in" in text or not text else replace(inherited, text=text)
                continue
            options[name] = Option(name, ast.unparse(default) if default is not None else None, text)
    return options


def command_help(command: str, about: str, example: str, options: dict[str, Option], inherited: dict[str, str]) -> str:
    """Return the help of one training command: its own options by groups, then the most used of TRL's."""
    left = {SHOWN_AS.get(name, name): replace(o, name=SHOWN_AS.get(name, name)) for name, o in options.items()}
    parts = [
        f"contrastive-align {command} [config.yaml] [--flag=value ...]",
        textwrap.fill(about, WIDTH),
        example,
    ]
    for title, names in GROUPS.items():
        chosen = [left.pop(name) for name in names.split(", ") if name in left]
        if chosen:
            parts.append("\n".join([f"{title}:", *map(_entry, chosen)]))
    if left:
        names = ", ".join(f"--{name}" for name in left)
        parts.append(
            "\n".join(["Options of vLLM:", *textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="  ")])
        )
    common = [
        _wrapped(", ".join(f"--{n}" for n in names.split(", ")), text)
        for names, text in (COMMON | dict(inherited)).items()
    ]
    parts.append("\n".join(["Most used of TRL's and transformers' (all of them: --help_all):", *common]))
    parts.append(
        "\n".join(
            [
                "Launching:",
                _wrapped("--config", f"A YAML file, or one of the bundled: {', '.join(bundled('yamls'))}."),
                _wrapped(
                    "--accelerate_config",
                    f"A file of accelerate, or {', '.join(bundled('accelerate_configs'))}; "
                    "with --num_processes and the like of accelerate launch.",
                ),
            ]
        )
    )
    return "\n\n".join(parts)


def _entry(option: Option) -> str:
    default = None if option.default is None else option.default.strip("'\"")
    shown = f"--{option.name}" + ("" if default in (None, "None") else f"={_plain(default)}")
    return _wrapped(shown, option.text)


def _plain(default: str) -> str:
    """Show a default as it is typed: no quotes, no brackets around one name."""
    return re.sub(r"[\[\]'\"]", "", default).replace(", ", " ")


def _wrapped(flag: str, text: str) -> str:
    indent, column = " " * 30, 28
    lines = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    if len(flag) + 2 > column:
        first = textwrap.wrap(flag, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join([*("  " + line for line in first), *(indent + line for line in lines)])
    return "\n".join([f"  {flag:<{column}}{lines[0]}".rstrip(), *(indent + line for line in lines[1:])])
