"""``contrastive-align data FILE``: what training would see of a data set, without training."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line
from transformers import PreTrainedTokenizerBase

from contrastive_align import demo
from contrastive_align.data import BadRow, DataReport, Group, prepare_groups
from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.columns import read_options
from contrastive_align.data.labels import ANY_TEMPERATURE, auto_temperature, scores_of
from contrastive_align.data.reading import groups_of
from contrastive_align.launch.arguments import Arguments, RunArguments, option, parse
from contrastive_align.launch.datasets import load_splits
from contrastive_align.launch.usage import UsageError, as_flags
from contrastive_align.losses import label_entropy, target_labels
from contrastive_align.models import load_tokenizer
from contrastive_align.models.loading import embedding_rows
from contrastive_align.trainers import ContrastiveConfig


SHOWN = 3
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# A flag of this command that has another name elsewhere.
SAME = {"--model": "--model_name_or_path", "--preference": "--hard_pairs=true"}


@dataclass
class DataArguments(RunArguments):
    """Name the file that the canonical form is written to."""

    output: str | None = option(None, "Write the groups in the canonical form to this .jsonl file.")


def main(argv: Sequence[str]) -> DataReport:
    """Show what training would see of a data set; exit with status 1 where it would refuse."""
    given = [f"{SAME.get(name, name)}{equals}{value}" for name, equals, value in (a.partition("=") for a in argv)]
    if given and not given[0].startswith("-") and not given[0].endswith((".yaml", ".yml")):
        given[0] = f"--dataset_name={given[0]}"
    args = parse(given, prog="contrastive-align data", script=DataArguments, training=ContrastiveConfig)
    if not args.dataset:
        raise UsageError("no data is named. Give a file: contrastive-align data groups.jsonl.")
    if args.script.output and Path(args.script.output).suffix != ".jsonl":
        raise UsageError(f"--output is '{args.script.output}', expected a name that ends in .jsonl.")
    try:
        return _show(args, Console(highlight=False, soft_wrap=True))
    except UsageError as error:
        raise SystemExit(1) from error
    except (BadRow, ValueError) as error:
        print(f"\ntraining would refuse this data: {as_flags(str(error))}", flush=True)
        raise SystemExit(1) from error


def _show(args: Arguments, console: Console) -> DataReport:
    training, model = args.training, args.model.model_name_or_path
    notes = len(args.notes)
    options = read_options(training.columns, training.score_column, training.hard_pairs)
    rows, _ = load_splits(args, on_bad_row=training.on_bad_row)
    options = options if training.columns or training.score_column else read_options(None, None, training.hard_pairs)
    tokenizer = load_tokenizer(model or demo.MODEL_PATH)
    limits = {"max_length": training.max_length, "max_prompt_length": training.max_prompt_length}
    told = {"on_bad_row": training.on_bad_row, "name": "train", "options": options}
    tokens, report = prepare_groups(
        rows,
        tokenizer,
        **(limits if model else dict.fromkeys(limits)),
        num_proc=training.dataset_num_proc,
        vocabulary=embedding_rows(model) if model else None,
        **told,
    )
    tokens = tokens if isinstance(tokens, Dataset) else Dataset.from_list(list(tokens))  # a stream is read to its end
    console.print(f"{args.dataset}: {report.recognised()}")
    for line in [*args.notes[notes:], *report.notes()]:
        console.print(f"  {line}")
    _print_scores(console, tokens)
    if model:
        _print_lengths(console, tokens, training.max_length)
    groups = groups_of(rows, **told)
    if model:
        for group in tokens.select(range(min(SHOWN, len(tokens)))):
            _print_tokens(console, group, tokenizer)
    else:
        for _, group in zip(range(SHOWN), groups_of(rows, **told), strict=False):
            _print_text(console, group)
        console.print("\n--model=NAME shows tokens, lengths and what max_length cuts.")
    if args.script.output:
        n = _write(groups, Path(args.script.output))
        console.print(f"\n{n} groups written to {args.script.output}")
    return report


def _print_scores(console: Console, tokens: Any) -> None:
    """Print the levels of the scores, and what temperatures make of them."""
    scores, valid = scores_of(tokens)
    levels = Counter(scores[valid].tolist())
    shown = ", ".join(f"{level:g} ({n})" for level, n in sorted(levels.items(), reverse=True)[:8])
    more = f", and {len(levels) - 8} more" if len(levels) > 8 else ""
    best = scores.masked_fill(~valid, -math.inf).max(-1, keepdim=True).values
    ties = int(((scores == best) & valid).sum(-1).gt(1).sum())
    console.print(
        f"\nscores: {len(levels)} levels: {shown}{more}; the best score is shared in {ties} of {len(scores)} groups"
    )
    auto = auto_temperature(tokens, first_score_bonus=0.0)
    table = Table("temperature_alpha", "labels' entropy, share of the largest", "label of the best", box=None)
    largest = valid.sum(-1).double().log().mean()
    for name, alpha in (("1e-4", 1e-4), (f"auto: {auto:.4g}", auto), ("1", 1.0)):
        labels = target_labels(scores, temperature_alpha=alpha, valid=valid)
        share = float(label_entropy(labels).mean() / largest)
        table.add_row(name, f"{share:.2f}", f"{float(labels.max(-1).values.mean()):.2f}")
    if auto == ANY_TEMPERATURE and len(levels) <= 2:
        console.print("  pairs and groups of equal scores have the same labels at every temperature_alpha")
    else:
        console.print(table)


def _print_lengths(console: Console, tokens: Any, max_length: int | None) -> None:
    """Print quantiles of lengths, and what other limits would cut and drop."""
    prompts = np.array([len(ids) for ids in tokens["prompt_ids"]])
    completions = [np.array([len(ids) for ids in group]) for group in tokens["completion_ids"]]
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    table = Table("tokens", *(f"{q:.0%}" for q in QUANTILES), box=None)
    for name, values in (
        ("prompt", prompts),
        ("completion", np.concatenate(completions)),
        ("both", np.concatenate(whole)),
    ):
        table.add_row(name, *(f"{int(np.quantile(values, q, method='higher'))}" for q in QUANTILES))
    limit = "no max_length" if max_length is None else f"max_length={max_length}"
    console.print(f"\nlengths under {limit}:")
    console.print(table)
    longest = int(max(map(max, whole)))
    limits = Table("max_length", "completions cut", "groups dropped", box=None)
    for length in [length for length in LENGTHS if length < longest][-4:]:
        room = prompts < length
        cut = sum(int((w > length).sum()) for w, fits in zip(whole, room, strict=True) if fits)
        limits.add_row(str(length), str(cut), str(int((~room).sum())))
    if limits.row_count:
        console.print(limits)


def _print_text(console: Console, group: Group) -> None:
    console.print(f"\nprompt      {_as_shown(group.prompt)}", markup=False)
    for completion, score in zip(group.completions, group.scores, strict=True):
        console.print(f"  {score:8g}  {_as_shown(completion)}", markup=False)


def _as_shown(text: Any) -> str:
    return repr(text) if isinstance(text, str) else " ".join(f"[{m['role']}] {m.get('content', m)!r}" for m in text)


def _print_tokens(console: Console, group: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print tokens: those of the prompt dim (no loss falls on them), completions green and cyan, ends reversed."""
    console.print(Line("\nprompt      ").append(_coloured(group["prompt_ids"], tokenizer, ("dim", "dim"))))
    for ids, score in zip(group["completion_ids"], group["scores"], strict=True):
        line = Line(f"  {score:8g}  ").append("|", "bold")
        console.print(line.append(_coloured(ids, tokenizer, ("green", "cyan"))))


def _coloured(ids: list[int], tokenizer: PreTrainedTokenizerBase, styles: tuple[str, str]) -> Line:
    line, ends = Line(), (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for i, token in enumerate(ids):
        text = repr(tokenizer.decode([token]))[1:-1]
        line.append(text, "reverse" if token in ends else styles[i % 2])
    return line


def _write(groups: Iterator[Group], path: Path) -> int:
    """Write groups as JSON lines, aside and renamed once they are whole."""
    written = 0
    with atomic_write(path) as file:
        for group in groups:
            written += 1
            row: dict[str, Any] = {"prompt": group.prompt, "completions": group.completions, "scores": group.scores}
            template = dict(group.template_kwargs)
            if "tools" in template:
                row["tools"] = template.pop("tools")
            if template:
                row["chat_template_kwargs"] = template
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return written
