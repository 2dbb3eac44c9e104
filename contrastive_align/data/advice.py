"""What is said of columns that no shape fits: what they are, what they resemble, and what to type."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from contrastive_align.data.answers import InColumns, InList, OneARow
from contrastive_align.data.columns import (
    ABOUT,
    ANSWERS,
    LABELS,
    RANKS,
    SCORES,
    SYSTEMS,
    WINNERS,
    Options,
    Table,
    is_conversation,
    is_list,
    is_number,
    is_score,
    is_text,
)
from contrastive_align.data.prompts import find_prompt
from contrastive_align.data.scores import Ask


NOT_TEXT = {*SCORES, *RANKS, *LABELS, *WINNERS, *SYSTEMS, "judgment", "judgement", "mask", "history"}
TRIED = 40  # suggestions


def what_to_say(table: Table, read: Callable[[Options], Any]) -> str:
    """Say what the columns are, what they resemble, and what to type.

    Args:
        table: the columns.
        read: recognises the data set under other options, returns None, or raises.
    """
    listing = ", ".join(f"{name!r} ({_kind(table, key)})" for key, name in table.names.items())
    wanted = table.options.score
    if wanted and wanted not in table:
        near = difflib.get_close_matches(wanted, table.names, 1, 0.6)
        hint = f" Did you mean score_column={table.names[near[0]]!r}?" if near else ""
        return f"score_column is '{table.options.score_column}', and the columns are {listing}.{hint}"
    found = (
        f"No groups found in the columns {listing}. Expected a prompt, and completions with a score each (lists, "
        "numbered columns, or one a row), or chosen and rejected."
    )
    if wanted:
        found += f" No answers were found of which '{table.names[wanted]}' is the score."
    if wanted is None and (answers := _unscored(table)):
        return (
            f"{found} No column is known to be the score of the answers {answers}: name the one that says how good "
            "each is, or which is the better one (a letter, a number or 'tie'), with score_column='NAME'."
        )
    for columns in itertools.islice(_suggestions(table), TRIED):
        told = ",".join(f"{role}={column}" for role, column in columns.items())
        try:
            reading = read(replace(table.options, columns={**table.options.columns, **columns}))
            like = f"They resemble those of {reading.known_from}, with" if reading else None
        except ValueError as error:
            like = "They may be" if isinstance(error, Ask) else None
        if like is None:
            continue
        way = " (or chosen and rejected the other way round)" if "chosen" in columns else ""
        return f"{found} {like} columns='{told}'{way}. If that is right, say so."
    if score := next((key for key in (wanted, *SCORES) if key in table.names and _kind(table, key) == "text"), None):
        value = next(iter(table.values(score)))
        return f"{found} '{table.names[score]}' is text ({value!r}), expected a number: higher is better."
    if not _known_prompt(table) and {*table.names} & {*ANSWERS}:
        return f"{found} No column is known to be the prompt: add it, or name it with columns='prompt=NAME'."
    if next(OneARow.find(table), None) and _known_prompt(table):
        return f"{found} One answer a prompt without a score is what trl.SFTTrainer trains on."
    if _known_prompt(table) and len(table.names) == 1:
        return (
            f"{found} Prompts alone are for training on the policy's own samples: say what a good one is, with "
            "--reward=file.py:function (in Python reward_funcs=[function])."
        )
    return f"{found} Say which column is which, for instance columns='{_example(table)}'."


def _unscored(table: Table) -> str | None:
    """Name columns that hold several answers."""
    where = next((where for place in (InList, InColumns) for where in place.find(table)), None)
    return table.listing(where.keys) if where and find_prompt(table, where.keys).main else None


def _kind(table: Table, key: str) -> str:
    tests = {"number": is_number, "messages": is_conversation, "text": is_text, "list": is_list}
    return next(
        (name for name, test in tests.items() if table.mostly(key, test)),
        "empty" if not table.values(key) else "object",
    )


def _suggestions(table: Table) -> Iterator[dict[str, str]]:
    """Yield role -> column, the most probable first."""
    kinds = {key: _kind(table, key) for key in table.names}
    texts = [key for key, kind in kinds.items() if kind in ("text", "messages") and not _is_about(key)]
    lists = [key for key, kind in kinds.items() if kind == "list"]
    numbers = [key for key, kind in kinds.items() if kind == "number" and not ABOUT.fullmatch(key)]
    numeric = [key for key in lists if table.mostly(key, lambda v: all(map(is_score, v)))]
    known = _known_prompt(table)
    name = table.names
    for prompt in [known] if known else texts[:3]:
        told = {"prompt": name[prompt]}
        for a, b in itertools.permutations([key for key in (*lists, *texts) if key not in (prompt, *numeric)], 2):
            in_family = any({a, b} <= set(own.values()) for own in table.families.values())
            if kinds[a] == kinds[b] and _opposite(a, b) and not in_family:
                yield {**told, "chosen": name[a], "rejected": name[b]}
        for answers in [key for key in lists if key not in numeric]:
            yield {**told, "completions": name[answers]}
            yield from ({**told, "completions": name[answers], "scores": name[scores]} for scores in numeric)
        families = [tuple(own.values()) for own in table.families.values()]
        for answers in [keys for keys in families if all(kinds[key] in ("text", "messages") for key in keys)]:
            for scores in [keys for keys in families if all(kinds[key] == "number" for key in keys)]:
                if len(answers) == len(scores):
                    joined = ["+".join(name[key] for key in keys) for keys in (answers, scores)]
                    yield {**told, "completions": joined[0], "scores": joined[1]}
        rest = [key for key in texts if key != prompt]
        for answer in rest:
            yield from ({**told, "completion": name[answer], "score": name[score]} for score in numbers)
        if len(rest) == 2 and not numbers and not lists and not {*rest} & {*ANSWERS}:
            yield {**told, "chosen": name[rest[0]], "rejected": name[rest[1]]}


def _is_about(key: str) -> bool:
    return bool(ABOUT.fullmatch(key) or set(key.split("_")) & NOT_TEXT)


def _opposite(a: str, b: str) -> bool:
    """Whether two names say the better and the worse of one thing, as correct_answers and incorrect_answers do."""
    words = [key.split("_") for key in (a, b)]
    shared = set(words[0]) & set(words[1])
    return len(words[0]) == len(words[1]) > 1 and len(shared) == len(words[0]) - 1


def _known_prompt(table: Table) -> str | None:
    with contextlib.suppress(ValueError):
        return find_prompt(table).main
    return None


def _example(table: Table) -> str:
    prompt = _known_prompt(table) or next(
        (key for key in table.names if _kind(table, key) in ("text", "messages")), None
    )
    lists = [table.names[key] for key in table.names if key != prompt and _kind(table, key) == "list"]
    told = f"prompt={table.names[prompt] if prompt else 'NAME'}"
    return f"{told},completions={lists[0]},scores=NAME" if lists else f"{told},chosen=NAME,rejected=NAME"
