"""Features that read the completion's text: what it contains, matches, counts or measures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastive_align.targets.evaluate import Feature, completion_text, shorten


LENGTH_UNITS = ("words", "characters", "tokens")


def contains(value: Any, *, case_sensitive: bool = False, count: bool = False) -> Feature:
    """1 where the completion contains the text, or any of a list of texts, anywhere, also inside a word.

    Args:
        value: the text or texts.
        case_sensitive: whether "Please" differs from "please".
        count: the number of times instead of 0 or 1.

    >>> contains("please")(prompts=[""] * 2, completions=["Please wait.", "Wait."])
    [1.0, 0.0]
    """
    texts = _texts("contains", value)
    return _pattern("contains", texts, "|".join(map(re.escape, _longest_first(texts))), case_sensitive, count)


def words(value: Any, *, case_sensitive: bool = False, count: bool = False) -> Feature:
    """1 where the completion has any of the words (or phrases) as whole words.

    Args:
        value: a list of words, or the path of a text file with one on each line.

    >>> words(["art", "arts"])(prompts=[""] * 2, completions=["The arts.", "A party."])
    [1.0, 0.0]
    """
    if isinstance(value, str):
        if not Path(value).is_file():
            raise ValueError(f"words: no file {value!r}. Give a file with one word on each line, or a list: [{value}].")
        lines = Path(value).read_text(encoding="utf-8").splitlines()
        found, name = [line.strip() for line in lines if line.strip()], [Path(value).stem]
        if not found:
            raise ValueError(f"words: the file {value!r} has no words, expected one on each line.")
    else:
        found = name = _texts("words", value)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, _longest_first(found)))})(?!\w)"
    return _pattern("words", name, pattern, case_sensitive, count)


def matches(value: Any, *, count: bool = False) -> Feature:
    """1 where a regular expression of Python's ``re`` is found; ``(?i)`` in front of it ignores case.

    >>> matches(r"\\d+", count=True)(prompts=[""], completions=["3 times 4"])
    [2.0]
    """
    if not isinstance(value, str):
        raise ValueError(f"matches: found {shorten(value)}, expected a regular expression as text.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"matches: {value!r} is no regular expression: {error}. See Python's 're'.") from error
    return _pattern("matches", [value], value, True, count)


def length(value: Any, *, min: float | None = None, max: float | None = None) -> Feature:
    """The completion's length in words, characters or tokens (these need the column ``completion_ids``).

    Args:
        value: ``"words"``, ``"characters"`` or ``"tokens"``.
        min, max: with either, 1 where min <= length <= max and else 0.

    >>> length("words", max=2)(prompts=[""] * 2, completions=["Two words.", "Now three words."])
    [1.0, 0.0]
    """
    if value not in LENGTH_UNITS:
        raise ValueError(f"length: found {shorten(value)}, expected one of {', '.join(LENGTH_UNITS)}.")
    for key, limit in (("min", min), ("max", max)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float))):
            raise ValueError(f"length: {key} is {shorten(limit)}, expected a number.")
    bounded = min is not None or max is not None
    low, high = (float("-inf") if min is None else min), (float("inf") if max is None else max)

    def measure(prompts: Sequence, completions: Sequence, completion_ids: Sequence | None = None, **columns: Any):
        if value == "tokens":
            if completion_ids is None:
                raise ValueError("length in tokens reads the column 'completion_ids', which was not given")
            sizes = [len(ids) for ids in completion_ids]
        else:
            texts = map(completion_text, completions)
            sizes = [len(text.split()) if value == "words" else len(text) for text in texts]
        return [float(low <= size <= high) if bounded else float(size) for size in sizes]

    limits = [f"{key}={limit:g}" for key, limit in (("min", min), ("max", max)) if limit is not None]
    return Feature(measure, ":".join(["length", value, *limits]), boolean=bounded)


def _pattern(kind: str, shown: list[str], pattern: str, case_sensitive: bool, count: bool) -> Feature:
    regex = re.compile(pattern, 0 if case_sensitive else re.IGNORECASE)

    def value(text: str) -> float:
        return float(sum(1 for _ in regex.finditer(text)) if count else bool(regex.search(text)))

    def function(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        return [value(completion_text(completion)) for completion in completions]

    name = f"{kind}:{','.join(shown)}" + ":count" * count
    return Feature(function, name if len(name) <= 48 else name[:45] + "...", boolean=not count)


def _texts(kind: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t for t in texts):
        hint = " In YAML, quote words such as yes, no and numbers." if not isinstance(value, str) else ""
        raise ValueError(
            f"{kind}: found {shorten(value)}, expected a text or a list of texts that are not empty.{hint}"
        )
    return list(texts)


def _longest_first(texts: list[str]) -> list[str]:
    return sorted(texts, key=len, reverse=True)  # so that counting does not take the "art" of "arts"
