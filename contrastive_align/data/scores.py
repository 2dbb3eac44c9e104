"""Where the scores of answers stand: inside of them, in a list, in a column each, in a word for the better one.

Each class finds its columns beside answers that are found already, takes the scores of a row out of them, and names the
columns that may be scores, but by names that do not say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contrastive_align.data.answers import Answers, InList, Names, items_of
from contrastive_align.data.columns import (
    ABOUT,
    FROM_0,
    LABELS,
    PAIR_WORDS,
    RANKS,
    SCORE_LISTS,
    SCORES,
    STRENGTHS,
    WINNERS,
    Row,
    Table,
    index_place,
    is_list,
    is_number,
    is_score,
    is_turns,
    key_of,
    negated,
    twin_of,
    words_of,
)
from contrastive_align.data.formats import LABELS as LABELLED
from contrastive_align.data.formats import Parts, how_written, listed, number_of
from contrastive_align.data.rows import FIX, BadRow, parsed, short


class Ask(ValueError):
    """What may mean several things, and is the user's to say."""


@dataclass(frozen=True)
class Scores:
    """The columns that hold the scores.

    Args:
        keys: of the columns; of scores inside of answers, none.
        name: for messages, if no column has it.
    """

    keys: tuple[str, ...]
    name: str = ""

    @classmethod
    def find(cls, table: Table, answers: Answers) -> Scores | None:
        """Find the scores of these answers by the user's word or a known name.

        Raises:
            ValueError: several have known names.
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        """Return the names of what may be the scores, and has no known name."""
        return []

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        """Return the scores of a row's answers, and add their names to the parts."""
        raise NotImplementedError


def which_score(names: list[str], where: str) -> Ask:
    """Ask which column is the score."""
    said = f"score_column={names[0]!r}"
    if len(names) == 1:
        return Ask(f"The column {names[0]!r} {where} may be the score. Say so: {said}.")
    return Ask(f"Several columns {where} may be the score: {', '.join(map(repr, names))}. Say which: {said}.")


@dataclass(frozen=True)
class Inside(Scores):
    """In answers that are objects: ``{text: .., score: ..}``, or deeper, ``{text: .., axes: {overall: ..}}``."""

    path: tuple[str, ...] = ()

    @classmethod
    def find(cls, table: Table, answers: Answers) -> Inside | None:
        if answers.text is None:
            return None
        paths, wanted = _paths(table, answers), table.options.score
        if wanted:
            found = [path for path in paths if key_of("_".join(path)) == wanted]
            found = found or [path for path in paths if f"_{key_of('_'.join(path))}".endswith(f"_{wanted}")]
        else:
            known = [
                [path for path in paths if key_of(path[-1]) == name] for name in ("overall_score", *SCORES, *RANKS)
            ]
            found = next((found for found in known if found), [])
            found = [path for path in found if len(path) == min(map(len, found))]
        if len(found) > 1:
            raise which_score(_dotted(found), f"in {table.listing(answers.keys)}")
        return cls((), ".".join(found[0]), found[0]) if found else None

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        paths = _paths(table, answers) if answers.text else []
        return _dotted([path for path in paths if not ABOUT.fullmatch(key_of(path[-1]))])

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        parts.columns.scores = self.name
        if isinstance(parts.columns.completions, list):
            parts.columns.scores = [f"{name}.{self.name}" for name in parts.columns.completions]
        scores = []
        for i, answer in enumerate(parts.completions):
            value = answer
            if not isinstance(value, Mapping):
                raise BadRow(
                    f"{where}: {parts.columns.completion(i)} is {short(value)}, expected an object with a text and "
                    f"'{self.name}'. {FIX}"
                )
            for key in self.path:
                value = value.get(key) if isinstance(value, Mapping) else None
            scores.append(negated(value, self.path[-1]))
        return scores


def _dotted(paths: list[tuple[str, ...]]) -> list[str]:
    return [".".join(path) for path in paths]


def _paths(table: Table, answers: Answers) -> list[tuple[str, ...]]:
    """Return the paths to numbers in answers that are objects."""
    found: dict[tuple[str, ...], None] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, (*path, key))
        elif path and path[0] != answers.text and (is_score(value) or (isinstance(value, str) and table.options.score)):
            found.setdefault(path)

    for key in answers.keys:
        for value in table.values(key):
            for item in items_of(value) or [value]:
                walk(item, ())
    return list(found)


@dataclass(frozen=True)
class Beside(Scores):
    """In a list of their own: ``scores: [..]``."""

    @classmethod
    def find(cls, table: Table, answers: Answers) -> Beside | None:
        wanted = table.options.score
        known = [key for key in SCORE_LISTS if key in table and key not in answers.keys and table.mostly(key, is_list)]
        if "scores" in table.several or (wanted and not (wanted in table and table.mostly(wanted, is_list))):
            return None
        if not wanted and len(known) > 1 and known[0] != "scores":
            raise which_score([table.names[key] for key in known], "beside the answers")
        key = wanted or (known[0] if known else None)
        if key is None and isinstance(answers, InList) and answers.text is None:
            key = table.first(("scores", "rewards"))
        return cls((key,)) if key else None

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        def holds(value: Any) -> bool:
            return is_list(value) and bool(value) and all(map(is_score, value))

        return [name for key, name in table.names.items() if key not in answers.keys and table.mostly(key, holds)]

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        name = parts.columns.scores = names[self.keys[0]]
        return [negated(score, name) for score in listed(row.get(self.keys[0]), name, where)]


@dataclass(frozen=True)
class InColumns(Scores):
    """In a column for each answer: ``score_1``, ``score_A0``, ``response_a_score``."""

    own: tuple[tuple[str, str | None], ...] = ()  # the column of each answer, and of its score

    @classmethod
    def find(cls, table: Table, answers: Answers) -> InColumns | None:
        if named := table.several.get("scores"):
            if len(named) != len(answers.keys):
                raise ValueError(
                    f"columns names {len(answers.keys)} columns of completions ({table.listing(answers.keys)}) and "
                    f"{len(named)} of scores ({table.listing(named)}), expected as many."
                )
            return cls(named, own=tuple(zip(answers.keys, named, strict=True)))
        if len(answers.keys) < 2:
            return None
        of_answers = next(
            (words_of(stem) for stem, own in table.families.items() if answers.keys[0] in own.values()), ""
        )
        wanted = table.options.score
        wanted = next((words_of(stem) for stem, own in table.families.items() if wanted in own.values()), wanted)
        words = (wanted,) if wanted else (*SCORES, *RANKS)
        found = {
            words_of(stem): own for stem, own in table.families.items()
            if not set(own.values()) & set(answers.keys) and set(own) & set(answers.marks)
            and any(re.search(rf"(^|_){re.escape(word)}s?(_|$)", words_of(stem)) for word in words)
        }  # fmt: skip
        exact = [
            name for word in words for name in (word, f"{word}_{of_answers}", f"{of_answers}_{word}") if name in found
        ]
        if len(found) > 1 and not exact:
            raise which_score(list(found), "in numbered columns")
        if not found:
            return None
        scores = found[exact[0] if exact else next(iter(found))]
        marks = sorted({*answers.marks, *scores}, key=index_place)
        keys = dict(zip(answers.marks, answers.keys, strict=True))
        own = [(keys.get(mark) or _sibling(table, answers, mark), scores.get(mark)) for mark in marks]
        return cls(tuple(scores.values()), own=tuple(own))

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        if len(answers.keys) < 2:
            return []
        numeric = [
            words_of(stem) for stem, own in table.families.items()
            if not ABOUT.fullmatch(words_of(stem)) and set(answers.marks) <= set(own)
            and all(key not in answers.keys and table.mostly(key, is_score) for key in own.values())
        ]  # fmt: skip
        return [words for words in numeric if words]

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        # A ragged table leaves both columns of what a short row lacks empty.
        own = [(a, s) for a, s in self.own if row.get(a) not in (None, "") or row.get(s) not in (None, "")]
        told = [names.get(a, a) for a, _ in own]
        parts.completions = [row.get(a) for a, _ in own]
        columns = parts.columns
        columns.completions = told or [f"{names[self.own[0][0]]}.."]
        columns.scores = [names[s] if s else f"score of {name}" for name, (_, s) in zip(told, own, strict=True)]
        return [negated(row.get(s), columns.scores[i]) if s else None for i, (_, s) in enumerate(own)]


def _sibling(table: Table, answers: Answers, mark: str) -> str:
    """Return the name that a column of the answers' family would have under another mark."""
    first = answers.marks[0]
    return re.sub(rf"(?i){first}(?!.*{first})", mark, table.names[answers.keys[0]])


@dataclass(frozen=True)
class Better(Scores):
    """Which answer is better: ``winner``, ``preference``, a strength, votes, or a column for each that may have won.

    Args:
        how: the function of :data:`_BETTER` that reads it.
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
        if keys[0] in STRENGTHS:
            return cls(tuple(keys), how="strength", marks=answers.marks)
        first = 1 if how == "votes" else _first_number(table, keys[0], answers, k) if how == "word" else 0
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

    def _by_votes(self, values: list[Any], marks: tuple[str, ...], what: str, *_: Any) -> list[float]:
        votes = [number_of(value, what) for value in values]
        return [float(votes.count(float(mark))) for mark in marks]

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


@dataclass(frozen=True)
class Rated(Scores):
    """Of chosen and rejected: ratings beside them (``score_chosen``, ``chosen_rating``), or (1, 0)."""

    hard: bool = False

    @classmethod
    def find(cls, table: Table, answers: Answers) -> Rated | None:
        wanted, hard = table.options.score, table.options.hard_pairs
        twins = [
            (key, twin) for better, worse in PAIR_WORDS if answers.keys[1] == twin_of(answers.keys[0], better, worse)
            for key in table.names
            if (twin := twin_of(key, better, worse)) in table and key not in answers.keys
            and (wanted in (key, twin, *key.split("_")) if wanted else set(key.split("_")) & {*SCORES, *RANKS})
            and all(table.mostly(side, is_score) or not table.values(side) for side in (key, twin))
        ]  # fmt: skip
        if len(twins) > 1 and not hard:
            raise which_score([table.names[key] for key, _ in twins], "beside the pairs")
        if wanted and not twins:
            return None
        return cls(twins[0] if twins else (), hard=hard)

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        if parts.scores or self.hard or not self.keys:  # of lists of chosen and rejected there are scores
            parts.columns.scores = "(1, 0)"
            return parts.scores or [1.0, 0.0]
        parts.columns.scores = [names[key] for key in self.keys]
        return [negated(row.get(key), key) for key in self.keys]


@dataclass(frozen=True)
class OwnColumn(Scores):
    """Of one answer a row: a column of scores, or of labels that are true or false."""

    @classmethod
    def find(cls, table: Table, answers: Answers) -> OwnColumn | None:
        known = [key for key in (*SCORES, *RANKS, *LABELS) if key not in answers.keys and table.mostly(key, is_score)]
        if table.options.score:
            known = [key for key in (table.options.score,) if key in table and key not in answers.keys]
        if len(known) > 1:
            raise which_score([table.names[key] for key in known], "for one answer a row")
        return cls(tuple(known)) if known else None

    @classmethod
    def candidates(cls, table: Table, answers: Answers) -> list[str]:
        return [
            name for key, name in table.names.items()
            if key not in answers.keys and table.mostly(key, is_score)
            and (not ABOUT.fullmatch(key) or how_written(table.values(key)) == LABELLED)
        ]  # fmt: skip

    def read(self, row: Row, parts: Parts, names: Names, where: str) -> list[Any]:
        [key] = self.keys
        parts.columns.scores = [names[key]]
        return [negated(row.get(key), names[key])]
