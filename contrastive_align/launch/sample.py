"""``contrastive-align sample``: answers of any model or adapter, in the formats of AlpacaEval, MT-bench or JSONL.

With ``--qrs`` they are samples of a tuned policy that quasi-rejection sampling accepts for the target of its run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contrastive_align.data.files import READERS, FileProblem, kind_of, prompts_of
from contrastive_align.data.formats import Text
from contrastive_align.data.rows import RAW, UNREADABLE
from contrastive_align.launch.accepted import AcceptedAnswers
from contrastive_align.launch.step_files import check_free, to_line, write_rows
from contrastive_align.launch.trained import Trained
from contrastive_align.launch.usage import UsageError, UsageParser, check_flags
from contrastive_align.ranges import RANGES, Range
from contrastive_align.sampling.decode import seed_of


FORMATS = ("jsonl", "alpaca_eval", "mt_bench")
# FastChat's temperatures (fastchat/llm_judge/common.py), by category; 0 is greedy.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER_TEMPERATURE = 0.7
WHOLE = {"top_k": 0, "top_p": 1.0}  # flags -> the values that leave out no token
AT_ONCE = 32  # prompts
LONGEST = 512  # tokens of a completion, where nothing says how many
WISHES = ("acceptance", "tv", "qrs_beta")
NUMBERS = {
    **{name: RANGES[name] for name in ("num_generations", "max_completion_length", "top_k", "top_p", "seed")},
    "temperature": Range(0),  # 0 is greedy
    "num_beams": Range(1, whole=True),
    "acceptance": Range(0, 1, above=True),
    "tv": Range(0, 1, above=True),
    "qrs_beta": Range(0, above=True),
}


def main(argv: Sequence[str]) -> list[Any]:
    """Sample, write ``--output`` or print; return the rows."""
    args = build_parser().parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("expected one of --prompt='a prompt' and --prompts=FILE.")
    if (args.model_name_or_path is None) == (args.qrs is None):
        raise UsageError("expected one of --model_name_or_path=MODEL and --qrs=FOLDER, that of an f-DPG run.")
    if args.compare and args.output:
        raise UsageError("--compare prints both models, and --output writes one. Leave one of them out.")
    check_flags(args, NUMBERS)
    _check_together(args)
    if args.format != "jsonl" and args.num_generations != 1:
        raise UsageError(f"--num_generations={args.num_generations} means nothing to {args.format}: it has one answer.")
    if args.output:
        check_free(Path(args.output), args.overwrite)
    questions = [{"prompt": args.prompt}] if args.prompts is None else read_questions(Path(args.prompts), args.format)
    _check_distance(args, questions)
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, "seed": args.seed}
    if args.qrs is None:
        model = Trained(args.model_name_or_path, **options)
    else:
        model = AcceptedAnswers(args.qrs, **{name: getattr(args, name) for name in WISHES}, **options)
    models = [model, *([Trained(args.compare, **options)] if args.compare else [])]
    args.max_completion_length = args.max_completion_length or default_length(models, questions)
    for each in models:
        check_fits(each, questions, args)
    if isinstance(model, AcceptedAnswers):
        first = [prompt_after([], first_turn(row), model) for row in questions]
        model.choose_beta(as_dataset(questions), first, **_sampling(args, questions[0]))
    rows, *others = [answers(each, questions, args) for each in models]
    if others:
        show_both(questions, rows, *others, [each.short_name for each in models], args.format)
    elif args.output:
        lines = [json.dumps(rows, ensure_ascii=False, indent=2).encode() + b"\n"]
        write_rows(Path(args.output), lines if args.format == "alpaca_eval" else map(to_line, rows))
        print(f"{args.output}: {len(rows)} answers of {model.short_name} in the format {args.format}")
    else:
        for question, row in zip(questions, rows, strict=True):
            print(f"asked    {first_turn(question)!r}")
            for text in texts_of(row, args.format):
                print(f"sampled  {text!r}")
    if isinstance(model, AcceptedAnswers):
        share = model.accepted / max(1, model.proposed)
        print(f"QRS accepted {model.accepted} of {model.proposed} proposals ({share:.3f}); {model.chosen}")
    return rows


def _check_together(args: argparse.Namespace) -> None:
    """Raise UsageError where flags contradict each other."""
    wishes = [name for name in WISHES if getattr(args, name) is not None]
    if wishes and args.qrs is None:
        raise UsageError(f"--{wishes[0]} belongs to --qrs, which is not given. Leave it out.")
    if len(wishes) > 1:
        raise UsageError(f"--{wishes[0]} and --{wishes[1]} both decide beta. Give one of them.")
    if args.num_beams == 1:
        return
    drawn = {"qrs": None, "temperature": None, "top_k": 0, "top_p": 1.0}
    other = next((name for name, default in drawn.items() if getattr(args, name) != default), None)
    if other:
        raise UsageError(f"--num_beams searches and draws nothing, so that --{other} has no meaning. Leave one out.")
    if args.num_beams < args.num_generations:
        raise UsageError(
            f"--num_beams is {args.num_beams}, expected at least --num_generations={args.num_generations}."
        )


def _check_distance(args: argparse.Namespace, questions: Sequence[dict[str, Any]]) -> None:
    """Raise UsageError where a distance from the target is wished for, and some completions are never proposed."""
    if args.tv is None:
        return
    found = [f"--{name}={getattr(args, name):g}" for name, whole in WHOLE.items() if getattr(args, name) != whole]
    if any(temperature_of(row, args) == 0 for row in questions):
        found.append("--temperature=0" if args.temperature == 0 else "the temperature 0 of some categories of mt_bench")
    if found:
        raise UsageError(
            f"--tv is the distance from the whole target, and {found[0]} leaves completions out, which no beta brings "
            "back. Leave one of them out, or wish for an --acceptance."
        )


def read_questions(path: Path, form: str) -> list[dict[str, Any]]:
    """Read prompts: JSON (a list) or JSONL, of objects with ``prompt``, ``instruction`` or ``turns``; or lines of text.

    Raises:
        FileNotFoundError: no such file.
        UsageError: a file that is not UTF-8, a row that is no JSON object, or one without a prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' (looked in {Path.cwd()}).")
    try:
        rows = [{"prompt": line} for line in prompts_of(path)] if path.suffix == ".txt" else list(_json_rows(path))
    except FileProblem as error:
        raise UsageError(str(error)) from None
    if not rows:
        raise UsageError(f"{path} has no rows, expected a list, or one JSON object a line.")
    wanted = "turns" if form == "mt_bench" else "prompt, instruction or turns"
    for number, row in enumerate(rows):
        if not turns_of(row) or (form == "mt_bench" and "turns" not in row):
            raise UsageError(f"{path}, row {number}: the keys {sorted(row)}, expected {wanted}.")
    return rows


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    kind = kind_of(path)
    for read in READERS["json"](path, kind.compression if kind else None):
        row = read()
        if row[UNREADABLE]:
            raise FileProblem(row[UNREADABLE])
        yield json.loads(row[RAW])


def as_dataset(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each row the columns of all; what it lacks is None, as in a dataset.

    >>> as_dataset([{"prompt": "a", "topic": "x"}, {"prompt": "b"}])
    [{'prompt': 'a', 'topic': 'x'}, {'prompt': 'b', 'topic': None}]
    """
    nothing = dict.fromkeys(name for row in rows for name in row)
    return [nothing | row for row in rows]


def turns_of(row: dict[str, Any]) -> list[Text]:
    """Return what is asked, turn after turn."""
    turns = row.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return list(turns)
    found: Any = row.get("prompt", row.get("instruction"))
    messages = isinstance(found, list) and found and all(isinstance(m, dict) and "content" in m for m in found)
    return [found] if (isinstance(found, str) and found) or messages else []


def first_turn(row: dict[str, Any]) -> Text:
    """Return the first turn."""
    return turns_of(row)[0]


def answers(model: Trained, questions: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each question, in the format asked for."""
    found: list[dict[str, Any]] = []
    columns = as_dataset(questions)
    for start, alike in _batches(questions, args):
        replies = converse(model, alike, range(start, start + len(alike)), args, columns[start : start + len(alike)])
        rates = model.rates if isinstance(model, AcceptedAnswers) else [None] * len(alike)
        found += [
            _row(question, number, texts, model, args, rate)
            for number, (question, texts, rate) in enumerate(zip(alike, replies, rates, strict=True), start=start)
        ]
    return found


def _batches(
    questions: Sequence[dict[str, Any]], args: argparse.Namespace
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield consecutive questions of one temperature, with the number of the first."""
    start = 0
    while start < len(questions):
        alike = [questions[start]]
        for row in questions[start + 1 : start + AT_ONCE]:
            if temperature_of(row, args) != temperature_of(alike[0], args) or len(turns_of(row)) != len(
                turns_of(alike[0])
            ):
                break
            alike.append(row)
        yield start, alike
        start += len(alike)


def temperature_of(row: dict[str, Any], args: argparse.Namespace) -> float:
    """Return the temperature given, or else that of MT-bench's category; 1 in other formats."""
    if args.temperature is not None:
        return args.temperature
    return TEMPERATURES.get(row.get("category", ""), OTHER_TEMPERATURE) if args.format == "mt_bench" else 1.0


def _sampling(args: argparse.Namespace, like: dict[str, Any]) -> dict[str, Any]:
    """Return how answers to rows such as this one are sampled."""
    given = {"top_k": args.top_k, "top_p": args.top_p, "max_new_tokens": args.max_completion_length}
    return {**given, "temperature": temperature_of(like, args)}


def prompt_after(history: list[dict[str, str]], asked: Text, model: Trained) -> Text:
    """Add what is asked to a conversation, and return the prompt: messages for a model that chats, else a text."""
    history += [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    plain = isinstance(asked, str) and not model.chats
    return "\n\n".join(message["content"] for message in history) if plain else list(history)


def default_length(models: Sequence[Trained], questions: Sequence[dict[str, Any]]) -> int:
    """Return the longest completion where none is given: that of a run, or one for which half of the context is left.

    A conversation of n turns has n answers in one context.
    """
    first, turns = models[0], max(len(turns_of(row)) for row in questions)
    if isinstance(first, AcceptedAnswers):
        return first.max_completion_length
    contexts = [context for model in models if (context := model.context) is not None]
    return max(1, min([LONGEST, *(context // (2 * turns) for context in contexts)]))


def check_fits(model: Trained, questions: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Raise UsageError where a conversation with answers of full length does not fit into the context.

    Said before anything is sampled: a row that fails later would lose the answers to all others.
    """
    room, length = model.context, args.max_completion_length
    for number, row in enumerate(questions):
        where = "--prompt" if args.prompts is None else f"{args.prompts}, row {number}"
        turns, history = turns_of(row), []
        for asked in turns[:-1]:
            prompt_after(history, asked, model)
            history.append({"role": "assistant", "content": "."})
        try:
            tokens = len(model.ids_of(prompt_after(history, turns[-1], model)))
        except ValueError as error:  # of the chat template
            raise UsageError(f"{where}: {error}") from error
        n = len(turns)
        if room is None or model.positions(tokens + (n - 1) * length, length) <= room:
            continue
        found = "its prompt has" if n == 1 else f"its {n} turns have"
        answer = f"an answer of up to {length}" if n == 1 else f"{n} answers of up to {length} each"
        shorter = (room - tokens) // n
        fix = f"Give --max_completion_length={shorter} or less, or shorten it" if shorter > 0 else "Shorten it"
        raise UsageError(
            f"{where}: {found} {tokens} tokens; with {answer} (--max_completion_length) that is more than the {room} "
            f"of the context of {model.short_name}. {fix}, or leave the row out."
        )


def converse(
    model: Trained,
    rows: Sequence[dict[str, Any]],
    numbers: Sequence[int],
    args: argparse.Namespace,
    columns: Sequence[dict[str, Any]],
) -> list[list[list[str]]]:
    """Return for each conversation the answers of each turn (``num_generations`` of a single one).

    Args:
        columns: the rows with the columns of all questions, for features.
    """
    turns = [turns_of(row) for row in rows]
    replies: list[list[list[str]]] = [[] for _ in turns]
    history: list[list[dict[str, str]]] = [[] for _ in turns]
    for turn in range(len(turns[0])):
        texts, _ = model.answer(
            [prompt_after(own, said[turn], model) for said, own in zip(turns, history, strict=True)],
            [(number, turn) for number in numbers],
            rows=columns,
            per_prompt=args.num_generations,
            **_sampling(args, rows[0]),
            **({} if args.num_beams == 1 else {"num_beams": args.num_beams}),
        )
        for number, own, reply, group in zip(numbers, history, replies, texts, strict=True):
            if not group and (args.format != "jsonl" or len(turns[0]) > 1):
                raise UsageError(
                    f"prompt {number}: no sample was accepted, and {args.format} needs an answer. Wish for a higher "
                    "--acceptance, train longer, or write --format=jsonl, which can hold none."
                )
            own += [{"role": "assistant", "content": text} for text in group[:1]]
            reply.append(group)
    return replies


def _row(
    question: dict[str, Any],
    number: int,
    texts: list[list[str]],
    model: Trained,
    args: argparse.Namespace,
    rate: float | None,
) -> dict[str, Any]:
    generator = args.generator or model.short_name
    if args.format == "alpaca_eval":
        more = {name: question[name] for name in ("dataset", "datasplit") if name in question}
        asked = first_turn(question)
        instruction = asked if isinstance(asked, str) else asked[-1]["content"]
        return {**more, "instruction": instruction, "output": texts[0][0], "generator": generator}
    if args.format == "mt_bench":
        return {
            "question_id": question.get("question_id", number),
            "answer_id": f"{seed_of(args.seed, generator, number):016x}",
            "model_id": generator,
            "choices": [{"index": 0, "turns": [group[0] for group in texts]}],
            "tstamp": time.time(),
        }
    rates = {} if rate is None else {"acceptance_rate": rate}
    return {**question, "generations": texts[-1], **rates, "generator": generator}


def texts_of(row: dict[str, Any], form: str) -> list[str]:
    """Return the answers in a row of a format."""
    if form == "mt_bench":
        return row["choices"][0]["turns"]
    return [row["output"]] if form == "alpaca_eval" else row["generations"]


def show_both(
    questions: Sequence[dict[str, Any]], rows: Sequence[dict], others: Sequence[dict], names: Sequence[str], form: str
) -> None:
    """Print the answers of two models beside each other."""
    from contrastive_align.launch.chat import side_by_side

    for question, one, other in zip(questions, rows, others, strict=True):
        print(f"\n{first_turn(question)}")
        print(side_by_side(*names, "\n".join(texts_of(one, form)), "\n".join(texts_of(other, form))))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    p = UsageParser(prog="contrastive-align sample", description=__doc__, allow_abbrev=False)
    p.add_argument("--model_name_or_path", "--model", help="A model or adapter: a folder or hub id.")
    p.add_argument(
        "--qrs", metavar="FOLDER", help="output_dir of an f-DPG run: write samples that QRS accepts for its target."
    )
    p.add_argument(
        "--acceptance",
        type=float,
        help="With --qrs: acceptance rate to aim at; where it is not reached, the highest one.",
    )
    p.add_argument("--tv", type=float, help="With --qrs: total variation distance from the target to aim at.")
    p.add_argument(
        "--qrs_beta", type=float, help="With --qrs: beta of QRS itself; by default the one that the run chose."
    )
    p.add_argument("--prompt", help="A single prompt.")
    p.add_argument(
        "--prompts", help="A file of prompts: .txt with one a line, or JSON or JSONL with prompt, instruction or turns."
    )
    p.add_argument("--format", choices=FORMATS, default="jsonl", help="Format of the output.")
    p.add_argument("--output", help="File that the answers are written to; by default they are printed.")
    p.add_argument("--overwrite", action="store_true", help="Replace an output file that exists.")
    p.add_argument(
        "--compare", metavar="OTHER", help="Another model, whose answers are printed beside the first one's."
    )
    p.add_argument("--generator", help="Name of the model in the output; by default its folder's or hub id's.")
    p.add_argument(
        "--num_generations", type=int, default=1, help="Number of answers to a prompt; more than 1 in jsonl only."
    )
    length = f"In tokens; {LONGEST}, at most half of the context in all turns; with --qrs that of the run."
    p.add_argument("--max_completion_length", type=int, help=length)
    p.add_argument(
        "--temperature",
        type=float,
        help="Sampling temperature; 0 is greedy. By default 1, and in mt_bench that of the question's category.",
    )
    p.add_argument("--top_k", type=int, default=0, help="Sample from the k likeliest tokens only; 0 samples from all.")
    p.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="Sample from the smallest set of tokens whose probabilities add up to it.",
    )
    p.add_argument(
        "--num_beams", type=int, default=1, help="Number of beams. Above 1 it is beam search, without sampling."
    )
    p.add_argument(
        "--seed",
        type=int,
        default=42,
        help="Seed of sampling. A prompt's samples depend on the seed and the prompt's number.",
    )
    p.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="Dtype of the weights."
    )
    p.add_argument("--trust_remote_code", action="store_true", help="Run code of the model's repository.")
    return p
