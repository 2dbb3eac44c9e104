"""The shapes of published data sets: how each is recognised by its columns, and how a row of it becomes groups.

``SHAPES`` is the table. An entry says where the answers stand and where their scores do (``data/answers.py``,
``data/scores.py``); nothing else in the package knows how a data set is spelled. The first entry that finds both is how
a data set is read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from contrastive_align.data import answers, scores
from contrastive_align.data.advice import what_to_say
from contrastive_align.data.answers import Answers, InColumns, InList
from contrastive_align.data.better import Better
from contrastive_align.data.columns import (
    ABOUT,
    CONVERSATIONS,
    ROLES,
    SAMPLE,
    Naming,
    Options,
    Table,
    is_conversation,
    is_prose,
    is_turns,
    key_of,
    roles_of,
)
from contrastive_align.data.formats import NUMBERS, Parts, how_written
from contrastive_align.data.prompts import Prompt, find_prompt, join_turns, split_prompt_off
from contrastive_align.data.rows import DECIMAL_COMMA, OWN_COLUMNS, BadRow
from contrastive_align.data.scores import Ask, Scores, which_score


@dataclass(frozen=True)
class Shape:
    """One entry of the table.

    Args:
        name: as reports show it.
        known_from: published data sets that are spelled so.
        answers: where the answers may stand.
        scores: where their scores may stand; nowhere of answers that are ranked in themselves.
        pairs: a row says which answer is better, whatever numbers say by how much.
        chat: texts under this key are turns of a chat, though they are plain.
    """

    name: str
    known_from: str
    answers: tuple[type[Answers], ...]
    scores: tuple[type[Scores], ...]
    pairs: bool = False
    chat: str | None = None


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("nested", "UltraFeedback, Nectar, ELI5", (InList,), (scores.Inside,), chat="response"),
        Shape("lists", "RLHFlow, distilabel", (InList,), (scores.Beside,)),
        Shape("tree", "OASST", (answers.Tree,), ()),
        Shape(
            "wide", "WebGPT, SHP, the published NCA data", (InColumns,),
            (scores.InColumns, scores.Inside, scores.Beside),
        ),
        Shape("pairs", "UltraFeedback binarised, HH-RLHF, Orca DPO", (answers.Pair,), (scores.Rated,), pairs=True),
        Shape("last_turn", "ms-swift", (answers.LastTurn,), (scores.Rated,), pairs=True),
        Shape("compared", "HelpSteer2 preferences, Chatbot Arena, PandaLM", (InColumns, InList), (Better,), pairs=True),
        Shape("long", "HelpSteer2, KTO", (answers.OneARow,), (scores.OwnColumn, scores.Inside)),
    )
}  # fmt: skip
# Where scores of other names are looked for, and how they are asked for.
PLACES: dict[type[Answers], str] = {
    InList: "of the answers in {}",
    InColumns: "of the answers {}",
    answers.OneARow: "for one answer a row",
}


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class Reading:
    """How the rows of one data set are read."""

    shape: str  # its name in the table
    prompt: Prompt
    answers: Answers
    scores: Scores | None
    options: Options
    naming: Naming
    names: dict[str, str]  # key -> column
    read_columns: list[str]
    unread_columns: list[str]
    implicit: bool = False  # the prompt is the beginning that chosen and rejected share
    in_turns: bool = False  # prompt and answers are lists of a text for each turn
    written: str = NUMBERS  # how the scores are (see formats.how_written)
    prompt_repeats: bool = False

    @property
    def known_from(self) -> str:
        """Published data sets of this shape."""
        return SHAPES[self.shape].known_from

    @property
    def pairs(self) -> bool:
        """Whether one of two answers is the better one in each row."""
        return SHAPES[self.shape].pairs

    @property
    def joined(self) -> bool:
        """Whether a row is one answer, and the rows of a prompt are a group."""
        return self.answers.one_a_row

    @property
    def is_chat(self) -> bool:
        """Whether plain texts are turns of a chat."""
        chat = SHAPES[self.shape].chat
        return chat is not None and self.answers.text == chat

    @property
    def ratings(self) -> tuple[str, ...]:
        """The keys of ratings beside chosen and rejected."""
        return self.scores.keys if isinstance(self.scores, scores.Rated) else ()

    def prompt_columns(self) -> str:
        """Name the columns that form the prompt."""
        prompt = self.prompt
        keys = [key for key in (prompt.system, prompt.history, prompt.main, *prompt.added) if key]
        return " + ".join(f"'{self.names[key]}'" for key in keys or self.answers.keys)

    def __call__(self, values: Mapping[str, Any], where: str) -> list[Parts]:
        """Read the columns of a row, unchecked."""
        row = self.naming.by_key(values)
        if isinstance(self.answers, answers.Tree):
            return list(self.answers.groups(row, self.names, where))
        parts = self.answers.parts(row, self.names, where)
        parts.scores = self.scores.read(row, parts, self.names, where)
        if self.answers.text is not None:
            parts.completions = [
                self.answers.text_of(answer, parts.columns.completion(i), where)
                for i, answer in enumerate(parts.completions)
            ]
        found = self.prompt.read(row, where)
        if self.prompt.main is None:
            parts.columns.prompt = self.names[self.answers.keys[0]] if self.answers.holds_prompt else "prompt"
        else:
            parts.prompt, parts.columns.prompt = found["prompt"], self.names[self.prompt.main]
        parts.template, parts.system = found["template"], found["system"]
        parts.decimal_comma, parts.written = bool(values.get(DECIMAL_COMMA)), self.written
        if self.implicit:
            split_prompt_off(parts, where)
        if self.in_turns:
            join_turns(parts, where)
        return [parts]


# -------------------------------------------------------------------------------------------------------- recognising


def recognise(rows: list[Mapping[str, Any]], columns: list[str], options: Options) -> Reading:
    """Recognise the shape of a data set by its columns and a few rows.

    Args:
        rows: the first rows, which may be bad ones.
        columns: of the data set.
        options: what the user says.

    Raises:
        ValueError: no shape fits, several columns may have a role, or two columns differ in case alone; says what was
            found, what it resembles and what to type.
    """
    table, reading = _recognise(rows, columns, options)
    if reading is None:
        raise ValueError(what_to_say(table, lambda told: _recognise(rows, columns, told)[1]))
    return reading


def _recognise(rows: list[Mapping[str, Any]], columns: list[str], options: Options) -> tuple[Table, Reading | None]:
    columns = [column for column in columns if column not in OWN_COLUMNS]
    names: dict[str, str] = {}
    for column in [*options.columns.values(), *columns]:  # a column that the user names goes before one that is like it
        if column in columns:
            names.setdefault(key_of(column), column)
    alike = [column for column in columns if names[key_of(column)] != column]
    naming = Naming.of(options, names, alike)
    table = Table([naming.by_key(row) for row in rows], naming.names(names), options, naming)
    found = _find(table)
    if found is None:
        if options.score is None:
            _ask(table)
        return table, None
    shape, where, how, prompt = found
    read_keys = {*prompt.keys, *where.keys, *(how.keys if how else ())}
    read = [name for key, name in table.names.items() if key in read_keys]
    for other in alike:
        name = names[key_of(other)]
        if name in read and name not in options.columns.values():
            role = next((key for key in table.names if key in ROLES and table.names[key] == name), "prompt")
            raise Ask(
                f"The columns '{name}' and '{other}' differ in case or punctuation alone. Say which one is read: "
                f"columns='{role}={name}'."
            )
    unread = [name for name in columns if name not in read]
    reading = Reading(shape.name, prompt, where, how, options, naming, table.names, read, unread)
    reading.implicit = isinstance(where, answers.Pair) and prompt.main is None
    in_turns = all(table.mostly(key, is_turns) for key in (prompt.main, *where.keys))
    reading.in_turns = isinstance(where, InColumns) and in_turns
    seen = list(_first_parts(reading, rows))
    reading.written = how_written(score for parts in seen for score in parts.scores)
    reading.prompt_repeats = bool(seen) and all(map(_repeats_prompt, seen))
    return table, reading


def _repeats_prompt(parts: Parts) -> bool:
    texts = [parts.prompt, *parts.completions]
    return bool(parts.prompt) and all(isinstance(text, str) and text.startswith(parts.prompt) for text in texts)


Found = tuple[Shape, Answers, Scores | None, Prompt]


def _find(table: Table) -> Found | None:
    """Return the first entry that finds answers, scores and a prompt. A preference is looked for as such first."""
    hard = table.options.hard_pairs
    for shape in sorted(SHAPES.values(), key=lambda shape: hard and scores.Rated not in shape.scores):
        for where in itertools.chain.from_iterable(kind.find(table) for kind in shape.answers):
            for kind in shape.scores or (None,):
                how = kind and kind.find(table, where)
                prompt = _prompt_of(table, where, how) if how or not kind else None
                if prompt is not None:
                    return shape, where, how, prompt
    return None


def _prompt_of(table: Table, where: Answers, how: Scores | None) -> Prompt | None:
    """Return the prompt beside these answers; None where one answer a row has none."""
    prompt = find_prompt(table, {*where.keys, *(how.keys if how else ())})
    alone = replace(prompt, main=None, history=None, added=())
    if where.holds_prompt:
        return alone
    dialogues = any(table.mostly(key, _is_dialogue) for key in where.keys)
    if dialogues and prompt.main in CONVERSATIONS:
        return alone
    if prompt.main is not None or dialogues or "prompt" in table.options.columns:
        return prompt
    if where.one_a_row:
        return None
    taken = {*prompt.keys, *where.keys, *(how.keys if how else ())}
    others = [
        key for key in table.names
        if key not in taken and not ABOUT.fullmatch(key)
        and table.mostly(key, lambda v: is_prose(v) or is_conversation(v))
    ]  # fmt: skip
    shared = isinstance(where, answers.Pair)
    if others:
        or_else = ", or say that the prompt is what chosen and rejected share: columns='prompt='" if shared else ""
        raise Ask(
            f"No column is called 'prompt', and {table.listing(others)} may be the prompt. Name it with "
            f"columns='prompt={table.names[others[0]]}'{or_else}."
        )
    if not shared:
        raise ValueError(
            f"There are completions ({table.listing(where.keys)}) and no prompt: the columns are "
            f"{sorted(table.names.values())}. Name the prompt's with columns='prompt=NAME'."
        )
    return prompt


def _is_dialogue(value: Any) -> bool:
    """Whether an answer, or a list of them, is a whole dialogue."""
    lists = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    return roles_of(value[0] if lists else value)[:1] not in ([], ["assistant"])


def _first_parts(reading: Reading, rows: Iterable[Mapping[str, Any]]) -> Iterator[Parts]:
    """Yield the parts of those rows that can be read."""
    for row in rows:
        with contextlib.suppress(BadRow):
            yield from reading(row, "")


def _ask(table: Table) -> None:
    """Raise which column to name as the score, where there are answers and numbers of other names."""
    for place, words in PLACES.items():
        where = next(place.find(table), None)
        kinds = {kind: None for shape in SHAPES.values() if place in shape.answers for kind in shape.scores}
        names = [name for kind in kinds for name in kind.candidates(table, where)] if where else []
        if names and _prompt_of(table, where, None):
            raise which_score(list(dict.fromkeys(names)), words.format(table.listing(where.keys)))


def first_rows(rows: Iterable[Mapping[str, Any]], n: int = SAMPLE) -> list[Mapping[str, Any]]:
    """Return the first rows."""
    return list(itertools.islice(rows, n))
