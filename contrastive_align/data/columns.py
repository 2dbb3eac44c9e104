"""The columns of a data set: their names free of case, how the user calls them, and what they hold."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from contrastive_align.data.messages import as_text, is_turn
from contrastive_align.data.rows import OWN_COLUMNS, BadRow, parsed, truth_of


Row = dict[str, Any]  # by key (see key_of)

# Names of columns as they are published -> what they are. Keys, see key_of.
PROMPTS = (
    "orig_instruction", "prompt", "instruction", "question", "query", "problem", "request", "user_prompt", "post",
    "input", "context",
)  # fmt: skip
CONVERSATIONS = (
    "context_messages", "messages", "conversation", "conversations", "conv", "trajectory", "dialogue", "dialog", "chat",
    "turns",
)  # fmt: skip
SYSTEMS = ("system", "system_prompt", "system_message", "sys_prompt")
ADDED = ("input", "context")  # a text that follows the prompt
ANSWERS = (
    "orig_response", "completion", "response", "answer", "output", "generation", "reply", "summary", "candidate",
    "text",
)  # fmt: skip
LISTS = (
    "completions", "responses", "answers", "all_generated_responses", "generations", "outputs", "candidates", "replies",
    "samples", "summaries", "candidates_completions",
)  # fmt: skip
TEXTS = (  # of an object that holds an answer
    "response", "text", "answer", "completion", "output", "content", "generated_text", "reply", "message",
)  # fmt: skip
SCORES = ("score", "reward", "rating", "mark", "grade", "points", "overall_score", "quality", "overall")
RANKS = ("rank", "ranks", "ranking", "rankings")  # the lowest is the best
SCORE_LISTS = (*(f"{name}s" for name in SCORES), *SCORES, *RANKS, "all_rm_scores")
LABELS = ("label", "kto_tag", "desirable", "thumbs_up", "thumbs")  # true or false
# The better and the worse of a pair; a column's name may have further words, as in chosen_response.
PAIR_WORDS = (
    ("chosen", "rejected"), ("selected", "rejected"), ("accepted", "rejected"), ("preferred", "non_preferred"),
    ("preferred", "dispreferred"), ("better", "worse"), ("best", "worst"), ("win", "lose"), ("winner", "loser"),
    ("winning", "losing"), ("positive", "negative"), ("pos", "neg"), ("good", "bad"), ("j", "k"),
)  # fmt: skip
STRENGTHS = ("preference_strength", "overall_preference")  # negative: the first, positive: the second
WINNERS = (
    "winner", "choice", "preferred", "preference", "better", "best", "better_response_id", "safer_response_id", "label",
    "orig_preference", "human_preference", "verdict", "vote", "chosen",
    *(f"{word}_{index}" for word in ("chosen", "best", "winner", "preferred") for index in ("index", "idx")),
)  # fmt: skip
FROM_0 = re.compile(r"choice|.*_(index|idx)")  # the numbers of answers in a list, which begin at 0
# Columns that say where a row is from, and are never its prompt.
ABOUT = re.compile(
    r"(.*_)?(ids?|uuid|idx|index|sources?|dataset|subset|split|category|language|lang|types?|kind|domain|task|models?|"
    r"generators?|judge|annotator|worker|batch|date|timestamp|tstamp|time|url|version|license|status|order|policy|hash|"
    r"name|tags?|metadata|meta|info|note|turn|rationales?|reason|topic|subject|seed|num_\w+)(_\d+|_[a-z])?"
)
TEMPLATE = ("tools", "chat_template_kwargs")
ROLES = (
    "prompt", "system", "history", "completions", "scores", "completion", "score", "chosen", "rejected", "tools",
    "messages", "input",
)  # fmt: skip
SEVERAL = ("prompt", "completions", "scores")  # roles that several columns may have together
SAMPLE = 64  # rows by which a shape is recognised
ORDINALS = ("first", "second", "third", "fourth", "left", "right", "one", "two", "three", "four")


@functools.lru_cache(maxsize=4096)
def key_of(name: str) -> str:
    """Return a column's name free of case and punctuation.

    >>> key_of("Chosen-Rating"), key_of("Answer 1")
    ('chosen_rating', 'answer_1')
    """
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_") or name


# ----------------------------------------------------------------------------------------------------------- the user


@dataclass(frozen=True)
class Options:
    """What a user says of the columns.

    Args:
        columns: role -> the column that has it, or several joined by ``+`` (completions, scores, or texts that form the
            prompt); an empty one says that no column has it.
        score_column: the column, or the key of nested answers, that is the score.
        hard_pairs: chosen and rejected are scores (1, 0), whatever ratings stand beside them.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    score_column: str | None = None
    hard_pairs: bool = False

    @property
    def score(self) -> str | None:
        return None if self.score_column is None else key_of(self.score_column)


def read_options(columns: Any, score_column: str | None, hard_pairs: bool = False) -> Options:
    """Return the options of a config: ``columns`` is a mapping, or text as ``prompt=question,completions=answers``.

    Raises:
        ValueError: text of another form.

    >>> read_options("prompt=question, completions=answers", None).columns
    {'prompt': 'question', 'completions': 'answers'}
    """
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
        if any(not equals or not role.strip() for role, equals, _ in pairs):
            raise ValueError(
                f"columns is {columns!r}, expected role=column, as in prompt=question,completions=answers."
            )
        columns = {role.strip(): column.strip() for role, _, column in pairs}
    return Options({str(k): "" if v is None else str(v) for k, v in (columns or {}).items()}, score_column, hard_pairs)


@dataclass(frozen=True)
class Naming:
    """Which columns have which roles, as the user says.

    Args:
        single: role -> the key of its column; None for a role that no column has.
        several: role -> the keys of several columns, which keep their names.
        ignored: columns whose key another column has.
    """

    single: Mapping[str, str | None] = field(default_factory=dict)
    several: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Options, names: Mapping[str, str], ignored: Iterable[str] = ()) -> Naming:
        """Find the columns that the user names.

        Args:
            options: what the user says.
            names: key -> column.
            ignored: further columns, whose key another one has.

        Raises:
            ValueError: there is no such column, no such role, or a column has two.
        """
        single, several = {}, {}
        for role, column in options.columns.items():
            said = f"columns='{role}={column}'"
            if role not in ROLES:
                raise ValueError(f"{said}: '{role}' is no part of a group. Parts are {', '.join(ROLES)}.")
            keys = (
                [key_of(column)]
                if key_of(column) in names or "+" not in column
                else list(map(key_of, column.split("+")))
            )
            for key in keys if column else ():
                if key not in names:
                    near = difflib.get_close_matches(key, names, 1, 0.5)
                    hint = f" Did you mean '{names[near[0]]}'?" if near else ""
                    found = f"there is no column '{key if len(keys) > 1 else column}', but {sorted(names.values())}"
                    raise ValueError(f"{said}: {found}.{hint}")
            if len(keys) == 1:
                single[role] = keys[0] if column else None
            elif role in SEVERAL:
                several[role] = tuple(keys)
            else:
                raise ValueError(f"{said}: only {' and '.join(SEVERAL)} may stand in several columns. Name one.")
        used = [key for key in (*single.values(), *(key for keys in several.values() for key in keys)) if key]
        if len(set(used)) < len(used):
            raise ValueError(f"columns={dict(options.columns)!r} gives one column two roles. Give each one.")
        return cls(single, several, tuple(ignored))

    def hides(self, key: str) -> bool:
        """Whether a row has no value under a key: its column is called by a role, or another column by its name."""
        return key in self.single or key in self.single.values() or (key in self.several and not self._keeps(key))

    def _keeps(self, key: str) -> bool:
        return any(key in keys for keys in self.several.values())

    def by_key(self, values: Mapping[str, Any]) -> Row:
        """Return a row's values by key, the columns that the user names under their roles."""
        left_out = (*OWN_COLUMNS, *self.ignored)
        row = {key_of(name): value for name, value in values.items() if name not in left_out}
        if not self.single and not self.several:
            return row
        named = {role: row.get(key) for role, key in self.single.items() if key}
        return {key: value for key, value in row.items() if not self.hides(key)} | named

    def names(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return key -> column, those that the user names under their roles."""
        told = {role: names[key] for role, key in self.single.items() if key}
        return {key: name for key, name in names.items() if not self.hides(key)} | told


# -------------------------------------------------------------------------------------------------- what columns hold


class Table:
    """The columns of a few rows, by key, and what they hold."""

    def __init__(self, rows: list[Row], names: dict[str, str], options: Options, naming: Naming | None = None) -> None:
        self.rows, self.names, self.options = rows, names, options
        self.several = naming.several if naming else {}
        self._values: dict[str, list[Any]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def first(self, keys: Iterable[str]) -> str | None:
        return next((key for key in keys if key in self.names), None)

    def values(self, key: str) -> list[Any]:
        """Return the values of a column, parsed where they are JSON text, without empty ones."""
        if key not in self._values:
            found = self._values[key] = []
            for row in self.rows:
                with contextlib.suppress(BadRow):
                    found.append(parsed(row.get(key)))
            found[:] = [value for value in found if value is not None and value != ""]
        return self._values[key]

    def mostly(self, key: str | None, what: Callable[[Any], bool]) -> bool:
        """Whether the rows that have a value mostly have such a one; a bad row does not decide."""
        values = self.values(key) if key in self.names else []
        return bool(values) and 2 * sum(map(what, values)) > len(values)

    def listing(self, keys: Iterable[str]) -> str:
        return ", ".join(f"'{self.names[key]}'" for key in keys)

    @functools.cached_property
    def families(self) -> dict[str, dict[str, str]]:
        """Stem -> index -> key, of columns whose names differ in a number, a letter or an ordinal alone.

        In the stem ``#`` stands for a number, ``@`` for a letter, ``&`` for an ordinal.
        """
        found: dict[str, dict[str, str]] = {}
        for key in self.names:
            words = re.findall(r"\d+|[^\W\d_]+", key)
            for i, word in enumerate(words):
                kind = (
                    "#" if word.isdigit() else "&" if word in ORDINALS else "@" if re.fullmatch("[a-z]", word) else ""
                )
                stem = "_".join([*words[:i], kind, *words[i + 1 :]])
                other = found.setdefault(stem, {}).setdefault(word, key) if kind else key
                if other != key:
                    raise ValueError(
                        f"The columns {self.listing([other, key])} have one number. Say which are the answers and "
                        f"which their scores: columns='completions={self.names[other]}+NAME,scores=NAME+NAME'."
                    )
        in_order = {
            stem: dict(sorted(own.items(), key=lambda item: index_place(item[0]))) for stem, own in found.items()
        }
        return {stem: own for stem, own in in_order.items() if len(own) > 1}


def index_place(index: str) -> tuple[int, int, str]:
    """Return the place of a number, letter or ordinal among others, to sort by."""
    return (ORDINALS.index(index) if index in ORDINALS else 0, len(index), index)


def words_of(stem: str) -> str:
    """Return the words of a family's stem."""
    return "_".join(word for word in stem.split("_") if word not in "#@&")


def twin_of(key: str, better: str, worse: str) -> str | None:
    """Return a column's name with the word for the worse in the place of that for the better.

    >>> twin_of("chosen_rating", "chosen", "rejected"), twin_of("score", "chosen", "rejected")
    ('rejected_rating', None)
    """
    twin = re.sub(rf"(^|_){better}(_|$)", rf"\1{worse}\2", key, count=1)
    return None if twin == key else twin


def negated(score: Any, name: str) -> Any:
    """Return minus a rank, which may be a cell's text; of a column of another name the score as it is."""
    if not set(key_of(name).split("_")) & set(RANKS) or not is_number(score) or isinstance(score, bool):
        return score
    if isinstance(score, str):
        return score.strip()[1:] if score.strip().startswith("-") else f"-{score.strip()}"
    return -score


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or the text of one."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[+-]?\d*[.,]?\d+%?", value.strip()))
    return isinstance(value, int | float)


def is_score(value: Any) -> bool:
    """Return whether a value is a number or a truth, or the text of one."""
    return is_number(value) or truth_of(value) is not None


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_prose(value: Any) -> bool:
    """Return whether a value is text, and not that of a number."""
    return isinstance(value, str) and not is_number(value)


def is_list(value: Any) -> bool:
    """Return whether a value is a list."""
    return isinstance(value, list)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a message or a list of messages."""
    return is_turn(value) or (isinstance(value, list) and bool(value) and all(map(is_turn, value)))


def is_turns(value: Any) -> bool:
    """Return whether a value is a list of texts, one for each turn."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, str) for turn in value)


def is_object(value: Any) -> bool:
    """Return whether a value is an object, and no message."""
    return isinstance(value, Mapping) and not is_turn(value)


def is_answer(value: Any) -> bool:
    """Return whether a value may be an answer."""
    return isinstance(value, str | int | float) or is_conversation(value)


def roles_of(value: Any) -> list[Any]:
    """Return the roles of a conversation; none of what is no conversation, or a bad one."""
    try:
        turns = as_text(value, "") if is_conversation(value) else []
    except BadRow:
        return []
    return [turn["role"] for turn in turns] if isinstance(turns, list) else []


def asks(value: Any) -> bool:
    """Whether a conversation ends with a turn to answer."""
    roles = roles_of(value)
    return bool(roles) and roles[-1] != "assistant"


def is_answered(value: Any) -> bool:
    """Whether a conversation ends with an answer."""
    roles = roles_of(value)
    return len(roles) > 1 and roles[-1] == "assistant"
