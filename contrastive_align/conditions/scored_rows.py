"""Read completions that have scores or feedback as samples of a pool."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from contrastive_align.conditions.conditions import Condition
from contrastive_align.data.formats import Group
from contrastive_align.data.messages import Text
from contrastive_align.data.rows import BadRow
from contrastive_align.data.tokenise import NoRoom, tokenise_group, tokenise_prompt
from contrastive_align.pool.files import Sample


logger = logging.get_logger(__name__)

# One completion a row, or a list of them: (completion, score, feedback, finished).
SINGLE = ("completion", "score", "feedback", "finished")
LISTS = ("completions", "scores", "feedbacks", "finished")
_ALIASES = {"response": "completion", "responses": "completions", "reward": "score", "rewards": "scores"}
PROMPT_COLUMNS = ("prompt", "instruction")
TEMPLATE_ALLOWANCE = 256  # tokens; no chat template adds more. A token has a byte at least, so bytes bound tokens.


def read_scored(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    condition: Condition | None = None,
    on_bad_row: str = "raise",
) -> tuple[list[Sample], dict[str, Any]]:
    """Read rows as samples of round 1.

    A row has ``prompt``, ``completion`` and ``score`` or ``feedback`` or both; or lists of K (``completions``,
    ``scores``, ``feedbacks``). A sample whose score or feedback is None is kept and never drawn. Completions end in one
    EOS, except where ``finished`` (with lists, its entry) is False: those were cut when they were sampled. Rows with
    the same prompt are one prompt, whose ``prompt_index`` is the number of the first of them.

    Args:
        dataset: the rows.
        tokenizer: the model's.
        max_length: tokens of prompt and completion together. A longer completion keeps its beginning and has no EOS. A
            prompt that leaves no room for a completion is dropped and counted.
        condition: the prompt is measured with the longest text of this condition.
        on_bad_row: ``"raise"``, or ``"drop"``: leave the row out and count it.

    Returns:
        The samples, and counts: ``rows``, ``completions``, ``dropped``, ``cut``, ``no_score``.

    Raises:
        BadRow: a row is malformed; with row and column.
        ValueError: the dataset lacks the columns, or every value that the condition is made from.
    """
    columns = {_ALIASES.get(name, name): name for name in dataset.column_names}
    names = LISTS if "completions" in columns else SINGLE
    prompt_column = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if prompt_column is None or names[0] not in columns or not {names[1], names[2]} & set(columns):
        raise ValueError(
            f"The dataset has the columns {sorted(dataset.column_names)}. Expected 'prompt' and 'completion' with "
            "'score' or 'feedback' (or 'completions' with 'scores' or 'feedbacks', lists of K) to learn from; or give "
            "reward_funcs or a judge to sample and score."
        )
    found = [columns.get(name) for name in names]
    needed = () if condition is None else condition.reads
    for what, name, column in zip(SINGLE[1:3], names[1:3], found[1:3], strict=True):
        if what in needed and column is None:
            raise ValueError(
                f"The condition '{condition.kind}' is made from each completion's {what}, and the data has the columns "
                f"{sorted(dataset.column_names)}. Rename the column that has it to '{name}', or use a condition that "
                "reads the other."
            )
    report = {"rows": len(dataset), "completions": 0, "dropped": 0, "cut": 0, "no_score": 0}
    samples, first_bad = [], []
    place, seen = {}, Counter()  # prompt -> its first row; of that prompt, how many samples there are
    for number, row in enumerate(dataset):
        of_row = []
        try:
            parts = list(_parts(row, row[columns[prompt_column]], found, names is LISTS, number))
            for k, (prompt, completion, score, feedback, finished) in enumerate(parts):
                where = f"row {number}, completion {k}"
                limit = _limit(prompt, completion, feedback, tokenizer, max_length, condition, where)
                ids, whole = _tokens(prompt, completion, tokenizer, limit, where)
                cut = not whole
                if whole and not finished and len(ids) > 1:
                    ids, whole = ids[:-1], False  # without its EOS
                of_row.append((cut, prompt, ids, completion, score, feedback, whole))
        except BadRow as error:
            if on_bad_row == "raise" and not isinstance(error, NoRoom):
                raise
            report["dropped"] += 1
            first_bad += [str(error)] if len(first_bad) < 3 else []
            continue
        for cut, *parts in of_row:
            first = place.setdefault(repr(parts[0]), number)
            report["cut"] += cut
            samples.append(Sample(*parts, first, seen[first], 1, 0))
            report["no_score"] += samples[-1].score is None and samples[-1].feedback is None
            seen[first] += 1
    report["completions"] = len(samples)
    if report["dropped"]:
        logger.warning(f"{report['dropped']} of {len(dataset)} rows are dropped: {'; '.join(first_bad)}")
    if not samples:
        raise ValueError(f"None of the {len(dataset)} rows is left to train on. {'; '.join(first_bad)}")
    if needed and all(any(getattr(sample, what) is None for what in needed) for sample in samples):
        raise ValueError(
            f"None of the {len(samples)} completions has a {' and a '.join(needed)}, from which the condition "
            f"'{condition.kind}' is made. Fill in the column, or name the one that has it."
        )
    return samples, report


def _parts(
    row: Mapping[str, Any], prompt: Any, columns: list[str | None], lists: bool, number: int
) -> Iterator[tuple[Text, str, float | None, str | None, bool]]:
    completions, scores, feedbacks, finished = (None if name is None else row[name] for name in columns)
    if not lists:
        completions, scores, feedbacks, finished = [completions], [scores], [feedbacks], [finished]
    if not prompt:
        raise BadRow(f"row {number}: the prompt is {prompt!r}, expected text or messages.")
    n = len(completions or [])
    scores = [None] * n if scores is None else scores
    feedbacks = [None] * n if feedbacks is None else feedbacks
    finished = [None] * n if finished is None else finished
    for name, values in zip(columns[1:], (scores, feedbacks, finished), strict=True):
        if len(values) != n:
            raise BadRow(f"row {number}: '{name}' has {len(values)} entries for {n} completions, expected one each.")
    for k, (completion, score, feedback, end) in enumerate(
        zip(completions or [], scores, feedbacks, finished, strict=True)
    ):
        where = f"row {number}, '{columns[0]}'" + (f"[{k}]" if lists else "")
        text = completion[-1]["content"] if isinstance(completion, list) and completion else completion
        if not isinstance(text, str) or (not text and end is not True):  # an empty completion that ended is an EOS
            raise BadRow(f"{where} is {completion!r}, expected text that is not empty.")
        if score is not None and (isinstance(score, bool | str) or not math.isfinite(score)):
            raise BadRow(f"{where}: its score is {score!r}, expected a finite number or None.")
        if feedback is not None and not isinstance(feedback, str):
            raise BadRow(f"{where}: its feedback is {feedback!r}, expected text or None.")
        if end is not None and not isinstance(end, bool):
            raise BadRow(f"{where}: its 'finished' is {end!r}, expected true, false or None (true).")
        yield prompt, text, None if score is None else float(score), feedback, end is not False


def _limit(
    prompt: Text,
    completion: str,
    feedback: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    condition: Condition | None,
    where: str,
) -> int | None:
    """Return the ``max_length`` of the prompt alone and its completion that leaves room for the condition's texts."""
    if max_length is None or condition is None:
        return max_length
    try:
        prompts = [condition.apply(prompt, text) for text in condition.texts_for(feedback)]
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from error
    longest = max((len(repr(p).encode()) for p in prompts), default=0)
    if longest + len(completion.encode()) + TEMPLATE_ALLOWANCE < max_length:
        return max_length
    alone = len(tokenise_prompt(prompt, tokenizer))
    added = max((len(tokenise_prompt(p, tokenizer)) for p in prompts), default=alone) - alone
    if alone + added >= max_length:
        raise NoRoom(
            f"{where}: the prompt has {alone + added} tokens with its condition and max_length is {max_length}: no "
            "room for a completion token. Raise max_length."
        )
    return max_length - max(0, added)


def _tokens(
    prompt: Text, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, where: str
) -> tuple[list[int], bool]:
    """Return the ids of a completion, with EOS unless it was cut, and whether it is whole."""
    eos: Any = tokenizer.eos_token_id
    if not completion:  # it ended at once
        if max_length is not None and len(tokenise_prompt(prompt, tokenizer)) >= max_length:
            raise NoRoom(f"{where}: the prompt leaves no room for a completion token under max_length={max_length}.")
        return [eos], True
    answer = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
    try:
        ids = tokenise_group(Group(prompt, [answer], [0.0]), tokenizer, max_length=max_length)
    except BadRow as error:
        raise type(error)(f"{where}: {error}") from error
    if not ids.moved_boundary or not isinstance(prompt, str):
        tokens, whole = ids.completion_ids[0], not ids.cut_completions
        if whole and eos not in tokens:  # the template leaves the turn open, and a sample ends in EOS
            room = max_length is None or len(ids.prompt_ids) + len(tokens) < max_length
            return [*tokens, eos] if room else tokens, room
        return tokens, whole
    # Together, prompt and completion would change the prompt's last token. At inference the prompt stands alone, so
    # the completion is tokenised alone too.
    alone = [*tokenizer(text=completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = len(alone) if max_length is None else max_length - len(ids.prompt_ids) - ids.moved_boundary
    if room < 1:
        raise NoRoom(f"{where}: the prompt leaves no room for a completion token under max_length={max_length}.")
    return alone[:room], len(alone) <= room
