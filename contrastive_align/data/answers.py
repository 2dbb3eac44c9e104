"""Where the answers of a row stand: in a list, in a column each, as chosen and rejected, or one a row.

Each class finds its columns among those of a few rows, and takes the answers of a row out of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from contrastive_align.data.columns import (
    ABOUT,
    ANSWERS,
    CONVERSATIONS,
    LISTS,
    PAIR_WORDS,
    PROMPTS,
    RANKS,
    SCORES,
    TEXTS,
    Row,
    Table,
    is_answer,
    is_answered,
    is_conversation,
    is_list,
    is_object,
    is_prose,
    is_turns,
    negated,
    twin_of,
    words_of,
)
from contrastive_align.data.formats import Columns, Parts, listed
from contrastive_align.data.messages import as_text, is_messages
from contrastive_align.data.rows import FIX, BadRow, parsed, short


Names = Mapping[str, str]  # key -> column


@dataclass(frozen=True)
class Answers:
    """The columns that hold the answers.

    Args:
        keys: of the columns.
        marks: what other columns call the answers, such as a and b; of a list their number is not known.
        text: of answers that are objects, the key of the text.
        holds_prompt: the answers are the ends of conversations, whose beginnings are the prompt.
        one_a_row: the rows of a prompt are a group.
    """

    keys: tuple[str, ...]
    marks: tuple[str, ...] = ()
    text: str | None = None
    holds_prompt: bool = False
    one_a_row: bool = False

    @classmethod
    def find(cls, table: Table) -> Iterator[Answers]:
        """Yield where the answers may stand, the most probable first."""
        raise NotImplementedError

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        """Return the answers of a row, which may be objects, and their names; the prompt is None if it is elsewhere."""
        raise NotImplementedError

    def text_of(self, answer: Any, name: str, where: str) -> Any:
        """Return the text of an answer."""
        if self.text is None:
            return answer
        if not isinstance(answer, Mapping):
            raise BadRow(f"{where}: {name} is {short(answer)}, expected an object with '{self.text}'. {FIX}")
        return answer.get(self.text)

    def cell(self, row: Row, key: str, names: Names, where: str) -> Any:
        """Return an answer that has a cell of its own, which may hold an object as JSON."""
        return row.get(key) if self.text is None else parsed(row.get(key), f"{where}: '{names[key]}'")


def _text_key(answers: list[Any]) -> str | None:
    """Return the key of the text in answers that are mostly objects, "" if they have none; None for other answers."""
    objects = [answer for answer in answers if is_object(answer)]
    if not objects or 2 * len(objects) < len(answers):
        return None
    return next((key for key in TEXTS if any(answer.get(key) is not None for answer in objects)), "")


@dataclass(frozen=True)
class InList(Answers):
    """``completions: [..]``, of texts, conversations or objects.

    Args:
        as_object: the list of objects stands as one object of lists, ``answers: {text: [..], score: [..]}``.
    """

    as_object: bool = False

    @classmethod
    def find(cls, table: Table) -> Iterator[InList]:
        """Yield the columns of lists with a known name."""
        if "completions" in table.several:
            return
        lists = [key for key in LISTS if table.mostly(key, lambda value: items_of(value) is not None)]
        for key in lists or [key for key in ("completions", "responses") if key in table]:
            text = _text_key([item for value in table.values(key) for item in items_of(value) or ()])
            if text != "":
                yield cls((key,), text=text, as_object=table.mostly(key, is_object))

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        key = self.keys[0]
        value = row.get(key)
        if self.as_object:
            value = parsed(value, f"{where}: '{names[key]}'")
            if items_of(value) is None or is_list(value):
                raise BadRow(
                    f"{where}: '{names[key]}' is {short(value)}, expected an object of lists, all as long. {FIX}"
                )
            value = items_of(value)
        return Parts(None, listed(value, names[key], where), [], Columns("", names[key], ""))


def items_of(value: Any) -> list[Any] | None:
    """Return the items of a list, or of an object of lists that are all as long; None for any other value.

    >>> items_of({"text": ["a", "b"], "score": [1, 2]})
    [{'text': 'a', 'score': 1}, {'text': 'b', 'score': 2}]
    """
    if is_list(value):
        return value
    lists = list(value.values()) if is_object(value) else []
    if not lists or not all(map(is_list, lists)) or len({len(each) for each in lists}) > 1:
        return None
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]


@dataclass(frozen=True)
class InColumns(Answers):
    """``answer_1``, ``answer_2``, ..; ``A0``, ``A1``, ..; ``human_ref_A``, ``first_response``, ``model_a_answer``."""

    @classmethod
    def find(cls, table: Table) -> Iterator[InColumns]:
        """Yield the family of columns that holds answers, or the columns that the user names."""
        if named := table.several.get("completions"):
            yield cls(named)
            return
        holding = {stem: own for stem, own in table.families.items() if _hold_answers(table, own)}
        known = [stem for stem in holding if _names_answers(stem)]
        others = [
            stem
            for stem in holding
            if _may_name_answers(stem) and any(table.mostly(k, is_prose) for k in holding[stem].values())
        ]
        for stem in sorted(known, key=lambda stem: stem.count("_")) or others:
            own = holding[stem]
            text = _text_key([value for key in own.values() for value in table.values(key)])
            yield cls(tuple(own.values()), tuple(own), text=text)

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        columns = Columns("", [names[key] for key in self.keys], "")
        return Parts(None, [self.cell(row, key, names, where) for key in self.keys], [], columns)


def _hold_answers(table: Table, own: Mapping[str, str]) -> bool:
    def holds(value: Any) -> bool:
        return is_answer(value) or is_turns(value) or bool(_text_key([value]))

    return all(table.mostly(key, holds) or not table.values(key) for key in own.values())


def _names_answers(stem: str) -> bool:
    words = words_of(stem)
    return stem == "a_#" or bool(re.fullmatch(rf"(.*_)?({'|'.join((*ANSWERS, *CONVERSATIONS))})s?", words))


def _may_name_answers(stem: str) -> bool:
    words = words_of(stem)
    return not ABOUT.fullmatch(words) and not set(words.split("_")) & {*SCORES, *PROMPTS, *RANKS, "annotator", "winner"}


@dataclass(frozen=True)
class Pair(Answers):
    """``chosen`` and ``rejected``, an answer each or a list of them; ``response_j``, ``preferred_output``, .."""

    several: bool = False

    @classmethod
    def find(cls, table: Table) -> Iterator[Pair]:
        """Yield the pair of columns whose names differ in the words for better and worse."""
        pairs = [
            (key, twin) for better, worse in PAIR_WORDS for key in table.names
            if (twin := twin_of(key, better, worse)) in table and (key == "chosen" or _may_be_pair(table, key, twin))
        ]  # fmt: skip
        exact = [pair for pair in pairs if len(pair[0].split("_")) == 1]
        known = [pair for pair in pairs if set(pair[0].split("_")) & {*ANSWERS, *CONVERSATIONS}]
        if not exact and len(known or pairs) > 1:
            shown = " and ".join(table.listing(pair) for pair in known or pairs)
            a, b = (table.names[key] for key in (known or pairs)[0])
            raise ValueError(
                f"The pairs of columns {shown} may each be the answers. Say which: columns='chosen={a},rejected={b}'."
            )
        for pair in [*exact, *known, *pairs][:1]:
            others = any(True for kind in (InList, InColumns) for _ in kind.find(table))
            if table.options.score in pair:
                return
            if others and table.mostly(pair[0], _is_label):
                raise ValueError(
                    f"{table.listing(pair)} hold labels of answers, such as {short(table.values(pair[0])[0])}, and not "
                    f"answers. If that one is better than all others, say score_column='{table.names[pair[0]]}'."
                )
            yield cls(pair, several=any(table.mostly(key, _several) for key in pair))

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        for key in self.keys:
            if row.get(key) is None:
                raise BadRow(f"{where}: '{names[key]}' is missing. Fill it in or drop the row (on_bad_row='drop').")
        # A table's cells are JSON.
        sides = [parsed(row[key], where) if self.several else row[key] for key in self.keys]
        told = [names[key] for key in self.keys]
        if not any(map(_several, sides)):
            return Parts(None, sides, [], Columns("", told, ""))
        sides = [value if _several(value) else [value] for value in sides]
        own = [f"{name}[{i}]" for name, side in zip(told, sides, strict=True) for i in range(len(side))]
        scores = [1.0] * len(sides[0]) + [0.0] * len(sides[1])
        return Parts(None, [*sides[0], *sides[1]], scores, Columns("", own, "(1, 0)"))


def _may_be_pair(table: Table, *keys: str) -> bool:
    def holds(value: Any) -> bool:
        return is_prose(value) or is_conversation(value) or _several(value)

    return not any(ABOUT.fullmatch(key) for key in keys) and all(table.mostly(key, holds) for key in keys)


def _is_label(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and bool(re.fullmatch(r"\d|[A-Ha-h]", value.strip())))


def _several(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not is_conversation(value)


@dataclass(frozen=True)
class LastTurn(Answers):
    """``messages`` that end with the answer, and what is rejected beside them."""

    holds_prompt: bool = True

    @classmethod
    def find(cls, table: Table) -> Iterator[LastTurn]:
        """Yield a conversation that ends with an answer, and the rejected one."""
        talk = _answered(table)
        rejected = next((key for key in table.names if "rejected" in key.split("_") and _may_be_pair(table, key)), None)
        if talk and rejected and "chosen" not in table:
            yield cls((talk, rejected))

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        talk, rejected = self.keys
        prompt, answer = last_turn(row.get(talk), f"{where}: '{names[talk]}'")
        other = as_text(row.get(rejected), f"{where}: '{names[rejected]}'")
        if isinstance(other, list) and other[: len(prompt)] == prompt:
            other = other[len(prompt) :]
        return Parts(prompt, [answer, other], [], Columns("", [names[talk], names[rejected]], ""))


def _answered(table: Table) -> str | None:
    return next((key for key in CONVERSATIONS if table.mostly(key, is_answered)), None)


def last_turn(value: Any, what: str) -> tuple[Any, Any]:
    """Split a conversation into what comes before its last turn, and that.

    Raises:
        BadRow: it is none, or does not end with an answer.
    """
    turns = as_text(value, what)
    if not is_messages(turns) or len(turns) < 2 or turns[-1].get("role") != "assistant":
        raise BadRow(f"{what} is {short(turns)}, expected messages that end with the answer. {FIX}")
    return turns[:-1], turns[-1:]


@dataclass(frozen=True)
class OneARow(Answers):
    """``completion``, or ``messages`` that end with it; the rows of a prompt are a group."""

    one_a_row: bool = True

    @classmethod
    def find(cls, table: Table) -> Iterator[OneARow]:
        """Yield a column of answers, or of conversations that end with them."""
        for key in ANSWERS:
            text = _text_key(table.values(key)) if key in table else None
            if text or table.mostly(key, is_answer):
                yield cls((key,), text=text)
        if talk := _answered(table):
            yield cls((talk,), holds_prompt=True)

    def parts(self, row: Row, names: Names, where: str) -> Parts:
        [key] = self.keys
        columns = Columns("", [names[key]], "")
        if self.holds_prompt:
            prompt, answer = last_turn(row.get(key), f"{where}: '{names[key]}'")
            return Parts(prompt, [answer], [], columns)
        return Parts(None, [self.cell(row, key, names, where)], [], columns)


@dataclass(frozen=True)
class Tree(Answers):
    """Messages with their ``replies``, of which siblings are ranked: a group for each message with two of them."""

    @classmethod
    def find(cls, table: Table) -> Iterator[Tree]:
        """Yield the column of trees.

        Raises:
            ValueError: the rows are messages, and name those that they answer.
        """
        for key in ("prompt", "tree"):
            if table.mostly(key, lambda v: isinstance(v, Mapping) and "replies" in v):
                yield cls((key,), holds_prompt=True)
        if {"message_id", "parent_id", "text", "role"} <= set(table.names):
            raise ValueError(
                f"The rows are messages that answer each other ({table.listing(['parent_id'])} names the "
                f"{table.listing(['message_id'])} of another row), expected trees: rows of a 'prompt' with its "
                "'replies'. Data of this kind has files of them, which end in .trees.jsonl.gz: give such a file."
            )

    def groups(self, row: Row, names: Names, where: str) -> Iterator[Parts]:
        """Yield the groups of a tree.

        Raises:
            BadRow: there is none.
        """
        [key] = self.keys
        columns = Columns(names[key], "replies", "rank")
        nodes: list[tuple[Any, list[dict[str, Any]]]] = [(parsed(row.get(key), where), [])]
        found = False
        while nodes:
            node, before = nodes.pop(0)
            replies = node.get("replies") or [] if isinstance(node, Mapping) else None
            if not isinstance(replies, list):
                raise BadRow(f"{where}: '{names[key]}' has {short(node)}, expected a message with its replies. {FIX}")
            thread = [*before, *as_text({"role": node.get("role"), "content": node.get("text")}, where)]
            ranked = [reply for reply in replies if isinstance(reply, Mapping) and reply.get("rank") is not None]
            if thread[-1]["role"] == "user" and len(ranked) > 1:
                answers = [[{"role": "assistant", "content": reply.get("text")}] for reply in ranked]
                yield Parts(thread, answers, [negated(reply["rank"], "rank") for reply in ranked], columns)
                found = True
            nodes = [*((reply, thread) for reply in replies), *nodes]
        if not found:
            raise BadRow(f"{where}: no message has two ranked replies. Drop the row (on_bad_row='drop').")
