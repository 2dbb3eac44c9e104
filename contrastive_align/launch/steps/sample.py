"""``sample``: prompts -> K completions each, from a model in this process or from a server."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contrastive_align.conditions.conditions import FILE, Condition
from contrastive_align.data.formats import BadRow, Text
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch.ask import load_trained
from contrastive_align.launch.steps.files import LISTS, Output, Row, fingerprint, read_rows
from contrastive_align.launch.steps.splits import name_of, rows_of
from contrastive_align.models import load_tokenizer
from contrastive_align.sampling.decode import draw
from contrastive_align.sampling.seeds import seed_of
from contrastive_align.sampling.server import PLAIN, ServerSampler
from contrastive_align.trainers.conditional_inputs import eos_ids


Drawn = list[tuple[list[str], list[bool]]]  # of each prompt: K texts, and whether they ended by themselves
BATCHES_AT_ONCE = 4  # written together


def sample(args: Namespace) -> str:
    """Write ``generations`` and ``finished`` for this part's prompts; what was done, in a line."""
    rows = read_rows(args.prompts, generations=False)
    part = [_row(rows[i], i, args) for i in rows_of(args.split_number, args.total_splits, len(rows))]
    path = name_of(args.output, args.split_number, args.total_splits)
    condition = _condition_of(args.model_name_or_path, args.condition)
    asked = _asking(condition, args.condition)
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in _NOT_SETTINGS}
    settings |= {"prompts": fingerprint(args.prompts), "server": bool(args.server)}
    output = Output(path, settings, overwrite=args.overwrite)
    tokens = [] if condition is None else condition.tokens
    if len(part) > output.done:
        generate = (_server_sampler if args.server else _local_sampler)(args, tokens)

    def work(some: list[Row]) -> list[Row]:
        prompts = [row["prompt"] for row in some]
        texts = [asked(prompt) for prompt in prompts]
        seen = [p if text is None else condition.apply(p, text) for p, text in zip(prompts, texts, strict=True)]
        seeds = [seed_of(args.seed, "sample", row["prompt_index"]) for row in some]
        return [
            row | ({} if text is None else {"condition": text}) | {"generations": found, "finished": finished}
            for row, text, (found, finished) in zip(some, texts, generate(seen, seeds), strict=True)
        ]

    at_once = max(1, BATCHES_AT_ONCE * args.rows_at_once // args.num_generations)
    ends = [end for row in output.fill(part, work, at_once=at_once) for end in row["finished"]]
    share = f", {sum(ends) / len(ends):.0%} of them finished" if ends else ""
    return f"{path}: {len(part)} prompts x {args.num_generations} completions{share}"


# Where the output goes and how fast it comes, not what is in it.
_NOT_SETTINGS = ("step", "run", "prompts", "output", "overwrite", "server", "rows_at_once", "concurrency")


def _row(row: Row, number: int, args: Namespace) -> Row:
    if row.get("prompt_index", number) != number:
        raise BadRow(
            f"{args.prompts}: row {number} has the prompt_index {row['prompt_index']}, expected {number}, its place in "
            "the file, or none. Give the whole file, and --split_number for a part of it."
        )
    kept = {key: value for key, value in row.items() if key not in (*LISTS, "condition")}
    return kept | {"prompt_index": number}


def _condition_of(model: str, wanted: str | None) -> Condition | None:
    """What the model was trained under; None where it was not."""
    if wanted is not None or (Path(model) / FILE).is_file():
        return Condition.load(model)
    return None


def _asking(condition: Condition | None, wanted: str | None) -> Callable[[Text], str | None]:
    if wanted is None:
        return lambda prompt: None
    if wanted == "best":
        return condition.best_for
    askable = condition.askable()
    if wanted not in askable:
        raise ValueError(f"--condition is {wanted!r}, expected 'best' or one of {list(askable)}.")
    return lambda prompt: askable[wanted]


def _encoder(tokenizer: Any) -> Callable[[Text], list[int]]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return lambda prompt: tokenise_prompt(prompt, tokenizer) or [start]


def _local_sampler(args: Namespace, tokens: list[str]) -> Callable[[list[Text], list[int]], Drawn]:
    model, tokenizer = load_trained(args.model_name_or_path, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    model = model.to(torch.accelerator.current_accelerator() or "cpu").eval()
    encode, eos = _encoder(tokenizer), eos_ids(model, tokenizer)

    def generate(prompts: list[Text], seeds: list[int]) -> Drawn:
        drawn = draw(
            model,
            [encode(prompt) for prompt in prompts],
            per_prompt=args.num_generations,
            max_new_tokens=args.max_completion_length,
            eos_token_ids=eos,
            pad_token_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            seeds=seeds,
            rows_at_once=args.rows_at_once,
            temperature=args.temperature,
            top_p=args.top_p,
            suppress_ids=tokenizer.convert_tokens_to_ids(tokens),
        )
        texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in drawn.completion_ids]
        return list(zip(texts, (~drawn.truncated).tolist(), strict=True))

    return generate


def _server_sampler(args: Namespace, tokens: list[str]) -> Callable[[list[Text], list[int]], Drawn]:
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    encode = _encoder(tokenizer)
    never = {str(i): -100 for i in tokenizer.convert_tokens_to_ids(tokens)}
    server = ServerSampler(
        args.server,
        args.server_model or args.model_name_or_path,
        concurrency=args.concurrency,
        extra_body=PLAIN | ({"logit_bias": never} if never else {}),
    )

    def generate(prompts: list[Text], seeds: list[int]) -> Drawn:
        found = server(
            [encode(prompt) for prompt in prompts],
            per_prompt=args.num_generations,
            max_tokens=args.max_completion_length,
            seeds=seeds,
            temperature=args.temperature,
            top_p=args.top_p,
        )
        return [([c.text for c in group], [c.finished for c in group]) for group in found]

    return generate
