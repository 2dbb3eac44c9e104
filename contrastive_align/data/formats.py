"""The spellings of a dataset's rows, and how each is read into a checked group; nothing else knows them."""

from __future__ import annotations

import itertools
import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from contrastive_align.trl_seam import extract_prompt, remove_none_values


Message = dict[str, Any]
Text = str | list[Message]

FIX = "Correct the row or drop it (on_bad_row='drop')."
UNREADABLE = "__unreadable__"  # a column with the error of a row that the reader of a file could not read
ROW = "__row__"  # the number of a row in the file, before shuffling and splitting
LARGEST_SCORE = 3.4028234663852886e38  # scores are float32 on their way to the loss
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(ValueError):
    """A row that cannot be trained on: its place, what was found and expected, and how to fix it."""


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


PROMPT_COLUMNS = ("prompt", "instruction")
COMPLETIONS_COLUMNS = ("completions", "responses")
SCORES_COLUMNS = ("scores", "rewards")
_LETTERED = re.compile(r"(?:score_)?A(\d+)$")

WHAT_IS_UNDERSTOOD = (
    "prompt + completions + scores (lists of K), the same with responses and rewards, prompt + A0.. + score_A0.., "
    "UltraFeedback's completions with response and overall_score, or chosen + rejected with or without prompt"
)


def detect_spelling(columns: list[str], first_row: Mapping[str, Any] | None = None) -> str:
    """Detect how a dataset spells its groups: ``"canonical"``, ``"ultrafeedback"``, ``"lettered"`` or ``"preference"``.

    Explicit scores go before preferences.

    Raises:
        ValueError: no spelling fits; names the columns found and the spellings understood.

    >>> detect_spelling(["prompt", "responses", "rewards"])
    'canonical'
    >>> detect_spelling(["prompt", "A0", "A1", "score_A0", "score_A1"])
    'lettered'
    """
    completions = next((c for c in COMPLETIONS_COLUMNS if c in columns), None)
    if completions and any(c in columns for c in SCORES_COLUMNS):
        return "canonical"
    if completions and first_row is not None:
        items = first_row.get(completions)
        # A bad first row does not decide: this is the only spelling without a column of scores.
        if items is None or items == []:
            return "ultrafeedback"
        if isinstance(items, list) and isinstance(items[0], Mapping) and "response" in items[0]:
            return "ultrafeedback"
    if "A0" in columns and "score_A0" in columns:
        return "lettered"
    if "chosen" in columns and "rejected" in columns:
        return "preference"
    raise ValueError(
        f"No groups found: the dataset has the columns {sorted(columns)}, expected {WHAT_IS_UNDERSTOOD}. "
        "Rename the columns, for instance with dataset.rename_column(old, new)."
    )


def read_group(row: Mapping[str, Any], number: int, spelling: str, *, source: str = "") -> Group:
    """Read one row of a dataset into a checked :class:`Group`.

    Args:
        number: the row's number in the dataset, from 0, for errors; a column ``__row__`` takes precedence.
        spelling: see :func:`detect_spelling`.
        source: the file or split, for errors.

    Raises:
        BadRow: fewer than 2 completions, another number of scores than completions, a score that is missing, not a
            number, NaN or infinite, an empty prompt or completion, or roles in an order no chat template takes.

    >>> read_group({"prompt": "Hi", "chosen": " there", "rejected": " you"}, 0, "preference")
    Group(prompt='Hi', completions=[' there', ' you'], scores=[1.0, 0.0], template_kwargs={})
    """
    where = f"{source + ', ' if source else ''}row {row.get(ROW, number)}"
    if row.get(UNREADABLE):
        raise BadRow(row[UNREADABLE])
    prompt, completions, scores, columns = _SPELLINGS[spelling](row, where)
    prompt, completions = _same_form(prompt, completions, where, columns)
    scores = check_scores(scores, len(completions), where, columns)
    _check_prompt(prompt, f"{where}: '{columns.prompt}'")
    for i, completion in enumerate(completions):
        _check_completion(completion, f"{where}: {columns.completion(i)}")
    return Group(prompt, completions, scores, _template_kwargs(row, where))


def check_scores(scores: list[Any], k: int, where: str, columns: Columns) -> list[float]:
    """Check that there are K >= 2 completions and K finite scores; return the scores as floats, or raise BadRow."""
    if k < 2:
        raise BadRow(
            f"{where}: '{columns.completions}' has {k} completion{'s' * (k != 1)}, expected at least 2 per prompt. Add "
            "completions or drop the row (on_bad_row='drop')."
        )
    if len(scores) != k:
        raise BadRow(
            f"{where}: '{columns.scores}' has {len(scores)} numbers for {k} completions, expected one each. {FIX}"
        )
    return [_number(score, f"{where}: {columns.score(i)}") for i, score in enumerate(scores)]


@dataclass
class Columns:
    """A row's names for its parts, for errors; ``own`` if each completion has its own column and score column."""

    prompt: str
    completions: str
    scores: str
    own: list[tuple[str, str]] | None = None

    def completion(self, i: int) -> str:
        return f"'{self.own[i][0]}'" if self.own else f"'{self.completions}'[{i}]"

    def score(self, i: int) -> str:
        return f"'{self.own[i][1]}'" if self.own else f"'{self.scores}'[{i}]"


_Parts = tuple[Any, list, list, Columns]  # prompt, completions, scores, all unchecked


def _read_canonical(row: Mapping[str, Any], where: str) -> _Parts:
    columns = Columns(*(_first(row, names) for names in (PROMPT_COLUMNS, COMPLETIONS_COLUMNS, SCORES_COLUMNS)))
    completions = _list(row, columns.completions, where)
    scores = _list(row, columns.scores, where)
    return _present(row, columns.prompt, where), completions, scores, columns


def _read_ultrafeedback(row: Mapping[str, Any], where: str) -> _Parts:
    columns = Columns(_first(row, PROMPT_COLUMNS), _first(row, COMPLETIONS_COLUMNS), "overall_score")
    items = _list(row, columns.completions, where)
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise BadRow(
                f"{where}: '{columns.completions}'[{i}] is {_short(item)}, expected a response with its score. {FIX}"
            )
    responses = [item.get("response") for item in items]
    return _present(row, columns.prompt, where), responses, [item.get("overall_score") for item in items], columns


def _read_lettered(row: Mapping[str, Any], where: str) -> _Parts:
    letters = sorted({int(m.group(1)) for m in map(_LETTERED.match, row) if m})
    own = [(f"A{i}", f"score_A{i}") for i in letters]
    # A ragged table pads its short rows with None in both columns.
    own = [(a, score) for a, score in own if row.get(a) is not None or row.get(score) is not None]
    completions, scores = [row.get(a) for a, _ in own], [row.get(score) for _, score in own]
    prompt_column = _first(row, PROMPT_COLUMNS)
    return row.get(prompt_column), completions, scores, Columns(prompt_column, "A0..", "score_A0..", own)


def _read_preference(row: Mapping[str, Any], where: str) -> _Parts:
    chosen, rejected = _present(row, "chosen", where), _present(row, "rejected", where)
    prompt_column = _first(row, PROMPT_COLUMNS)
    prompt = row.get(prompt_column)
    if prompt_column not in row:
        shorter, longer = sorted((chosen, rejected), key=len)
        if longer[: len(shorter)] == shorter:
            raise BadRow(
                f"{where}: one of 'chosen' and 'rejected' is the beginning of the other, so that no prompt can be told "
                "from them. Give a 'prompt' column, or drop the row (on_bad_row='drop')."
            )
        split = extract_prompt({"chosen": chosen, "rejected": rejected})
        prompt, chosen, rejected = split["prompt"], split["chosen"], split["rejected"]
    elif chosen == rejected:
        raise BadRow(f"{where}: 'chosen' and 'rejected' are the same. Drop the row (on_bad_row='drop').")
    own = [("chosen", "chosen"), ("rejected", "rejected")]
    return prompt, [chosen, rejected], [1.0, 0.0], Columns(prompt_column, "chosen, rejected", "(1, 0)", own)


_SPELLINGS = {
    "canonical": _read_canonical,
    "ultrafeedback": _read_ultrafeedback,
    "lettered": _read_lettered,
    "preference": _read_preference,
}


def _same_form(prompt: Any, completions: list[Any], where: str, columns: Columns) -> tuple[Text, list[Text]]:
    """Return prompt and completions all as text or all as messages, without a prompt repeated in the completions."""
    completions = [_messages(c) for c in completions]
    prompt = _messages(prompt)
    conversational = [isinstance(c, list) for c in completions]
    if not any(conversational) and not isinstance(prompt, list):
        return prompt, completions
    completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    whole = [_is_messages(c) and c[0].get("role") != "assistant" for c in completions]
    if any(whole):  # whole dialogues: split off the given prompt, or the turns shared before the last answer
        for i, completion in enumerate(completions):
            if not _is_messages(completion):
                _check_completion(completion, f"{where}: {columns.completion(i)}")
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


def _messages(value: Any) -> Any:
    """Remove the None that Arrow adds to messages for keys that only other rows have."""
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    if isinstance(value, list) and all(isinstance(m, Mapping) for m in value):
        return remove_none_values(value)
    return value


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) for m in value)


def _check_prompt(prompt: Any, what: str) -> None:
    roles = _check_form(prompt, what)
    if not roles:
        return
    if roles[-1] not in ("user", "tool"):
        raise BadRow(f"{what} ends with the role '{roles[-1]}', expected the user's turn last (roles: {roles}). {FIX}")
    rest = roles[1:] if roles[0] in ("system", "developer") else roles
    if rest[0] != "user":
        raise BadRow(f"{what} has the roles {roles}, expected user first, or system then user. {FIX}")
    for before, after in itertools.pairwise(rest):
        if after in ("system", "developer") or (before == after and after != "tool"):
            raise BadRow(f"{what} has the roles {roles}, expected user and assistant in turn. {FIX}")


def _check_completion(completion: Any, what: str) -> None:
    roles = _check_form(completion, what)
    for where, role in (("begins", roles[0]), ("ends", roles[-1])) if roles else ():
        if role != "assistant":
            raise BadRow(f"{what} {where} with the role '{role}', expected 'assistant' (roles: {roles}). {FIX}")


def _check_form(messages: Any, what: str) -> list[str]:
    """Check that this is text or messages, with content; return the messages' roles."""
    if messages is None or messages == [] or (isinstance(messages, str) and not messages.strip()):
        raise BadRow(f"{what} is empty, expected text or messages. Fill it in or drop the row (on_bad_row='drop').")
    if isinstance(messages, str):
        return []
    if not isinstance(messages, list):
        raise BadRow(f"{what} is {_short(messages)}, expected text or a list of messages. {FIX}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRow(
                f"{what}[{i}] is {_short(message)}, expected a message with 'content' and a 'role' among {ROLES}. {FIX}"
            )
        content = message.get("content")
        if not message.get("tool_calls") and (not content or (isinstance(content, str) and not content.strip())):
            raise BadRow(f"{what}[{i}] has an empty 'content' (role '{message['role']}'), expected text. {FIX}")
    return [message["role"] for message in messages]


def _number(score: Any, what: str) -> float:
    if score is None:
        raise BadRow(f"{what} is missing, expected a finite number. Fill it in or drop the row (on_bad_row='drop').")
    if not isinstance(score, numbers.Real):
        raise BadRow(f"{what} is {_short(score)}, expected a finite number, not a {type(score).__name__}. {FIX}")
    try:
        number = float(score)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_SCORE:
        raise BadRow(f"{what} is {number}, expected a finite number (at most {LARGEST_SCORE:.2g} in float32). {FIX}")
    return number


def _template_kwargs(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    tools = _template_value(row, "tools", list, where)
    return ({"tools": tools} if tools else {}) | (_template_value(row, "chat_template_kwargs", dict, where) or {})


def _template_value(row: Mapping[str, Any], column: str, kind: type, where: str) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"{where}: '{column}' is not JSON: {error}. {FIX}") from error
    if value is not None and not isinstance(value, kind):
        raise BadRow(f"{where}: '{column}' is {_short(value)}, expected a {kind.__name__}. {FIX}")
    return value


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), names[0])


def _present(row: Mapping[str, Any], column: str, where: str) -> Any:
    if row.get(column) is None:
        raise BadRow(f"{where}: '{column}' is missing. Fill it in or drop the row (on_bad_row='drop').")
    return row[column]


def _list(row: Mapping[str, Any], column: str, where: str) -> list[Any]:
    value = _present(row, column, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"{where}: '{column}' is text that is not a JSON list: {error}. {FIX}") from error
    if not isinstance(value, list):
        raise BadRow(f"{where}: '{column}' is {_short(value)}, expected a list with one entry per completion. {FIX}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
