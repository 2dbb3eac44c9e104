"""Which of several answers is better: a word, a number, a strength, votes, or a column for each that may have won."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from contrastive_align.data.answers import Answers, Names
from contrastive_align.data.columns import (
    ABOUT,
    FROM_0,
    RANKS,
    STRENGTHS,
    WINNERS,
    Row,
    Table,
    is_list,
    is_number,
    is_score,
    is_turns,
)
from contrastive_align.data.formats import Parts, number_of
from contrastive_align.data.rows import FIX, BadRow, parsed, short
from contrastive_align.data.scores import Scores, which_score


@dataclass(frozen=True)
class Better(Scores):
    """Which answer is better: ``winner``, ``preference``, a strength, votes, or a column for each that may have won.

    Args:
        how: ``"word"``, also of a number, ``"strength"``, ``"votes"`` or ``"won"``.
        marks: what the columns call the answers; none of answers in a list, which are called by number.
        first: the number of the first answer.
        beside: what stands beside each answer, such as the models' names: families of columns, or columns of lists.
    """

    how: str = "word"
    marks: tuple[str, ...] = ()
    first: int = 0
    beside: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def find(cls, table: Table, answers: Answers) -> Better | None:
        k = _how_many(table, answers)
        votes = [key for key in table.names if re.fullmatch(r"annotator_?\d+", key) and table.mostly(key, is_number)]
        won = [key for key in table.names if _WON.fullmatch(key) and table.mostly(key, is_score)]
        known = [
            key for key in (*STRENGTHS, *WINNERS) if key in table and key not in answers.keys and table.values(key)
        ]
        known += [key for key in RANKS if table.mostly(key, lambda v: isinstance(v, str) and bool(set("<>") & set(v)))]
        if table.options.score:
            keys, how = [key for key in (table.options.score,) if key in table], "word"
        elif len(won) > 1:
            keys, how = won, "won"
        elif len(votes) > 1:
            keys, how = votes, "votes"
        else:
            keys, how = known, "word"
        if len(keys) > 1 and keys is known:
            raise which_score([table.names[key] for key in keys], "for the better of the answers")
        if k < 2 or not keys or (k > 2 and (keys[0] in STRENGTHS or how == "votes")):
            return None
        if how == "votes" and answers.marks[:1] != ("1",):
            return None
        if keys[0] in STRENGTHS:
            return cls(tuple(keys), how="strength", marks=answers.marks)
        first = _first_number(table, keys[0], answers, k) if how == "word" else 0
        beside = [tuple(own.values()) for own in table.families.values() if tuple(own) == answers.marks]
        if not answers.marks:
            beside = [(key,) for key in table.names if key not in answers.keys and table.mostly(key, is_turns)]
        return cls(tuple(keys), how=how, marks=answers.marks, first=first, beside=tuple(beside))

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        k = _how_many(table, answers)
        marks = answers.marks or tuple(map(str, range(k)))
        taken = {*answers.keys, *(key for own in table.families.values() for key in own.values())}

        def decides(value: Any) -> bool:
            return better_by_word(value, marks, *(int(mark) for mark in marks[:1] if mark.isdigit())) is not None

        return [
            name for key, name in table.names.items()
            if marks and k > 1 and key not in taken and not ABOUT.fullmatch(key)
            and table.values(key) and all(map(decides, table.values(key)))
        ]  # fmt: skip

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[float]:
        k, name = len(parts.completions), " and ".join(names[key] for key in self.keys)
        parts.columns.scores = [name] * k
        values, what = [row.get(key) for key in self.keys], f"{where}: '{name}'"
        marks = self.marks or tuple(str(i + self.first) for i in range(k))
        scores = getattr(self, f"_by_{self.how}")(values, marks, what, row, parts)
        if scores is None:
            expected = " or ".join(map(repr, marks))
            raise BadRow(f"{what} is {short(values[0])}, expected {expected}, the better answer, or 'tie'. {FIX}")
        return scores

    def _by_strength(self, values: list[Any], marks: tuple[str, ...], what: str, *_: Any) -> list[float]:
        strength = number_of(values[0], what)
        return [max(-strength, 0.0), max(strength, 0.0)]

    def _by_votes(self, values: list[Any], marks: tuple[str, ...], what: str, *_: Any) -> list[float] | None:
        votes, numbers = [number_of(value, what) for value in values], list(map(float, marks))
        if not set(votes) <= {0.0, *numbers}:  # 0: a tie
            return None
        return [float(votes.count(number)) for number in numbers]

    def _by_won(self, values: list[Any], marks: tuple[str, ...], what: str, *_: Any) -> list[float] | None:
        won = [key for key, value in zip(self.keys, values, strict=True) if number_of(value, what) == 1]
        if len(won) != 1:
            raise BadRow(f"{what}: {len(won)} of these are 1, expected one. {FIX}")
        return better_by_word(won[0].split("_")[-1], marks)

    def _by_word(
        self, values: list[Any], marks: tuple[str, ...], what: str, row: Row, parts: Parts
    ) -> list[float] | None:
        value = values[0]
        scores = better_by_word(value, marks, self.first)
        if scores is None and isinstance(value, str):  # the answer itself, or what stands beside it
            columns = [[row.get(key) for key in keys] for keys in self.beside]
            several = [cells if len(cells) > 1 else parsed(cells[0]) for cells in columns]
            for each in [parts.completions, *several]:
                if isinstance(each, list) and len(each) == len(marks) and each.count(value) == 1:
                    return [float(other == value) for other in each]
        return scores


_WON = re.compile(r"winner_(.+_)?([a-h]|tie|\d)")


def _how_many(table: Table, answers: Answers) -> int:
    """Return how many answers a row has; of lists, the longest one's."""
    lists = [len(value) for value in table.values(answers.keys[0]) if is_list(value)]
    return len(answers.keys) if len(answers.keys) > 1 else max(lists, default=0)


def _first_number(table: Table, key: str, answers: Answers, k: int) -> int:
    """Return the number by which a column calls the first answer: that of its name, or what the numbers there tell.

    Raises:
        ValueError: they do not tell it.
    """
    numbers = {
        float(v.replace(",", ".")) if isinstance(v, str) else float(v) for v in table.values(key) if is_number(v)
    }
    levels, marks = {int(n) for n in numbers if n.is_integer() and 0 <= n <= k}, answers.marks
    named = int(marks[0]) if marks and marks[0].isdigit() else 0 if FROM_0.fullmatch(key) and not marks else None
    if not levels or (named == 0 and (0 in levels or levels == {1})) or (named == 1 and 0 not in levels):
        return named or 0
    if named is None and k in levels and 0 not in levels:
        return 1
    if not marks and 0 in levels:
        return 0
    shown = ", ".join(str(level) for level in sorted(levels))
    expected = f"{' or '.join(map(repr, marks))}, the better answer," if marks else "the text of the better answer,"
    places = "+".join(table.names[key] for key in answers.keys)
    hint = f" If they are the places of the answers, say so: columns='completions={places}'." if marks else ""
    raise ValueError(
        f"'{table.names[key]}' says which answer is better by numbers ({shown}) that do not tell whether the first "
        f"is 0 or 1, expected {expected} or 'tie'.{hint}"
    )


def better_by_word(value: Any, marks: tuple[str, ...], first: int = 0) -> list[float] | None:
    """Return the scores of answers by what a column says of the better one; None for what is not known.

    >>> better_by_word("model_a", ("a", "b")), better_by_word("B>>A", ("a", "b")), better_by_word("1.0", ("0", "1"))
    ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0])
    >>> better_by_word("both_bad", ("a", "b")), better_by_word("B > A = C", ("a", "b", "c"))
    ([0.5, 0.5], [0.0, 1.0, 0.0])
    """
    k = len(marks)
    if isinstance(value, bool):
        return None
    if is_number(value):
        place = float(value.replace(",", ".") if isinstance(value, str) else value) - first
        if place.is_integer() and 0 <= place < k:
            return [float(i == place) for i in range(k)]
        return [1 - place, place] if k == 2 and first == 1 and 0 < place < 1 else None  # from 1, the first, to 2
    names = {word: i for i, word in [*enumerate(("first", "second", "third", "fourth")[:k]), (0, "left"), (1, "right")]}
    if marks[0].isdigit():
        names |= {"abcdefgh"[i]: i for i in range(min(k, 8))}
    names |= {mark: i for i, mark in enumerate(marks)}
    text = re.sub(r"[\s_]+", " ", value.strip().lower()) if isinstance(value, str) else ""
    if re.fullmatch(r"(tie|both|neither|equal|draw|same)\b.*", text):
        return [0.5] * k
    words = re.split(r" ?(>+|<+|=+) ?", text)
    order, signs = words[::2], "".join(words[1::2])
    if signs:
        if len({*signs} - {"="}) > 1 or sorted(names.get(word, -1) for word in order) != list(range(k)):
            return None
        levels = [sum(sign[0] != "=" for sign in words[1 : 2 * i : 2]) for i in range(k)]
        best, level = max(levels), {names[word]: level for word, level in zip(order, levels, strict=True)}
        better = [float(level[i] if "<" in signs else best - level[i]) for i in range(k)]
        return better if best else [0.5] * k
    things = "model|response|answer|output|option|assistant|candidate|completion|summary|conversation|text"
    named = re.fullmatch(rf"(?:(?:{things}) ?)?(\w+)", text)
    return [float(i == names[named[1]]) for i in range(k)] if named and named[1] in names else None
