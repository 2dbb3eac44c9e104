"""``python -m contrastive_align.steps``: sample, score, judge, merge and train over JSONL files, one prompt a line."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contrastive_align.conditions.conditions import FILE, Condition
from contrastive_align.data.formats import BadRow, Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch import step_files
from contrastive_align.launch.arguments import read_spec
from contrastive_align.launch.ask import load_trained, sample_trained
from contrastive_align.launch.errors import in_sentences
from contrastive_align.launch.feedback_flags import build_judge, build_sampler
from contrastive_align.launch.flags import NEGATIVE_NUMBER
from contrastive_align.launch.step_files import LISTS, Output, Row, fingerprint, read_rows
from contrastive_align.launch.usage import UsageError, UsageParser
from contrastive_align.models import load_tokenizer
from contrastive_align.ranges import check_numbers
from contrastive_align.sampling.decode import seed_of
from contrastive_align.sampling.server import PLAIN
from contrastive_align.targets.evaluate import call_feature
from contrastive_align.targets.features import resolve_feature


DTYPES = ("auto", "bfloat16", "float16", "float32")
CONVERTED = "scored_completions.jsonl"
BATCHES_AT_ONCE = 4  # of sampling, written together
ROWS_AT_ONCE = 64  # of scoring, written together
# Flags of ``sample`` that say where the output goes and how fast it comes, not what it contains.
_NOT_SETTINGS = ("step", "run", "prompts", "output", "overwrite", "sampler", "rows_at_once", "concurrency", "log_level")
_NOT_COLUMNS = (*LISTS, "prompt", "condition")

Complete = Callable[..., tuple[list[list[str]], list[list[bool]]]]  # see ask.sample_trained


def main(argv: Sequence[str] | None = None) -> Any:
    """Run one step and print its result in one line; raise UsageError for an error that the user can correct."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with in_sentences(["steps", *argv]):
        args, rest = build_parser().parse_known_args(argv)
        if rest and args.step != "train":
            raise UsageError(f"{args.step}: unknown {' '.join(rest)!r}. See contrastive-align steps {args.step} -h.")
        if args.step == "train":
            return train(args, rest)
        check_numbers(args)
        said = args.run(args)
    print(said, flush=True)
    return said


def sample(args: Namespace) -> str:
    """Write ``generations`` and ``finished`` for the prompts of one part; return a line for the screen."""
    rows = read_rows(args.prompts, generations=False)
    part = [
        _prompt_row(rows[i], i, args) for i in step_files.part_rows(args.split_number, args.total_splits, len(rows))
    ]
    path = step_files.part_name(args.output, args.split_number, args.total_splits)
    condition = None
    if args.condition is not None or (Path(args.model_name_or_path) / FILE).is_file():
        condition = Condition.load(args.model_name_or_path)
    text_for = _condition_text(condition, args.condition)
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in _NOT_SETTINGS}
    settings |= {"prompts": fingerprint(args.prompts), "server": bool(args.sampler)}
    output = Output(path, settings, overwrite=args.overwrite)
    if len(part) > output.done:
        tokens = [] if condition is None else condition.tokens
        tokenizer, complete = (_complete_by_server if args.sampler else _complete_here)(args, tokens)
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def work(some: list[Row]) -> list[Row]:
        rows, ids = [], []
        for row in some:
            prompt, text = row["prompt"], text_for(row["prompt"])
            rows.append(row if text is None else row | {"condition": text})
            asked = prompt if text is None else condition.apply(prompt, text)
            ids.append(tokenise_prompt(asked, tokenizer) or [start])
        texts, finished = complete(
            ids,
            seeds=[seed_of(args.seed, "sample", row["prompt_index"]) for row in some],
            per_prompt=args.num_generations,
            temperature=args.temperature,
            top_p=args.top_p,
        )
        return [
            row | {"generations": own, "finished": ended} for row, own, ended in zip(rows, texts, finished, strict=True)
        ]

    at_once = max(1, BATCHES_AT_ONCE * args.rows_at_once // args.num_generations)
    ends = [end for row in output.fill(part, work, at_once=at_once) for end in row["finished"]]
    share = f", {sum(ends) / len(ends):.0%} of them finished" if ends else ""
    return f"{path}: {len(part)} prompts x {args.num_generations} completions{share}"


def _prompt_row(row: Row, number: int, args: Namespace) -> Row:
    if row.get("prompt_index", number) != number:
        raise BadRow(
            f"{args.prompts}: row {number} has the prompt_index {row['prompt_index']}, expected {number}, its place in "
            "the file, or none. Give the whole file, and --split_number for a part of it."
        )
    columns = {key: value for key, value in row.items() if key not in (*LISTS, "condition")}
    return columns | {"prompt_index": number}


def _condition_text(condition: Condition | None, wanted: str | None) -> Callable[[Text], str | None]:
    """Return the function from a prompt to the text of the wanted condition; None where none is wanted."""
    if wanted is None:
        return lambda prompt: None
    if wanted == "best":
        return condition.best_for
    askable = condition.askable()
    if wanted not in askable:
        raise ValueError(f"--condition is {wanted!r}, expected 'best' or one of {list(askable)}.")
    return lambda prompt: askable[wanted]


def _complete_here(args: Namespace, tokens: list[str]) -> tuple[Any, Complete]:
    model, tokenizer = load_trained(args.model_name_or_path, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    model = model.to(torch.accelerator.current_accelerator() or "cpu").eval()
    size = {"max_new_tokens": args.max_completion_length, "rows_at_once": args.rows_at_once}
    return tokenizer, partial(sample_trained, model, tokenizer, tokens=tokens, **size)


def _complete_by_server(args: Namespace, tokens: list[str]) -> tuple[Any, Complete]:
    tokenizer: Any = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    suppressed = {str(i): -100 for i in tokenizer.convert_tokens_to_ids(tokens)}
    spec = read_spec("sampler", args.sampler)
    spec = {"base_url": spec} if isinstance(spec, str) else spec
    if isinstance(spec, dict):
        named = {"model": args.server_model or args.model_name_or_path, "concurrency": args.concurrency}
        extra = spec.get("extra_body")
        spec = {**named, **spec, "extra_body": PLAIN | extra if isinstance(extra, dict) else extra}
    server = build_sampler(spec, **({"logit_bias": suppressed} if suppressed else {}))

    def complete(ids: list[list[int]], **options: Any) -> tuple[list[list[str]], list[list[bool]]]:
        found = server(ids, max_tokens=args.max_completion_length, **options)
        return [[c.text for c in group] for group in found], [[c.finished for c in group] for group in found]

    return tokenizer, complete


def score(args: Namespace) -> str:
    """Write ``rewards``; return a line for the screen."""
    rows = read_rows(args.input, generations=True)
    settings = {"input": fingerprint(args.input), "reward": args.reward}
    output = Output(args.output, settings, overwrite=args.overwrite)
    feature = resolve_feature(
        read_spec("reward", args.reward),
        device=torch.accelerator.current_accelerator() or "cpu",
        trust_remote_code=args.trust_remote_code,
    )

    def work(some: list[Row]) -> list[Row]:
        names = {name for row in some for name in row if name not in _NOT_COLUMNS}
        prompts, completions = _flat(some)
        columns = {name: [row.get(name) for row in some for _ in row["generations"]] for name in sorted(names)}
        rewards = iter(call_feature(feature, prompts, completions, columns, none_allowed=True))
        return [row | {"rewards": [next(rewards) for _ in row["generations"]]} for row in some]

    rewards = [r for row in output.fill(rows, work, at_once=ROWS_AT_ONCE) for r in row["rewards"]]
    known = [r for r in rewards if r is not None]
    mean = f", mean {sum(known) / len(known):.4f}" if known else ""
    return f"{args.output}: {feature.name} of {len(known)} of {len(rewards)} completions{mean}"


def judge(args: Namespace) -> str:
    """Write ``feedbacks``, ``scores`` and ``analysis``, null without a verdict; return a line for the screen."""
    rows = read_rows(args.input, generations=True)
    asked = build_judge(read_spec("judge", args.judge), None, str(Path(args.output).parent))
    settings = {"input": fingerprint(args.input), "judge": {**asked.spec, "cache": None}}
    output = Output(args.output, settings, overwrite=args.overwrite)

    def work(some: list[Row]) -> list[Row]:
        verdicts = asked(*_flat(some))
        added = {"feedbacks": "text", "scores": "score", "analysis": "analysis"}
        for key, name in added.items():
            values = iter([None if verdict is None else getattr(verdict, name) for verdict in verdicts])
            some = [row | {key: [next(values) for _ in row["generations"]]} for row in some]
        return some

    scores = [s for row in output.fill(rows, work, at_once=len(rows)) for s in row["scores"]]
    known = sum(s is not None for s in scores)
    return f"{args.output}: verdicts on {known} of {len(scores)} completions; {asked.report()}"


def _flat(rows: list[Row]) -> tuple[list, list]:
    """List prompts and completions, one entry per completion; the completion of a conversation is a message."""
    pairs = [(row["prompt"], text) for row in rows for text in row["generations"]]
    spoken = [text if isinstance(p, str) else [{"role": "assistant", "content": text}] for p, text in pairs]
    return [prompt for prompt, _ in pairs], spoken


def _merge(args: Namespace) -> str:
    return f"{args.output}: {step_files.merge(args.inputs, args.output, overwrite=args.overwrite)} rows"


def train(args: Namespace, rest: list[str]) -> Any:
    """Write the rows as a data set into ``output_dir`` and run ``contrastive-align conditional`` on it."""
    from contrastive_align.launch.cli import main

    rows = convert(read_rows(args.input, generations=True), args.score_key, where=args.input)
    path = Path(args.output_dir) / CONVERTED
    step_files.write_rows(path, map(step_files.to_line, rows))
    return main(["conditional", *rest, f"--dataset_name={path}", f"--output_dir={args.output_dir}"])


def convert(rows: list[Row], score_key: str | None, *, where: str) -> list[Row]:
    """Rename the columns of the steps to those that the trainer reads; refuse rows without, or with unlike, columns.

    >>> convert([{"prompt": "Hi", "generations": ["a", "b"], "rewards": [1.0, 0.0]}], None, where="scored.jsonl")
    [{'prompt': 'Hi', 'completions': ['a', 'b'], 'scores': [1.0, 0.0]}]
    """
    there = {name for row in rows for name in ("rewards", "scores", "feedbacks", "finished") if name in row}
    numbers = sorted(there & {"rewards", "scores"}) if score_key is None else [score_key]
    if len(numbers) > 1:
        raise ValueError(
            f"{where} has both 'rewards' and 'scores'. Choose: --score_column=rewards or --score_column=scores."
        )
    if score_key is not None and score_key not in there:
        raise ValueError(f"{where} has no '{score_key}'. Its rows have {sorted(there)}.")
    if not numbers and "feedbacks" not in there:
        raise ValueError(f"{where} has nothing to learn from. Make it with the step 'score' or 'judge'.")
    wanted = {"generations": "completions", **dict.fromkeys(numbers, "scores")}
    wanted |= {name: name for name in ("feedbacks", "finished") if name in there}
    for number, row in enumerate(rows):
        if missing := [name for name in wanted if name not in row]:
            raise BadRow(f"{where}, row {number}: no '{missing[0]}', which other rows have.")
    return [{"prompt": row["prompt"], **{new: row[old] for old, new in wanted.items()}} for row in rows]


class _Parser(UsageParser):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self._negative_number_matcher = NEGATIVE_NUMBER


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with one subparser for each step."""
    about = "Conditional training in steps over JSONL files."
    parser = _Parser(prog="contrastive-align steps", description=about, allow_abbrev=False, log_level=False)
    steps = parser.add_subparsers(dest="step", required=True, metavar="step")

    def step(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        hands_it_on = run is None  # train
        made = steps.add_parser(name, help=what, description=what, allow_abbrev=False, log_level=not hands_it_on)
        made.set_defaults(run=run)
        return made

    p = step("sample", sample, "Prompts -> K completions each.")
    p.add_argument("--model_name_or_path", required=True, help="A model id, or the folder of a model or adapter.")
    p.add_argument("--prompts", required=True, help="JSONL with 'prompt': a text, or messages.")
    p.add_argument("--num_generations", type=int, default=8, help="Completions of each prompt.")
    p.add_argument(
        "--condition",
        help="Condition before each prompt: 'best', or another that the trained model knows; by default none.",
    )
    p.add_argument("--split_number", type=int, default=0, help="The part to sample, counted from 0.")
    p.add_argument("--total_splits", type=int, default=1, help="Number of parts that the prompts are divided into.")
    p.add_argument("--max_completion_length", type=int, default=256, help="Longest completion, in tokens.")
    p.add_argument("--temperature", type=float, default=1.0, help="Temperature of sampling.")
    p.add_argument("--top_p", type=float, default=1.0, help="Top-p (nucleus) of sampling.")
    p.add_argument(
        "--seed",
        type=int,
        default=42,
        help="Seed of sampling. A prompt's samples depend on the seed and the prompt's number.",
    )
    p.add_argument("--rows_at_once", type=int, default=256, help="Largest number of completions decoded in one batch.")
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="Dtype of the weights.")
    p.add_argument(
        "--sampler", "--server", help="A server that samples: an OpenAI-compatible address, or '{base_url: address}'."
    )
    p.add_argument("--server_model", help="Name of the model on the server, where it is not model_name_or_path.")
    p.add_argument("--concurrency", type=int, default=32, help="Number of requests to the server at a time.")
    p.add_argument("--trust_remote_code", action="store_true", help="Run code of the model's repository.")
    _output(p, "gen.jsonl; a part goes to gen.0-of-4.jsonl")

    p = step("score", score, "Completions -> 'rewards', from a reward function or a reward model.")
    p.add_argument("--input", required=True, help="JSONL with 'prompt' and 'generations'.")
    p.add_argument(
        "--reward",
        "--reward_funcs",
        required=True,
        help="What scores a completion: file.py:function, a reward-model id, or a feature as YAML text.",
    )
    p.add_argument("--trust_remote_code", action="store_true", help="Run code of the model's repository.")
    _output(p, "scored.jsonl")

    p = step("judge", judge, "Completions -> 'feedbacks', 'scores' and 'analysis', from a language model.")
    p.add_argument("--input", required=True, help="JSONL with 'prompt' and 'generations'.")
    p.add_argument(
        "--judge", required=True, help="The model that judges: a YAML file, or '{model: name, base_url: address}'."
    )
    _output(p, "judged.jsonl")

    p = step("merge", _merge, "The parts of a file -> the file.")
    p.add_argument("--inputs", required=True, help="Pattern of the parts, in quotes: 'gen.*.jsonl'.")
    _output(p, "gen.jsonl")

    p = step(
        "train",
        None,
        "Scored or judged completions -> a model: contrastive-align conditional, which takes all other flags.",
    )
    p.add_argument("--input", required=True, help="JSONL with 'generations', and 'rewards' or 'scores' or 'feedbacks'.")
    p.add_argument("--output_dir", required=True, help="Folder for the model.")
    p.add_argument(
        "--score_column",
        "--score_key",
        dest="score_key",
        choices=["rewards", "scores"],
        help="Which numbers are the score, where the file has both.",
    )
    return parser


def _output(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--output", required=True, help=f"File that is written, such as {example}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output file that exists.")
