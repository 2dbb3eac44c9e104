"""``python -m contrastive_align.steps``: the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from contrastive_align.launch.arguments import UsageError
from contrastive_align.launch.steps.feedback import judge, score
from contrastive_align.launch.steps.sample import sample
from contrastive_align.launch.steps.splits import merge
from contrastive_align.launch.steps.train import train
from contrastive_align.openai_client import CallError


DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> Any:
    """Run one step.

    Raises:
        UsageError: what the user can mend, with status 2.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.step != "train":
        raise UsageError(
            f"{args.step}: unknown {' '.join(rest)!r}. See python -m contrastive_align.steps {args.step} -h."
        )
    try:
        if args.step == "train":
            return train(args, rest)
        said = args.run(args)
    except (ValueError, OSError, CallError, AttributeError, ImportError) as error:
        if isinstance(error, AttributeError) and "has no function" not in str(error):
            raise
        raise UsageError(str(error)) from error
    print(said, flush=True)
    return said


def _merge(args: argparse.Namespace) -> str:
    return f"{args.output}: {merge(args.inputs, args.output, overwrite=args.overwrite)} rows"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message}    (all flags: {self.prog} -h)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m contrastive_align.steps", description=__doc__, allow_abbrev=False)
    steps = parser.add_subparsers(dest="step", required=True, metavar="step")

    def step(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        made = steps.add_parser(name, help=what, description=what, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    p = step("sample", sample, "Prompts -> K completions each.")
    p.add_argument("--model_name_or_path", required=True, help="A model id, or the folder of a model or adapter.")
    p.add_argument("--prompts", required=True, help="JSONL with 'prompt': a text, or messages.")
    p.add_argument("--num_generations", type=_at_least(int, 1), default=8, help="K.")
    p.add_argument("--condition", help="'best', or another that the trained model knows; by default none.")
    p.add_argument("--split_number", type=_at_least(int, 0), default=0, help="This part, from 0.")
    p.add_argument("--total_splits", type=_at_least(int, 1), default=1, help="Parts the prompts are divided into.")
    p.add_argument("--max_completion_length", type=_at_least(int, 1), default=256, help="In tokens.")
    p.add_argument("--temperature", type=float, default=1.0, help="Of sampling.")
    p.add_argument("--top_p", type=float, default=1.0, help="Of sampling.")
    p.add_argument("--seed", type=int, default=42, help="With the prompt's number, it decides what is drawn.")
    p.add_argument("--rows_at_once", type=_at_least(int, 1), default=256, help="Completions decoded together.")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="The weights' precision.")
    p.add_argument("--server", help="Sample there: an OpenAI-compatible address, such as http://localhost:8000/v1.")
    p.add_argument("--server_model", help="The model's name there, if another than model_name_or_path.")
    p.add_argument("--concurrency", type=_at_least(int, 1), default=32, help="Requests in flight.")
    _trust(p)
    _output(p, "gen.jsonl; a part goes to gen.0-of-4.jsonl")

    p = step("score", score, "Completions -> 'rewards', from a reward function or a reward model.")
    p.add_argument("--input", required=True, help="JSONL with 'prompt' and 'generations'.")
    p.add_argument("--reward", required=True, help="file.py:function, a reward-model id, or a feature as YAML text.")
    _trust(p)
    _output(p, "scored.jsonl")

    p = step("judge", judge, "Completions -> 'feedbacks', 'scores' and 'analysis', from a language model.")
    p.add_argument("--input", required=True, help="JSONL with 'prompt' and 'generations'.")
    p.add_argument("--judge", required=True, help="A YAML with a judge's options: prompt, model, answers, cache, ...")
    _output(p, "judged.jsonl")

    p = step("merge", _merge, "The parts of a file -> the file.")
    p.add_argument("--inputs", required=True, help="A pattern, such as 'gen.*.jsonl', quoted.")
    _output(p, "gen.jsonl")

    p = step("train", None, "Scored or judged completions -> a model: run_conditional.py, which takes all other flags.")
    p.add_argument("--input", required=True, help="JSONL with 'generations', and 'rewards' or 'scores' or 'feedbacks'.")
    p.add_argument("--output_dir", required=True, help="Where the model goes.")
    p.add_argument("--score_key", choices=["rewards", "scores"], help="Which numbers, where both are there.")
    return parser


def _output(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--output", required=True, help=f"Such as {example}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="Of a model's repository.")


def _at_least(kind: type, least: int) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}, expected at least {least}")
        return value

    read.__name__ = kind.__name__  # what argparse calls it
    return read
