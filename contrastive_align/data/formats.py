"""What a row holds, read into a checked group: one prompt, K completions, one score each."""

from __future__ import annotations

import json
import math
import numbers
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from contrastive_align.data.messages import (
    Message,
    Text,
    as_text,
    check_completion,
    check_prompt,
    is_messages,
    without_none,
)
from contrastive_align.data.rows import FIX, BadRow, check_text, parsed, short, text_of, truth_of


__all__ = ["BadRow", "Group", "Message", "Parts", "Text", "checked_group", "distinct_prompts", "random_prompts"]

LARGEST_SCORE = 3.4028234663852886e38  # scores are float32 on their way to the loss
NUMBERS, PERCENTAGES, LABELS = "numbers", "percentages", "labels"  # how scores are written
EXPECTED = {PERCENTAGES: "a percentage", LABELS: "a label such as yes or no"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_GRADE = re.compile(r"[A-F][+-]?")


@dataclass
class Group:
    """One prompt, K completions, one score each; ``template_kwargs`` are the row's arguments for the chat template."""

    prompt: Text  # plain text, or a list of messages (then the completions are lists of messages too)
    completions: list[Text]  # K >= 2
    scores: list[float]  # K finite numbers; higher is better
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass
class Columns:
    """A row's names for its parts, for errors; lists of names where each completion, or each score, has a column."""

    prompt: str
    completions: str | list[str]
    scores: str | list[str]

    def completion(self, i: int) -> str:
        return f"'{self.completions}'[{i}]" if isinstance(self.completions, str) else f"'{self.completions[i]}'"

    def score(self, i: int) -> str:
        return f"'{self.scores}'[{i}]" if isinstance(self.scores, str) else f"'{self.scores[i]}'"


@dataclass
class Parts:
    """What a shape finds in a row, unchecked."""

    prompt: Any
    completions: list[Any]
    scores: list[Any]
    columns: Columns
    template: dict[str, Any] = field(default_factory=dict)  # tools and chat_template_kwargs, as they stand in the row
    system: Any = None
    decimal_comma: bool = False
    written: str = NUMBERS  # how the scores of the dataset are


@dataclass
class Counts:
    """What happened to a row on its way to a group, for the report."""

    repeated_prompt: int = 0
    equal_completions: int = 0


def checked_group(parts: Parts, where: str, *, least: int = 2, prompt_repeats: bool = False) -> tuple[Group, Counts]:
    """Check a row's parts, bring them to one form, and take out completions that are equal.

    Args:
        parts: what a shape found.
        where: the row, for errors.
        least: how many completions there must be.
        prompt_repeats: the texts of this dataset begin with the prompt, which is taken out.

    Raises:
        BadRow: fewer completions, another number of scores than completions, a score that is missing, not a number, NaN
            or infinite, an empty prompt or completion, or roles in an order no chat template takes.
        TooFew: fewer than two different completions.
    """
    columns, counts = parts.columns, Counts()
    completions = [text_of(completion) for completion in parts.completions]
    written = {"decimal_comma": parts.decimal_comma, "written": parts.written}
    scores = check_scores(parts.scores, len(completions), where, columns, least, **written)
    completions = [as_text(c, f"{where}: {columns.completion(i)}") for i, c in enumerate(completions)]
    prompt = as_text(parts.prompt, f"{where}: '{columns.prompt}'")
    prompt, completions = _same_form(prompt, completions, where, columns)
    if isinstance(prompt, str):
        counts.repeated_prompt = int(prompt_repeats and _take_prompt_out(prompt, completions))
    prompt = with_system(prompt, parts.system, where)
    check_prompt(prompt, f"{where}: '{columns.prompt}'")
    for i, completion in enumerate(completions):
        check_completion(completion, f"{where}: {columns.completion(i)}")
    template = read_template_kwargs(parts.template, where)
    check_text(prompt, f"{where}: '{columns.prompt}'")
    for i, completion in enumerate(completions):
        check_text(completion, f"{where}: {columns.completion(i)}")
    check_text(template, f"{where}: 'tools'")
    if template.get("tools") and isinstance(prompt, str):
        raise BadRow(
            f"{where}: 'tools' are given beside a prompt of plain text, which has no place for them. Give the "
            "prompt as messages, or drop the row (on_bad_row='drop')."
        )
    if least > 1:
        kept = distinct(completions, scores)
        counts.equal_completions = len(completions) - len(kept)
        if len(kept) < 2:
            raise TooFew(
                f"{where}: of {len(completions)} completions {len(kept)} {'is' if len(kept) == 1 else 'are'} left once "
                "equal ones are taken out (of several with one score the first is kept, of several with "
                "different scores none). Dropped."
            )
        completions, scores = [completions[i] for i in kept], [scores[i] for i in kept]
    return Group(prompt, completions, scores, template), counts


class TooFew(BadRow):
    """Fewer than two different completions: dropped and counted, whatever ``on_bad_row`` says."""


def distinct(completions: list[Any], scores: list[float]) -> list[int]:
    """Return the indices of the completions to keep: one of equal ones with one score, none if their scores differ.

    >>> distinct(["a", "b", "a", "c", "c"], [1, 0, 1, 2, 3])
    [0, 1]
    """
    places: dict[Any, list[int]] = {}
    for i, completion in enumerate(completions):
        key = completion if isinstance(completion, str) else json.dumps(completion, sort_keys=True, default=str)
        places.setdefault(key, []).append(i)
    if len(places) == len(completions):
        return list(range(len(completions)))
    return [same[0] for same in places.values() if len({scores[i] for i in same}) == 1]


def check_scores(
    scores: list[Any], k: int, where: str, columns: Columns, least: int = 2, **written: Any
) -> list[float]:
    """Check that there are K completions and K finite scores; return the scores as floats, or raise BadRow."""
    answers, numbers = (n if isinstance(n, str) else ", ".join(n) for n in (columns.completions, columns.scores))
    if k < least:
        raise BadRow(
            f"{where}: '{answers}' has {k} completion{'s' * (k != 1)}, expected at least {least} per prompt. Add "
            "completions or drop the row (on_bad_row='drop')."
        )
    if len(scores) != k:
        raise BadRow(f"{where}: '{numbers}' has {len(scores)} numbers for {k} completions, expected one each. {FIX}")
    return [number_of(score, f"{where}: {columns.score(i)}", **written) for i, score in enumerate(scores)]


def how_written(scores: Iterable[Any]) -> str:
    """Return how the scores of a dataset are mostly written.

    >>> how_written(["yes", "no"]), how_written(["85%", "7%"]), how_written([1, "2.5", True])
    ('labels', 'percentages', 'numbers')
    """
    found = Counter(
        PERCENTAGES if isinstance(score, str) and score.rstrip().endswith("%")
        else LABELS if isinstance(score, str) and truth_of(score) is not None
        else NUMBERS
        for score in scores
        if score is not None and score != ""
    )  # fmt: skip
    return max(found, key=lambda how: found[how], default=NUMBERS)


def number_of(score: Any, what: str, *, decimal_comma: bool = False, written: str = NUMBERS) -> float:
    """Return a score as a finite float; text of a number, as the cells of a table are, is one.

    Args:
        score: as it stands in the row.
        what: the score's name, for errors.
        decimal_comma: numbers of its table may be written 4,5.
        written: how the scores of the dataset are: as numbers, as percentages (85%), or as labels (yes and no, good and
            bad); what is written otherwise is refused.

    Raises:
        BadRow: it is none.

    >>> number_of("4.5", "row 0"), number_of("4,5", "row 0", decimal_comma=True), number_of(True, "row 0")
    (4.5, 4.5, 1.0)
    >>> number_of("85%", "row 0", written=PERCENTAGES), number_of("good", "row 0", written=LABELS)
    (0.85, 1.0)
    """
    if score is None or (isinstance(score, str) and not score.strip()):
        raise BadRow(f"{what} is missing, expected a finite number. Fill it in or drop the row (on_bad_row='drop').")
    number: Any = score.strip() if isinstance(score, str) else score
    truth = truth_of(number) if written == LABELS or isinstance(number, bool) else None
    percent = written == PERCENTAGES and isinstance(number, str) and number.endswith("%")
    if truth is not None:
        return float(truth)
    if written == LABELS or (written == PERCENTAGES and not percent):
        raise BadRow(f"{what} is {short(score)}, expected {EXPECTED[written]} as in other rows. {FIX}")
    if isinstance(number, str):
        number = _number_text(number.removesuffix("%").rstrip() if percent else number, what, decimal_comma)
    elif not isinstance(number, numbers.Real | Decimal):
        raise BadRow(f"{what} is {short(score)}, expected a finite number, not a {type(score).__name__}. {FIX}")
    try:
        number = float(number) / (100 if percent else 1)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_SCORE:
        raise BadRow(f"{what} is {number}, expected a finite number (at most {LARGEST_SCORE:.2g} in float32). {FIX}")
    return number


def _number_text(text: str, what: str, decimal_comma: bool) -> str:
    """Return the text of a number as Python writes it."""
    comma = bool(_DECIMAL_COMMA.fullmatch(text))
    # 1,000 may be a thousand.
    german = decimal_comma and comma and not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text)
    number = text.replace(",", ".") if german else text
    if _NUMBER.fullmatch(number):
        return number
    if _GRADE.fullmatch(text):
        raise BadRow(
            f"{what} is the grade {text!r}, expected a finite number: how far grades are apart is not known. Write a "
            "number for each grade, as 4 for A and 3 for B, or drop the row (on_bad_row='drop')."
        )
    hint = " Write decimals with a point, and no separator of thousands." if comma else ""
    raise BadRow(f"{what} is {short(text)}, expected a finite number.{hint} {FIX}")


def distinct_prompts(rows: Iterable[Mapping[str, Any]], at_most: int | None = None) -> list[Mapping[str, Any]]:
    """Return the first row of each different ``prompt``, in order, and stop at ``at_most`` of them.

    >>> distinct_prompts([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "a", "n": 3}])
    [{'prompt': 'a', 'n': 1}, {'prompt': 'b', 'n': 2}]
    """
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if len(found) == at_most:
            break
        found.setdefault(json.dumps(row["prompt"]), row)
    return list(found.values())


def random_prompts(rows: Sequence[Mapping[str, Any]], at_most: int, *, seed: int) -> list[Mapping[str, Any]]:
    """Return the first row of at most so many different prompts, a random choice of them in a random order.

    The order of a file means something more often than not; its head stands for nothing but itself.

    >>> random_prompts([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c"}], 2, seed=0)
    [{'prompt': 'b'}, {'prompt': 'c'}]
    """
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(json.dumps(row["prompt"]), i)
    places = random.Random(seed).sample(list(first.values()), min(at_most, len(first)))
    return [rows[i] for i in places]


def _same_form(prompt: Any, completions: list[Any], where: str, columns: Columns) -> tuple[Text, list[Text]]:
    """Return prompt and completions all as text or all as messages, without a prompt repeated in the completions."""
    conversational = [isinstance(c, list) for c in completions]
    if not any(conversational) and not isinstance(prompt, list):
        return prompt, completions
    completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    whole = [is_messages(c) and c[0].get("role") != "assistant" for c in completions]
    if any(whole):  # whole dialogues: split off the given prompt, or the turns shared before the last answer
        for i, completion in enumerate(completions):
            if not is_messages(completion):
                check_completion(completion, f"{where}: {columns.completion(i)}")
        if isinstance(prompt, list) and prompt and all(c[: len(prompt)] == prompt for c in completions):
            return prompt, [c[len(prompt) :] for c in completions]
        shared = 0
        while all(len(c) > shared + 1 and c[shared] == completions[0][shared] for c in completions):
            shared += 1
        while shared and completions[0][shared - 1].get("role") == "assistant":
            shared -= 1
        told = completions[0][:shared]
        if not told or (isinstance(prompt, list) and prompt):
            odd = completions[whole.index(True)]
            raise BadRow(
                f"{where}: {columns.completion(whole.index(True))} begins with the role '{odd[0].get('role')}', "
                f"expected 'assistant', or whole dialogues that all begin with the '{columns.prompt}'. {FIX}"
            )
        return told, [c[shared:] for c in completions]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    return prompt, completions


def _take_prompt_out(prompt: str, completions: list[Any]) -> bool:
    """Take a prompt that all completions repeat out of them; return whether they did."""
    repeated = bool(prompt) and all(isinstance(c, str) and c.startswith(prompt) for c in completions)
    if repeated:
        completions[:] = [c[len(prompt) :] for c in completions]
    return repeated


def with_system(prompt: Any, system: Any, where: str) -> Any:
    """Put a system prompt before the prompt: as a message, or as text and an empty line."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise BadRow(f"{where}: 'system' is {short(system)}, expected text. {FIX}")
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}"
    if is_messages(prompt) and prompt[0].get("role") in ("system", "developer"):
        if prompt[0].get("content", "").strip() == system.strip():
            return prompt
        raise BadRow(f"{where}: a system prompt stands in 'system' and another in the messages. {FIX}")
    return [{"role": "system", "content": system}, *prompt] if isinstance(prompt, list) else prompt


def read_template_kwargs(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row's ``tools`` and ``chat_template_kwargs``, which may be JSON text, for its chat template.

    Raises:
        BadRow: they are something else.
    """
    tools = _template_value(row, "tools", list, where)
    return ({"tools": tools} if tools else {}) | (_template_value(row, "chat_template_kwargs", dict, where) or {})


def _template_value(row: Mapping[str, Any], column: str, kind: type, where: str) -> Any:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"{where}: '{column}' is not JSON: {error}. {FIX}") from error
    if value is not None and value != "" and not isinstance(value, kind):
        raise BadRow(f"{where}: '{column}' is {short(value)}, expected a {kind.__name__}. {FIX}")
    return without_none(value) or None


def listed(value: Any, name: str, where: str) -> list[Any]:
    """Return a column that must be a list, which may be JSON text.

    Raises:
        BadRow: it is missing, or something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"{where}: '{name}' is missing. Fill it in or drop the row (on_bad_row='drop').")
    if isinstance(value, str) and value.lstrip().startswith("["):
        found = parsed(value, f"{where}: '{name}'")
        if not isinstance(found, list):
            python = " It is a list as Python prints it: write it by json.dumps." if value.lstrip()[1:2] == "'" else ""
            raise BadRow(f"{where}: '{name}' is text that is not a JSON list: {short(value)}.{python} {FIX}")
        value = found
    if not isinstance(value, list):
        raise BadRow(f"{where}: '{name}' is {short(value)}, expected a list with one entry per completion. {FIX}")
    return value
