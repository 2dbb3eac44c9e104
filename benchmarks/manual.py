"""Every command and code block of README.md and docs/: parsed, or run in a folder that holds the files they name.

    python benchmarks/manual.py               # run all of them, each page in a folder of its own
    python benchmarks/manual.py docs/data.md  # run those of some pages
    python benchmarks/manual.py --parse       # parse only

Runs are cut short with flags such as ``--max_steps=2``; nothing is left out of a command. A comment before a block says
what it needs or is::

    <!-- needs: a server -->        parsed, not run; likewise the hub, a GPU, or a run that is not there
    <!-- not run: minutes -->       parsed, not run
    <!-- parsed: help -->           an example of a command's help, with placeholders: parsed
    <!-- file: judge.yaml -->       written into the folder
    <!-- edit: FILE before: TEXT --> an edit of docs/architecture.md (tests/test_manual.py makes them)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"<!-- (needs|not run|parsed|file|edit): (.*?) -->")
SETUP = ("source", "pip", "pytest", "ruff", "lint-imports", "pyright", "mkdocs", "pre-commit", "git")  # not ours
PLEASE = "[{contains: please, moment: 0.5}]"
# What keeps a run short, by command; a flag that the command has itself stays.
SHORT = {
    "reward": "--max_steps=2 --max_train_samples=24 --report_prompts=0",
    "preference": "--max_steps=2 --max_train_samples=24 --report_prompts=0",
    "reference": "",
    "fdpg": "--max_steps=1 --eval_samples=0 --fit_samples=256 --fit_tolerance=0.5 --fit_min_ess=2 --report_prompts=0 "
    "--num_generations=8 --per_device_train_batch_size=8 --max_completion_length=24",
    "conditional": "--num_rounds=1 --max_train_samples=8 --eval_prompts=2 --report_prompts=0 "
    "--max_completion_length=8 --num_generations=5",
    "ask": "--num_generations=2 --max_completion_length=8",
    "sample": "--max_completion_length=8",
}
OWN_SAMPLES = "--num_rounds=1 --prompts_per_round=8 --num_generations=4 --max_completion_length=24 --eval_prompts=2"


@dataclass(frozen=True)
class Block:
    """A fenced block, or a command between backticks in a table."""

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""  # needs, not run, parsed, file, edit
    what: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.mark in ("", "file")


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page and the commands in its tables, in order."""
    language, mark, start, text = None, ("", ""), 0, []
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], 1):
        if language == "indented" and not line.startswith("    "):
            yield Block(page, start, "bash", "\n".join(text) + "\n", *mark)
            language, mark = None, ("", "")
        if language is None and (found := re.match(r"```(\w*)", line)):
            language, start, text = {"sh": "bash", "console": "bash"}.get(found[1], found[1]), number, []
        elif language is None and re.match(r"    (contrastive-align|accelerate launch|python) ", line):
            language, start, text = "indented", number, [line.strip()]
        elif language is not None and line.startswith("```"):
            yield Block(page, start, language, "\n".join(text) + "\n", *mark)
            language, mark = None, ("", "")
        elif language is not None:
            text.append(line.strip() if language == "indented" else line)
        elif found := MARK.match(line):
            mark = (found[1], found[2])
        elif line.startswith("|"):
            yield from table_commands(page, number, line)


def table_commands(page: Path, number: int, line: str) -> Iterator[Block]:
    """Yield the commands in a row of a table; those of the published runs need their models, and a chat a person."""
    for code in re.findall(r"`((?:contrastive-align|accelerate launch) [^`]+)`", line):
        hub = "--config=" in code or "--config_file" in code
        mark = ("needs", "the hub") if hub else ("not run", "chat") if " chat " in code else ("", "")
        if not re.fullmatch(r"contrastive-align steps \w+", code):  # the name of a command
            yield Block(page, number, "bash", code.replace("\\|", "|") + "\n", *mark)


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a block of bash, each as its words."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            part = re.sub(r"\$'([^']*)'", lambda text: shlex.quote(text[1].replace("\\n", "\n")), part)
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def as_command(words: Sequence[str], model: str = "MODEL") -> list[str] | None:
    """Return the arguments of contrastive-align, with the placeholders filled in; None for another program.

    Raises:
        ValueError: a program or a script that does not exist.
    """
    words = [re.sub(r"=(MODEL|M)$", lambda _: f"={model}", word) for word in words]
    if words[0] == "contrastive-align":
        return words[1:]
    if words[:2] == ["accelerate", "launch"]:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if not (ROOT / words[at]).is_file():
            raise ValueError(f"no script {words[at]}")
        return [Path(words[at]).stem.removeprefix("run_"), *words[at + 1 :]]
    if words[:3] == ["python", "-m", "contrastive_align.steps"]:
        return ["steps", *words[3:]]
    if words[0] in ("python", "python3"):
        if words[1] != "-m" and not (ROOT / words[1]).is_file():
            raise ValueError(f"no script {words[1]}")
        return None
    if words[0] not in SETUP and not (ROOT / words[0]).is_file():
        raise ValueError(f"unknown program {words[0]}")
    return None


def check(block: Block) -> None:
    """Parse a block: flags and their values, YAML, JSON or Python.

    Raises:
        ValueError: it cannot be parsed, with its place.
    """
    try:
        if block.language == "python" and block.mark != "edit":
            compile(block.text, block.place, "exec")
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "json":
            list(map(json.loads, block.text.splitlines()))
        elif block.language == "bash":
            for words in commands(block):
                if (given := as_command(words)) is not None:
                    check_arguments(given, values=block.mark == "")
    except (ValueError, SyntaxError, yaml.YAMLError, SystemExit) as error:
        raise ValueError(f"{block.place}: {getattr(error, 'message', error)}") from error


def check_arguments(given: list[str], *, values: bool) -> None:
    """Raise where contrastive-align would refuse the names of the flags or, where they are wanted, their values."""
    from contrastive_align.launch import cli

    command, rest = given[0], given[1:]
    if "--help" in rest or command.startswith("--"):
        return
    if command in (*cli._WITH_PARSER, "steps"):
        module = "step_commands" if command == "steps" else command
        _, unknown = cli._load(module, "build_parser")().parse_known_args(rest)
        if unknown and rest[:1] != ["train"]:
            raise ValueError(f"{command}: unknown {unknown}")
        return
    if command in ("ask", "data"):
        import trl

        from contrastive_align import trainers

        config = trainers.ConditionalConfig if command == "ask" else trainers.ContrastiveConfig
        of = (cli._load(command, f"{command.title()}Arguments"), config, trl.ModelConfig)
        known = {option.name for cls in of for option in fields(cls)} | {"model"}
        flags = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
        if flags - known:
            raise ValueError(f"{command}: unknown {sorted(flags - known)}")
        return
    if command not in cli.COMMANDS:
        raise ValueError(f"no command {command}")
    rest, _ = cli._split_accelerate(rest)
    options = {name for place in cli.COMMANDS[command].options for name in cli.read_options(*place)}
    cli._check_flags(rest, cli.COMMANDS[command], options)
    if values and not any(".py:" in word for word in rest):  # a function of a file that is not here
        cli._load(*cli.COMMANDS[command].run).parse(rest)


def workspace(folder: Path) -> str:
    """Write the files that the pages name; return the model."""
    from contrastive_align import demo

    data = demo.load_reward_dataset()["train"].select(range(24))
    pairs = demo.load_preference_dataset()["train"].select(range(24))

    def lines(name: str, rows: Sequence[dict]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    lines("groups.jsonl", list(data))
    lines("pairs.jsonl", list(pairs))
    lines("prompts.jsonl", [{"prompt": row["prompt"]} for row in data])
    lines("questions.jsonl", [{"question_id": 1, "category": "writing", "turns": ["Ask Anna to sit down."]}])
    lines(
        "scored.jsonl",
        [
            {"prompt": row["prompt"], "completion": text, "toxicity": i / 10}
            for row in data
            for i, text in enumerate(row["completions"])
        ],
    )
    lines(
        "verses.jsonl",
        [
            {"verse": r["prompt"], "left text": "a b", "right text": "c d", "left mark": 1, "right mark": i}
            for i, r in enumerate(data, 2)
        ],
    )
    for part in range(2):
        lines(f"FOLDER/part{part}.jsonl", [row for i, row in enumerate(data) if i % 2 == part])
    (folder / "prompts.txt").write_text("".join(row["prompt"] for row in data), encoding="utf-8")
    rows = "\n".join(f"{i // 2} is?,answer {i},{i % 2}" for i in range(12))
    (folder / "rows.csv").write_text(f"prompt,completion,score\n{rows}\n", encoding="utf-8")
    (folder / "forum.csv").write_text(f"question,answer,helpfulness\n{rows}\n", encoding="utf-8")
    for name, function in (("rewards.py", "polite"), ("my.py", "score")):
        reward = 'return [float("please" in text) + len(text) / 1000 for text in completions]'
        (folder / name).write_text(f"def {function}(completions, **columns):\n    {reward}\n", encoding="utf-8")
    with contextlib.suppress(ImportError):
        import openpyxl

        sheet = openpyxl.Workbook()
        for row in (("prompt", "completion", "score"), ("Why?", "So.", 1), ("Why?", "Because.", 2)):
            sheet.active.append(row)
        sheet.save(folder / "sheet.xlsx")
    return demo.MODEL_PATH


def shortened(given: list[str]) -> list[str]:
    """Add the flags of ``SHORT`` that a command has not been given."""
    named = {word.partition("=")[0] for word in given if word.startswith("--")}
    scored = given[0] == "conditional" and {"--score_column"} & named
    extra = SHORT.get(given[0], "").split()
    if scored:
        extra = ["--max_steps=2", "--condition={kind: phrases, per_prompt: false}", "--report_prompts=0"]
    if given[0] in ("reward", "preference") and {"--online", "--reward"} & named:
        extra += OWN_SAMPLES.split()
    if given[:2] == ["steps", "sample"]:
        extra = ["--max_completion_length=8"]
    if given[:2] == ["steps", "train"]:
        extra = ["--max_steps=2", "--report_prompts=0", "--eval_prompts=0"]
    if "--dataset_streaming" in named:
        extra = ["--report_prompts=0"]  # limits on rows would make another stream of the folder
    return [*given, *(flag for flag in extra if flag.partition("=")[0] not in named)]


def run(block: Block, model: str) -> None:
    """Run a block in the current folder, or write its file."""
    from contrastive_align.launch import cli

    if block.mark == "file":
        Path(block.what).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, block.place, "exec"), {"__name__": "manual"})
    elif block.language == "bash":
        for words in commands(block):
            given = as_command(words, model)
            if given is not None:
                for name in re.findall(r"runs/\w+", " ".join(given)):
                    prepare(name, model, made=any(f"output_dir={name}" in word for word in given))
                cli.main(shortened(given))


def prepare(name: str, model: str, *, made: bool) -> None:
    """Make a run that a page takes for granted."""
    from contrastive_align.launch import cli

    if made or Path(name).exists():
        return
    given = {
        "runs/reward": ["reward", f"--model_name_or_path={model}", "--dataset_name=groups.jsonl"],
        "runs/preference": ["preference", f"--model_name_or_path={model}", "--dataset_name=pairs.jsonl"],
        "runs/adapter": ["reward", f"--model_name_or_path={model}", "--dataset_name=groups.jsonl", "--use_peft"],
        "runs/fdpg": ["fdpg", f"--model_name_or_path={model}", "--dataset_name=prompts.txt", "--features=" + PLEASE],
        "runs/conditional": [
            *("conditional", f"--model_name_or_path={model}", "--dataset_name=prompts.txt"),
            "--reward=rewards.py:polite",
        ],
    }.get(name)
    if given is None:
        raise ValueError(f"no run {name}: no command of this page makes it")
    cli.main(shortened([*given, f"--output_dir={name}"]))


def has_effect(block: Block) -> bool:
    return block.runs and (block.language in ("python", "bash") or block.mark == "file")


def runs_well(block: Block, model: str) -> bool:
    """Run a block, and print its place, its time and what went wrong."""
    started, said, wrong = time.perf_counter(), Path("said.txt"), ""
    try:
        with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run(block, model)
    except (Exception, SystemExit) as error:
        wrong = f"FAILED: {type(error).__name__} {error}\n{said.read_text()[-1500:]}"
    print(f"{block.place:<32} {time.perf_counter() - started:6.1f} s  {wrong or 'ok'}", flush=True)
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="by default all")
    parser.add_argument("--parse", action="store_true")
    args = parser.parse_args()
    found = [block for page in (p.resolve() for p in args.pages or PAGES) for block in blocks(page)]
    for block in found:
        check(block)
    print(f"{len(found)} blocks of {len({b.page for b in found})} pages parsed")
    if args.parse:
        return 0
    failed = 0
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    for page in dict.fromkeys(block.page for block in found):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            model = workspace(Path(folder))
            failed += sum(not runs_well(block, model) for block in found if block.page == page and has_effect(block))
    print(f"{failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
