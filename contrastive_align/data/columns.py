"""The columns of a data set: their names free of case, what they hold, and which of them form the prompt."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from contrastive_align.data.messages import as_text, is_turn
from contrastive_align.data.rows import FIX, BadRow, parsed, short


Row = dict[str, Any]  # by key (see key_of)

# Names of columns as they are published -> what they are. Keys, see key_of.
PROMPTS = (
    "orig_instruction",
    "prompt",
    "instruction",
    "question",
    "query",
    "problem",
    "request",
    "user_prompt",
    "post",
    "input",
    "context",
)
CONVERSATIONS = (
    "context_messages",
    "messages",
    "conversation",
    "conversations",
    "trajectory",
    "dialogue",
    "dialog",
    "chat",
    "turns",
)
SYSTEMS = ("system", "system_prompt", "system_message", "sys_prompt")
ADDED = ("input", "context")  # a text that follows the prompt
ANSWERS = (
    "orig_response",
    "completion",
    "response",
    "answer",
    "output",
    "generation",
    "reply",
    "summary",
    "candidate",
    "text",
)
LISTS = (
    "completions",
    "responses",
    "answers",
    "generations",
    "outputs",
    "candidates",
    "replies",
    "samples",
    "summaries",
)
SCORES = ("score", "reward", "rating", "mark", "grade", "points", "overall_score", "quality")
RANKS = ("rank", "ranks", "ranking", "rankings")  # the lowest is the best
SCORE_LISTS = (*(f"{name}s" for name in SCORES), *SCORES, *RANKS)
LABELS = ("label",)  # true or false
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_answer", "rejected_answer"),
    ("response_j", "response_k"), ("response_chosen", "response_rejected"), ("preferred", "dispreferred"),
    ("accepted", "rejected"), ("better", "worse"),
    ("win", "lose"), ("winner_response", "loser_response"), ("positive", "negative"), ("good", "bad"),
)  # fmt: skip
STRENGTHS = ("preference_strength", "overall_preference")  # negative: the first, positive: the second
WINNERS = (
    "winner", "choice", "preferred", "preference", "better", "best", "better_response_id", "safer_response_id", "label",
    "orig_preference", "human_preference", "chosen_index", "verdict", "vote",
)  # fmt: skip
TREE = ("replies",)
# Columns that say where a row is from, and are never its prompt.
ABOUT = re.compile(
    r"(.*_)?(ids?|uuid|idx|index|sources?|dataset|subset|split|category|language|lang|types?|kind|domain|task|models?|"
    r"generators?|judge|annotator|worker|batch|date|timestamp|tstamp|time|url|version|license|status|order|policy|hash|"
    r"name|tags?|metadata|meta|info|note|turn|rationales?|reason|topic)(_\d+|_[a-z])?"
)
TEMPLATE = ("tools", "chat_template_kwargs")
ROLES = (
    "prompt", "system", "history", "completions", "scores", "completion", "score", "chosen", "rejected", "tools",
    "messages", "input",
)  # fmt: skip
SAMPLE = 64  # rows by which a shape is recognised


def key_of(name: str) -> str:
    """Return a column's name free of case and punctuation.

    >>> key_of("Chosen-Rating"), key_of("Answer 1")
    ('chosen_rating', 'answer_1')
    """
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_") or name


@dataclass(frozen=True)
class Options:
    """What a user says of the columns.

    Args:
        columns: role -> the column that has it; an empty one says that no column has it.
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


class Table:
    """The columns of a few rows, by key, and what they hold."""

    def __init__(self, rows: list[Row], names: dict[str, str], options: Options) -> None:
        self.rows, self.names, self.options = rows, names, options

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def first(self, keys: Iterable[str]) -> str | None:
        return next((key for key in keys if key in self.names), None)

    def values(self, key: str) -> list[Any]:
        found = []
        for row in self.rows:
            with contextlib.suppress(BadRow):
                found.append(parsed(row.get(key)))
        return [value for value in found if value is not None and value != ""]

    def mostly(self, key: str | None, what: Callable[[Any], bool]) -> bool:
        """Whether the rows that have a value mostly have such a one; a bad row does not decide."""
        values = self.values(key) if key in self.names else []
        return bool(values) and 2 * sum(map(what, values)) > len(values)

    def listing(self, key: str) -> str:
        return f"'{self.names[key]}'"


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or the text of one."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[+-]?\d*[.,]?\d+", value.strip()))
    return isinstance(value, int | float)


def is_score(value: Any) -> bool:
    """Return whether a value is a number or a truth, or the text of one."""
    return is_number(value) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Return whether a value is a list."""
    return isinstance(value, list)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a message or a list of messages."""
    return is_turn(value) or (isinstance(value, list) and bool(value) and all(map(is_turn, value)))


def is_turns(value: Any) -> bool:
    """Return whether a value is a list of texts, one for each turn."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, str) for turn in value)


def is_answer(value: Any) -> bool:
    """Return whether a value may be an answer."""
    return isinstance(value, str | int | float) or is_conversation(value)


# ------------------------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompt:
    """The columns that form a prompt."""

    main: str | None
    system: str | None = None
    history: str | None = None
    added: tuple[str, ...] = ()
    template: tuple[str, ...] = ()

    @property
    def keys(self) -> set[str]:
        return {key for key in (self.main, self.system, self.history, *self.added, *self.template) if key}

    def read(self, row: Row, where: str) -> dict[str, Any]:
        """Return the arguments of :class:`Parts` that the prompt gives."""
        template = {key: row.get(key) for key in self.template}
        found = {"template": template, "system": row.get(self.system) if self.system else None}
        prompt = parsed_prompt(row.get(self.main), f"{where}: '{self.main}'") if self.main else None
        for key in self.added:
            prompt = _with_added(prompt, row.get(key), f"{where}: '{key}'")
        turns = row.get(self.history) if self.history else None
        return {**found, "prompt": _with_history(prompt, turns, f"{where}: '{self.history}'") if turns else prompt}


def find_prompt(table: Table, taken: Iterable[str] = ()) -> Prompt:
    """Find the columns of the prompt among those that are not ``taken``."""
    taken = set(taken)
    free = [key for key in table.names if key not in taken]
    candidates = [key for key in (*PROMPTS, "history") if key in free and (table.values(key) or key == "prompt")]
    talks = [key for key in CONVERSATIONS if key in free and table.mostly(key, asks)]
    main = next((key for key in candidates if key != "history" or table.mostly(key, is_text)), None)
    main = main or next((key for key in PROMPTS if key in free), None)  # all rows are empty: each is refused by name
    if talks and main not in ("prompt", "instruction", "question"):
        main = talks[0]
    elif talks and main:
        ends = [_last_text(row.get(talks[0])) == row.get(main) for row in table.rows if row.get(talks[0]) is not None]
        if 2 * sum(ends) <= len(ends):
            raise ValueError(_which_prompt([talks[0], main], table))
        main = talks[0]
    others = [key for key in ("question", "query", "problem") if key in candidates and key != main]
    if main == "instruction" and others and "prompt" not in table.options.columns:
        raise ValueError(
            f"{_which_prompt([others[0], main], table)} Or join them: columns='system={table.names[main]},"
            f"prompt={table.names[others[0]]}'."
        )
    if "prompt" in table.options.columns and not table.options.columns["prompt"]:
        return Prompt(None)
    # By their names alone: what is empty in the first rows may hold text in others.
    system = next((key for key in SYSTEMS if key in free), None)
    history = "history" if "history" in free and main != "history" else None
    added = tuple(key for key in ADDED if key in free and key != main) if main and main != "orig_instruction" else ()
    if main == "prompt":  # which may be rendered from them
        added = tuple(key for key in added if not _is_within(table, key, main))
    return Prompt(main, system, history, added, tuple(key for key in TEMPLATE if key in free))


def _last_text(value: Any) -> Any:
    """Return the text of a conversation's last turn."""
    try:
        turns = as_text(value, "")
    except BadRow:
        return None
    return turns[-1].get("content") if isinstance(turns, list) and turns else None


def _which_prompt(keys: list[str], table: Table) -> str:
    names = [table.names[key] for key in keys]
    return f"The columns {', '.join(map(repr, names))} may each be the prompt. Say which: columns='prompt={names[0]}'."


def _is_within(table: Table, key: str, main: str) -> bool:
    """Whether the text of one column stands in that of another in every row that has both."""
    pairs = [(row.get(key), row.get(main)) for row in table.rows if row.get(key) and row.get(main)]
    return bool(pairs) and all(isinstance(x, str) and isinstance(y, str) and x.strip() in y for x, y in pairs)


def asks(value: Any) -> bool:
    """Whether a conversation ends with a turn to answer."""
    roles = roles_of(value)
    return bool(roles) and roles[-1] != "assistant"


def roles_of(value: Any) -> list[Any]:
    """Return the roles of a conversation; none of what is no conversation, or a bad one."""
    try:
        turns = as_text(value, "") if is_conversation(value) else []
    except BadRow:
        return []
    return [turn["role"] for turn in turns] if isinstance(turns, list) else []


def parsed_prompt(value: Any, what: str) -> Any:
    """Return a prompt, of an object (webgpt's question) its text."""
    found = parsed(value, what)
    if isinstance(value, str) and isinstance(found, Mapping) and isinstance(found.get("full_text"), str):
        return found["full_text"]  # WebGPT's question in the cell of a table
    if isinstance(value, Mapping) and not is_turn(value):
        text = next((value[key] for key in ("full_text", "text", "content", "question") if key in value), None)
        if not isinstance(text, str):
            raise BadRow(f"{what} is {short(value)}, expected text or messages. {FIX}")
        return text
    return value


def _with_added(prompt: Any, added: Any, what: str) -> Any:
    if added is None or added == "" or added == []:
        return prompt
    if not isinstance(prompt, str) or not isinstance(added, str) or isinstance(as_text(prompt, what), list):
        raise BadRow(
            f"{what} is {short(added)} beside the prompt {short(prompt)}: both must be text, to be joined by a "
            "line break. Name the column that is the prompt (columns='prompt=NAME'), or remove the other."
        )
    return f"{prompt}\n{added}" if added.strip() else prompt


def _with_history(prompt: Any, turns: Any, what: str) -> list[dict[str, Any]]:
    turns = parsed(turns, what)
    before: list[dict[str, Any]] = []
    if is_conversation(turns):
        before = as_text(turns, what)
    elif isinstance(turns, list) and all(isinstance(t, list) and len(t) == 2 for t in turns):
        for question, answer in turns:
            before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        raise BadRow(f"{what} is {short(turns)}, expected pairs of question and answer, or messages. {FIX}")
    prompt = as_text(prompt, what)
    return before + (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
