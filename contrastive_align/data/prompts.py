"""Which columns of a data set form the prompt, and how a row's prompt is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from contrastive_align.data.columns import (
    ADDED,
    CONVERSATIONS,
    PROMPTS,
    SYSTEMS,
    TEMPLATE,
    Row,
    Table,
    asks,
    is_conversation,
    is_text,
    is_turns,
)
from contrastive_align.data.formats import Parts
from contrastive_align.data.messages import as_text, is_turn
from contrastive_align.data.rows import FIX, BadRow, parsed, short
from contrastive_align.trl_seam import extract_prompt


# Keys of an object that holds a prompt: one text, or a title that stands before a longer text.
TEXTS = ("full_text", "text", "content", "question")
TITLED = ("post", "article")


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
        value = row.get(self.main) if self.main else None
        if isinstance(value, str | Mapping):
            value, inner = _of_object(value, f"{where}: '{self.main}'", in_cells=self.main == "info")
            template |= inner
        for key in self.added:
            value = _with_added(value, row.get(key), f"{where}: '{key}'")
        turns = row.get(self.history) if self.history else None
        prompt = _with_history(value, turns, f"{where}: '{self.history}'") if turns else value
        return {"prompt": prompt, "template": template, "system": row.get(self.system) if self.system else None}


def find_prompt(table: Table, taken: Iterable[str] = ()) -> Prompt:
    """Find the columns of the prompt among those that are not ``taken``.

    Raises:
        ValueError: several columns may be the prompt.
    """
    taken = set(taken)
    free = [key for key in table.names if key not in taken]
    # By their names alone: what is empty in the first rows may hold text in others.
    beside = {
        "system": next((key for key in SYSTEMS if key in free), None),
        "template": tuple(key for key in TEMPLATE if key in free),
    }
    if "prompt" in table.options.columns and not table.options.columns["prompt"]:
        return Prompt(None, **beside)
    if "prompt" in table.several:
        main, *added = table.several["prompt"]
        return Prompt(main, added=tuple(added), **beside)
    candidates = [key for key in (*PROMPTS, "history") if key in free and (table.values(key) or key == "prompt")]
    talks = [key for key in CONVERSATIONS if key in free and table.mostly(key, asks)]
    main = next((key for key in candidates if key != "history" or table.mostly(key, is_text)), None)
    main = main or next((key for key in PROMPTS if key in free), None)  # all rows are empty: each is refused by name
    if main is None and "info" in free and table.mostly("info", _is_titled):
        main = "info"
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
    history = "history" if "history" in free and main != "history" else None
    added = tuple(key for key in ADDED if key in free and key != main) if main and main != "orig_instruction" else ()
    if main == "prompt":  # which may be rendered from them
        added = tuple(key for key in added if not _is_within(table, key, main))
    return Prompt(main, history=history, added=added, **beside)


def _last_text(value: Any) -> Any:
    """Return the text of a conversation's last turn."""
    try:
        turns = as_text(value, "")
    except BadRow:
        return None
    return turns[-1].get("content") if isinstance(turns, list) and turns else None


def _which_prompt(keys: list[str], table: Table) -> str:
    return (
        f"The columns {table.listing(keys)} may each be the prompt. Say which: columns='prompt={table.names[keys[0]]}'."
    )


def _is_within(table: Table, key: str, main: str) -> bool:
    """Whether the text of one column stands in that of another in every row that has both."""
    pairs = [(row.get(key), row.get(main)) for row in table.rows if row.get(key) and row.get(main)]
    return bool(pairs) and all(isinstance(x, str) and isinstance(y, str) and x.strip() in y for x, y in pairs)


def _is_titled(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in TITLED)


def _of_object(value: Any, what: str, *, in_cells: bool) -> tuple[Any, dict[str, Any]]:
    """Return the prompt that an object holds, and the tools in it; any other value as it is.

    ``in_cells``: JSON text of the column is no prompt, but an object in the cell of a table.
    """
    found = parsed(value, what)
    if not isinstance(found, Mapping) or is_turn(found):
        return value, {}
    if is_conversation(found.get("messages")):
        return found["messages"], {key: found[key] for key in ("tools",) if found.get(key)}
    if isinstance(value, str) and not in_cells and not isinstance(found.get("full_text"), str):
        return value, {}  # a text in JSON
    if _is_titled(found):
        text = next((found[key] for key in TITLED if isinstance(found.get(key), str)), None)
        title = found.get("title")
        text = f"{title}\n{text}" if text and title and isinstance(title, str) else text
    else:
        text = next((found[key] for key in TEXTS if key in found), None)
    if not isinstance(text, str):
        raise BadRow(f"{what} is {short(value)}, expected text or messages. {FIX}")
    return text, {}


def _with_added(prompt: Any, added: Any, what: str) -> Any:
    if added is None or added == "" or added == []:
        return prompt
    if not isinstance(prompt, str) or not isinstance(added, str) or isinstance(as_text(prompt, what), list):
        raise BadRow(
            f"{what} is {short(added)} beside the prompt {short(prompt)}: both must be text, to be joined by a "
            "line break. Name the column that is the prompt (columns='prompt=NAME'), or drop the row "
            "(on_bad_row='drop')."
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


def split_prompt_off(parts: Parts, where: str) -> None:
    """Take what chosen and rejected share for the prompt; of dialogues it is told later."""
    names = [parts.columns.completion(i) for i in range(len(parts.completions))]
    told = [as_text(answer, f"{where}: {name}") for name, answer in zip(names, parts.completions, strict=True)]
    (chosen, rejected), (a, b) = told[:2], names[:2]
    if {type(chosen), type(rejected)} not in ({str}, {list}) or len(told) > 2:
        raise BadRow(
            f"{where}: {a} is {short(chosen)} and {b} {short(rejected)}, expected both text or both messages. {FIX}"
        )
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        raise BadRow(
            f"{where}: one of {a} and {b} is the beginning of the other, so that no prompt can be told from them. "
            "Give a 'prompt' column, or drop the row (on_bad_row='drop')."
        )
    if isinstance(chosen, list):
        return
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    shared = chosen[: next(i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y)]
    if not re.search(r"\s", shared):
        raise BadRow(
            f"{where}: no prompt. {a} and {b} share {shared!r} at most at their beginning. Give a 'prompt' "
            "column, or drop the row (on_bad_row='drop')."
        )
    parts.prompt, parts.completions = split["prompt"], [split["chosen"], split["rejected"]]


def join_turns(parts: Parts, where: str) -> None:
    """Join lists of one text a turn, of the prompt and of the answers, into text or dialogues."""
    asked, told = parsed(parts.prompt), [parsed(answer) for answer in parts.completions]
    names = [f"'{parts.columns.prompt}'", *(parts.columns.completion(i) for i in range(len(told)))]
    for name, turns in zip(names, [asked, *told], strict=True):
        if not is_turns(turns) or len(turns) != len(asked):
            raise BadRow(f"{where}: {name} is {short(turns)}, expected a list with a text for each turn. {FIX}")
    if len(asked) == 1:
        parts.prompt, parts.completions = asked[0], [answer[0] for answer in told]
        return
    parts.prompt = None
    parts.completions = [
        [turn for q, a in zip(asked, answer, strict=True) for turn in
         ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
        for answer in told
    ]  # fmt: skip
