"""``contrastive-align chat``: a conversation in the terminal, with the model before and after side by side."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from contrastive_align.launch.trained import Trained
from contrastive_align.launch.usage import UsageError, UsageParser
from contrastive_align.models.loading import adapter_config_path, named


GAP = " | "
HELP = "/reset begins anew, /quit (or Ctrl-D) ends."


def main(argv: Sequence[str]) -> int:
    """Ask both models what is typed, turn by turn; return the number of turns."""
    args = build_parser().parse_args(argv)
    names = [args.model_name_or_path]
    if not args.alone:
        names.insert(0, args.before or start_of(args.model_name_or_path))
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, "seed": args.seed}
    models = [Trained(name, **options) for name in names]
    print(f"{' and '.join(model.short_name for model in models)}. {HELP}")
    histories: list[list[dict[str, str]]] = [[] for _ in models]
    turns = 0
    while (said := _read()) is not None:
        if said == "/reset":
            histories = [[] for _ in models]
            continue
        replies = []
        for model, history in zip(models, histories, strict=True):
            history.append({"role": "user", "content": said})
            prompt = list(history) if model.chats else said
            (texts,), _ = model.answer(
                [prompt], [turns], max_new_tokens=args.max_completion_length, temperature=args.temperature
            )
            history.append({"role": "assistant", "content": texts[0]})
            replies.append(texts[0].strip())
        print(side_by_side("before", "after", *replies) if len(models) > 1 else replies[0], flush=True)
        turns += 1
    return turns


def _read() -> str | None:
    """Return the next line that says something; None at the end."""
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line in ("/quit", "/exit"):
            return None
        if line:
            return line


def start_of(name: str) -> str:
    """Return what a model was trained from: the base of an adapter, or the start that ``summary.json`` names.

    Raises:
        UsageError: neither is there.
    """
    summary = Path(name) / "summary.json"
    if summary.is_file():
        found = json.loads(summary.read_text(encoding="utf-8")).get("model", {}).get("name_or_path")
        if found:
            return found
    config = adapter_config_path(name)
    if config is not None:
        return json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
    raise UsageError(
        f"{named(name)} has no summary.json and is no adapter, so that the model before training is not known. Give "
        "the output_dir of a run, or the model before with --before, or --alone."
    )


def side_by_side(left_name: str, right_name: str, left: str, right: str, width: int = 0) -> str:
    """Lay two texts beside each other.

    >>> print(side_by_side("before", "after", "a b", "c d e", width=13))
    before | after
    ------ | ------
    a b    | c d e
    """
    width = width or min(120, shutil.get_terminal_size((100, 24)).columns)
    half = max(6, (width - len(GAP)) // 2)
    columns = []
    for name, text in ((left_name, left), (right_name, right)):
        lines = [line for part in text.splitlines() or [""] for line in textwrap.wrap(part, half) or [""]]
        columns.append([name[-half:], "-" * half, *map(_printable, lines)])
    rows = max(map(len, columns))
    one, other = ([*column, *[""] * (rows - len(column))] for column in columns)
    return "\n".join(f"{a:{half}}{GAP}{b}".rstrip() for a, b in zip(one, other, strict=True))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    p = UsageParser(prog="contrastive-align chat", description=__doc__, allow_abbrev=False)
    p.add_argument("--model_name_or_path", "--model", required=True, help="The trained model or adapter.")
    p.add_argument(
        "--before", "--compare", help="Model to compare with; by default the one that training started from."
    )
    p.add_argument("--alone", action="store_true", help="Talk to the trained model only.")
    p.add_argument("--max_completion_length", type=int, default=256, help="Longest completion, in tokens.")
    p.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature; 0 is greedy.")
    p.add_argument(
        "--seed",
        type=int,
        default=42,
        help="Seed of sampling. A turn's samples depend on the seed and the turn's number.",
    )
    p.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="Dtype of the weights."
    )
    p.add_argument("--trust_remote_code", action="store_true", help="Run code of the model's repository.")
    return p
