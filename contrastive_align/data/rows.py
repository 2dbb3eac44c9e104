"""Rows as they come from files and datasets: what marks a bad one, and how the text of a row is parsed."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


FIX = "Correct the row or drop it (on_bad_row='drop')."
ROW = "__row__"  # the number of a row in the file, before shuffling and splitting
RAW = "__json__"  # the row as JSON text, of which Arrow guesses no types
UNREADABLE = "__unreadable__"  # the error of a row that the reader of a file could not read
DECIMAL_COMMA = "__decimal_comma__"  # in a row: its numbers may be written 4,5
OWN_COLUMNS = (ROW, RAW, UNREADABLE, DECIMAL_COMMA)
LARGEST_INTEGER = 2**63 - 1
# What a label says of an answer: the good word, and the bad one.
_TRUTHS = {
    word: truth
    for pair in (
        ("true", "false"), ("yes", "no"), ("good", "bad"), ("positive", "negative"), ("correct", "incorrect"),
        ("desirable", "undesirable"), ("chosen", "rejected"), ("accepted", "rejected"), ("pass", "fail"),
        ("like", "dislike"), ("thumbs up", "thumbs down"), ("thumbs_up", "thumbs_down"), ("👍", "👎"),
    )
    for word, truth in zip(pair, (True, False), strict=True)
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """A row that cannot be trained on: its place, what was found and expected, and how to fix it."""


def without_advice(problem: str) -> str:
    """Return what is wrong with a row that is dropped, without the advice to drop it.

    >>> without_advice(f"row 3: 'score' is 'x', expected a finite number. {FIX}")
    "row 3: 'score' is 'x', expected a finite number"
    """
    return re.sub(r" [^.:]*\(on_bad_row='drop'\)\.$", "", problem).removesuffix(".")


class Repeated(ValueError):
    """A key that stands twice in an object."""


class Literal(float):
    """A number with decimals that remembers how it was written: an answer 1.50 is the text "1.50".

    >>> parse_object('{"answer": 1.50}')["answer"].text
    '1.50'
    """

    text: str

    def __new__(cls, text: str) -> Literal:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:
        return (self.text,)


def parse_object(text: str) -> dict[str, Any]:
    """Parse a row's JSON object.

    Raises:
        ValueError: no JSON, no object, or a key that stands twice; says what was found.
    """
    try:
        row = json.loads(text, **_AS_WRITTEN)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}. {FIX}") from error
    except RecursionError as error:
        raise ValueError(f"JSON that is nested too deeply. {FIX}") from error
    if not isinstance(row, dict):
        found = "null" if row is None else f"{short(row)}"
        raise ValueError(f"the row is {found}, expected an object with columns. {FIX}")
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Repeated(f"the key '{twice}' stands twice in one object, expected each once. {FIX}")
    return found


_AS_WRITTEN: dict[str, Any] = {
    "parse_float": Literal,
    "parse_int": lambda text: Literal(text) if text == "-0" else int(text),
    "object_pairs_hook": _without_repeats,
}


def values_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the columns of a row, parsed where they are JSON text.

    Raises:
        BadRow: the reader of the file could not read it.
    """
    if row.get(UNREADABLE):
        raise BadRow(row[UNREADABLE])
    if row.get(RAW) is not None:
        try:
            return parse_object(row[RAW])
        except ValueError as error:
            raise BadRow(f"{where}: {error}") from error
    return {name: _as_text(value) for name, value in row.items() if name not in OWN_COLUMNS}


def _as_text(value: Any) -> Any:
    """Return bytes and dates, which typed files have, as the text that they are."""
    if isinstance(value, list) and value and isinstance(value[0], bytes | datetime.date | datetime.time):
        return [_as_text(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat().removesuffix("T00:00:00")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def number_in_file(row: Mapping[str, Any], place: int) -> int:
    """Return the number of a row in its file, or its place in the dataset, where its reader gave it none."""
    number = row.get(ROW)
    return number if isinstance(number, int) else place


def check_text(value: Any, what: str) -> None:
    """Refuse half a UTF-16 pair, which no tokenizer reads, anywhere in a value.

    Raises:
        BadRow: there is one.
    """
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise BadRow(
                f"{what} holds half of a character (a lone surrogate such as \\ud83d), which is no valid text. {FIX}"
            )
    elif isinstance(value, Mapping):
        for item in value.items():
            check_text(list(item), what)
    elif isinstance(value, list):
        for item in value:
            check_text(item, what)


def parsed(value: Any, what: str = "the cell") -> Any:
    """Parse a cell that holds a JSON list or object as text; return any other value as it is.

    Raises:
        BadRow: an object in it has a key twice.

    >>> parsed('["a", "b"]'), parsed("[sic]"), parsed("[1] is a footnote")
    (['a', 'b'], '[sic]', '[1] is a footnote')
    """
    if isinstance(value, str) and value[:1] in "[{ \n" and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value, **_AS_WRITTEN)
        except Repeated as error:
            raise BadRow(f"{what}: {error}") from error
        except (ValueError, RecursionError):
            return value
    return value


def truth_of(value: Any) -> bool | None:
    """Return the truth that a value is, or that a word of a label says; None for any other.

    >>> truth_of("Yes"), truth_of("undesirable"), truth_of("maybe")
    (True, False, None)
    """
    word = value.strip().lower() if isinstance(value, str) else value
    return word if isinstance(word, bool) else _TRUTHS.get(word) if isinstance(word, str) else None


def text_of(value: Any) -> Any:
    """Return the text of an answer that is a number, as it is written; any other value as it is.

    >>> text_of(14), text_of(True)
    ('14', True)
    """
    if isinstance(value, Literal):
        return value.text
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    if whole or isinstance(value, Decimal):
        return str(value)
    return repr(value) if isinstance(value, float) and value == value else value


def short(value: Any) -> str:
    """Return the value's text, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
