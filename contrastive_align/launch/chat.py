"""``contrastive-align chat``: a conversation in the terminal, with the model before and after side by side."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from contrastive_align.launch.past_run import read_summary
from contrastive_align.launch.trained import Trained
from contrastive_align.launch.usage import UsageError, UsageParser, check_flags
from contrastive_align.models.loading import adapter_config_path, named
from contrastive_align.ranges import RANGES, Range


GAP = " | "
LONGEST = 256  # tokens of a completion, where nothing says how many
NUMBERS = {"max_completion_length": RANGES["max_completion_length"], "temperature": Range(0), "seed": RANGES["seed"]}
HELP = "/reset begins anew, /quit (or Ctrl-D) ends."


def main(argv: Sequence[str]) -> int:
    """Ask both models what is typed, turn by turn; return the number of turns."""
    args = build_parser().parse_args(argv)
    check_flags(args, NUMBERS)
    names = [args.model_name_or_path]
    if not args.alone:
        names.insert(0, args.before or start_of(args.model_name_or_path))
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, "seed": args.seed}
    models = [Trained(name, **options) for name in names]
    contexts = [context for model in models if (context := model.context) is not None]
    length = args.max_completion_length or max(1, min([LONGEST, *(context // 2 for context in contexts)]))
    print(f"{' and '.join(model.short_name for model in models)}. {HELP}")
    for model in models:
        if not model.chats:
            why = "was trained on texts" if model.tokenizer.chat_template else "has no chat template"
            print(f"note: {model.short_name} {why}, so that it sees the last line alone.")
    talks = [Talk(model, length) for model in models]
    turns = 0
    while (said := _read()) is not None:
        if said == "/reset":
            talks = [Talk(model, length) for model in models]
            continue
        try:
            asked = [talk.asked(said) for talk in talks]
        except ValueError as error:
            print(f"{error}", flush=True)
            continue
        replies = []
        for talk, messages in zip(talks, asked, strict=True):
            prompt = messages if talk.model.chats else said
            (texts,), _ = talk.model.answer([prompt], [turns], max_new_tokens=length, temperature=args.temperature)
            talk.history = [*messages, {"role": "assistant", "content": texts[0]}]
            replies.append(texts[0].strip())
        print(side_by_side("before", "after", *replies) if len(models) > 1 else replies[0], flush=True)
        turns += 1
    return turns


class Talk:
    """A conversation with a model, as much of it as fits into the context.

    Args:
        length: of the longest answer, in tokens.
    """

    def __init__(self, model: Trained, length: int) -> None:
        self.model, self.length = model, length
        self.history: list[dict[str, str]] = []
        self.told = False  # that turns were left out

    def asked(self, said: str) -> list[dict[str, str]]:
        """Return the messages that end with what is said, without the oldest turns where there is no room for them.

        Raises:
            ValueError: there is no room for what is said alone, or the chat template refuses it.
        """
        model, messages = self.model, [*self.history, {"role": "user", "content": said}]
        while True:
            tokens = len(model.ids_of(messages if model.chats else said))
            if model.context is None or model.positions(tokens, self.length) <= model.context:
                break
            if len(messages) == 1 or not model.chats:
                raise ValueError(
                    f"These are {tokens} tokens; with an answer of up to {self.length} (--max_completion_length) that "
                    f"is more than the {model.context} of the context of {model.short_name}. Say it in fewer words."
                )
            messages = messages[2:]  # a turn, and its answer
            if not self.told:
                print(f"note: the oldest turns are left out from now on: {model.short_name} has no room for them.")
                self.told = True
        return messages


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
    if found := read_summary(name).get("model", {}).get("name_or_path"):
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
    p.add_argument(
        "--max_completion_length",
        type=int,
        help=f"Longest completion, in tokens; by default {LONGEST}, at most half of the context.",
    )
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
