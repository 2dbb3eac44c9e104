"""Write docs/reference/ from the source: the options, the commands, the refused options of TRL, and the doctor's rules.

python docs/generate.py            # write the pages
python docs/generate.py --check    # exit status 1 where a page differs from the source, or an option has no sentence
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from contrastive_align.launch import chat, merge, report, sample, step_commands
from contrastive_align.launch.cli import _DATA, _DATA_OPTIONS, COMMANDS, OTHERS
from contrastive_align.launch.help import COMMON, Option, read_aliases, read_options
from contrastive_align.launch.usage import UsageError
from contrastive_align.report.doctor import RULES
from contrastive_align.trainers import configs


FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Written by docs/generate.py from the source. Do not edit. -->\n"
CONFIGS = {  # class -> what it is for, the class of TRL that it extends, options of TRL that are refused
    "ContrastiveConfig": (
        "`contrastive-align reward` and `preference`, `ContrastiveTrainer`",
        "DPOConfig",
        configs.NOT_SUPPORTED_CONTRASTIVE,
    ),
    "FDPGConfig": ("`contrastive-align fdpg`, `FDPGTrainer`", "RLOOConfig", configs.NOT_SUPPORTED_FDPG),
    "ConditionalConfig": (
        "`contrastive-align conditional`, `ConditionalTrainer`",
        "SFTConfig",
        configs.NOT_SUPPORTED_CONDITIONAL,
    ),
}
ARGUMENTS = {  # class -> its source file, the commands that have it
    "RunArguments": ("launch/arguments.py", "every training command"),
    "FeedbackArguments": ("launch/arguments.py", "`reward`, `preference` and `conditional`"),
    "GroupArguments": ("launch/contrastive.py", "`reward` and `preference`"),
    "FDPGArguments": ("launch/fdpg.py", "`fdpg`"),
    "ConditionalArguments": ("launch/conditional.py", "`conditional`"),
    "ReferenceArguments": ("launch/reference.py", "`reference`"),
    "DataArguments": ("launch/data.py", "`data`"),
}
PARSERS = {"report": report, "sample": sample, "chat": chat, "merge": merge}
ASK = {
    "prompt": "The prompt.",
    "model_name_or_path": "The trained model or adapter.",
    "num_generations": "Number of answers to print.",
    "max_completion_length": "Longest completion, in tokens.",
    "temperature": "Sampling temperature.",
    "top_p": "Sample from the smallest set of tokens whose probabilities add up to it.",
    "seed": "Seed of sampling.",
}


def options_of(file: str, name: str) -> dict[str, Option]:
    """Return the options that a class defines itself, without those of a base class in the same file."""
    options = read_options(file, name)
    inherited = {} if name == "RunArguments" else read_options("launch/arguments.py", "RunArguments")
    return {key: option for key, option in options.items() if key not in inherited}


def documented() -> dict[str, dict[str, Option]]:
    """Return the options of every class of this package."""
    found = {name: options_of("trainers/configs.py", name) for name in CONFIGS}
    return found | {name: options_of(file, name) for name, (file, _) in ARGUMENTS.items()}


def without_sentence() -> list[str]:
    """Name the options that say nothing about themselves.

    >>> without_sentence()
    []
    """
    return [f"{cls}.{name}" for cls, options in documented().items() for name, o in options.items() if not o.text]


def cell(text: str) -> str:
    """Make a text fit for a cell of a table, with what looks like HTML or a link shown as it is."""
    for plain, escaped in (("|", "\\|"), ("<", "&lt;"), (">", "&gt;"), ("*", "\\*"), ("[", "\\["), ("]", "\\]")):
        text = text.replace(plain, escaped)
    return text


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def refused_table(refused: Mapping[str, tuple[str, str]]) -> str:
    rows = ((f"`{option}`", cell(why), cell(way_out)) for option, (why, way_out) in refused.items())
    return table(("option", "why", "the way out"), rows)


def option_table(options: Mapping[str, Option]) -> str:
    def default(option: Option) -> str:
        return "TRL's" if option.default is None else f"`{option.default}`"

    return table(
        ("option", "default", "meaning"),
        ((f"`{name}`", default(option), cell(option.text)) for name, option in options.items()),
    )


def configuration() -> str:
    parts = [
        "# Configuration",
        "Every option that this package adds to TRL and transformers. On the command line an option is a flag "
        "(`--beta=0.1`), in a YAML file a key, and in Python an argument of the config. All other options are those of "
        "the class of TRL that a config extends, except where it refuses them.",
    ]
    for name, (what, base, refused) in CONFIGS.items():
        parts += [f"## {name}", f"For {what}. It extends `trl.{base}`."]
        parts.append(option_table(options_of("trainers/configs.py", name)))
        parts.append(f"Refused options of `trl.{base}`, at any value but their default:")
        parts.append(refused_table(refused))
        if name == "ContrastiveConfig":
            parts += ["Refused with `online=True` besides:", refused_table(configs.NOT_SUPPORTED_ONLINE)]
    parts += [
        "## Refused arguments of the trainers",
        "A trainer takes the arguments of its class of TRL, except these (`data_collator`: `ConditionalTrainer` only):",
    ]
    arguments = configs.ARGUMENTS_NOT_SUPPORTED.items()
    parts.append(table(("argument", "why, and the way out"), ((f"`{name}`", cell(why)) for name, why in arguments)))
    for name, (file, what) in ARGUMENTS.items():
        parts += [f"## {name}", f"Flags of {what}, beside those of the config."]
        parts.append(option_table(options_of(file, name)))
        if aliases := read_aliases(file, name):
            parts.append(
                "Other names: " + ", ".join(f"`{alias}` is `{option}`" for alias, option in aliases.items()) + "."
            )
    return "\n\n".join(parts)


def commands() -> str:
    parts = [
        "# Commands",
        "`contrastive-align COMMAND [config.yaml] [--flag=value ...]`. The training commands take every option of "
        "[their configuration](configuration.md); `contrastive-align COMMAND --help` prints them by topic.",
    ]
    for name, command in COMMANDS.items():
        classes = ", ".join(
            f"[{cls}](configuration.md#{cls.lower()})" for _, cls in sorted(command.options, key=lambda o: o[1])
        )
        parts += [f"## {name}", command.about, f"Options: {classes}, and those of `trl.{command.base}`."]
        parts.append(f"<!-- parsed: help -->\n```bash\n{command.example}\n```")
    parts += ["## Most used options of TRL and transformers"]
    parts.append(table(("options", "meaning"), ((f"`{names}`", cell(text)) for names, text in COMMON.items())))
    parts += ["## data", OTHERS["data"]]
    options = {name: o for place in _DATA for name, o in read_options(*place).items() if name in _DATA_OPTIONS}
    parts.append(option_table(options))
    parts += ["## ask", OTHERS["ask"]]
    parts.append(table(("flag", "meaning"), ((f"`--{name}`", text) for name, text in ASK.items())))
    for name, module in PARSERS.items():
        parts += [f"## {name}", OTHERS[name], flag_table(module.build_parser())]
    parts += ["## steps", OTHERS["steps"]]
    steps = next(a for a in step_commands.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in steps.choices.items():
        parts += [f"### steps {name}", parser.description or "", flag_table(parser)]
    return "\n\n".join(parts)


def flag_table(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        default = "required" if action.required else "" if action.default in (None, False) else f"`{action.default}`"
        choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        if not action.help:
            raise UsageError(f"{parser.prog} {names} has no help. Give it a sentence.")
        rows.append((names, default, cell(action.help + choices)))
    return table(("flag", "default", "meaning"), rows)


def doctor() -> str:
    rows = ((f"`{r.name}`", cell(r.title), r.level, cell(r.threshold), cell(r.source)) for r in RULES)
    return "\n\n".join(
        [
            "# The doctor's rules",
            "What is looked for in the metrics of every run, from which threshold on, and where the threshold comes "
            "from. [Reading a report](../report.md) says where the findings are shown.",
            table(("rule", "title", "level", "threshold", "source"), rows),
        ]
    )


PAGES = {"configuration.md": configuration, "commands.md": commands, "doctor.md": doctor}


def pages() -> dict[str, str]:
    """Return the text of every generated page."""
    return {name: f"{HEAD}\n{make()}\n" for name, make in PAGES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, text in pages().items():
        file = FOLDER / name
        if check and not (file.is_file() and file.read_text(encoding="utf-8") == text):
            stale.append(name)
        elif not check:
            file.write_text(text, encoding="utf-8")
    missing = without_sentence()
    if stale:
        print(f"{', '.join(stale)} differ from the source. Run: python docs/generate.py")
    if missing:
        print(f"Options without a sentence: {', '.join(missing)}")
    return int(bool(stale or missing))


if __name__ == "__main__":
    sys.exit(main())
