"""Where the scores of answers stand: inside of them, in a list, in a column each, beside a pair, or one a row.

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
    LABELS,
    PAIR_WORDS,
    RANKS,
    SCORE_LISTS,
    SCORES,
    Row,
    Table,
    index_place,
    is_list,
    is_score,
    key_of,
    negated,
    twin_of,
    words_of,
)
from contrastive_align.data.formats import LABELS as LABELLED
from contrastive_align.data.formats import Parts, how_written, listed
from contrastive_align.data.rows import FIX, BadRow, short


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
        for i, value in enumerate(parts.completions):
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
            and (f"_{wanted}_" in f"_{key}_{twin}_" if wanted else set(key.split("_")) & {*SCORES, *RANKS})
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
