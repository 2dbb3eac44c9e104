"""The shapes of published data sets: how each is recognised by its columns, and how a row of it becomes groups.

``SHAPES`` is the table. An entry finds its roles (which column is the prompt, which holds the answers, ...) among the
columns of a few rows, and reads a row by them. Nothing else in the package knows how a data set is spelled.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from contrastive_align.data.columns import (
    ABOUT,
    ANSWERS,
    CONVERSATIONS,
    LABELS,
    LISTS,
    PAIRS,
    RANKS,
    ROLES,
    SAMPLE,
    SCORE_LISTS,
    SCORES,
    STRENGTHS,
    SYSTEMS,
    WINNERS,
    Options,
    Prompt,
    Row,
    Table,
    asks,
    find_prompt,
    is_answer,
    is_conversation,
    is_list,
    is_number,
    is_score,
    is_text,
    is_turns,
    key_of,
    roles_of,
)
from contrastive_align.data.formats import Columns, Parts, listed, number_of
from contrastive_align.data.messages import as_text, is_turn
from contrastive_align.data.rows import DECIMAL_COMMA, FIX, OWN_COLUMNS, BadRow, parsed, short
from contrastive_align.trl_seam import extract_prompt


@dataclass(frozen=True)
class Shape:
    """One entry of the table."""

    name: str
    known_from: str
    find: Callable[[Table], dict[str, Any] | None]  # -> roles: "prompt": Prompt, "keys": what else is read, and its own
    read: Callable[[Row, dict[str, Any], str], list[Parts]]
    joined: bool = False  # a row is one answer, and the rows of a prompt are a group


def _parts(row: Row, roles: Mapping[str, Any], where: str, completions: list, scores: list, columns: Columns) -> Parts:
    told = {**roles["prompt"].read(row, where), "decimal_comma": bool(row.get(DECIMAL_COMMA))}
    return Parts(completions=completions, scores=scores, columns=columns, **told)


def _named(roles: Mapping[str, Any], key: str | None) -> str:
    return roles["names"].get(key, key) if key else "prompt"


def _prompt_name(roles: Mapping[str, Any]) -> str:
    return _named(roles, roles["prompt"].main)


def _negated(score: Any, name: str) -> Any:
    """Return minus a rank, which may be a cell's text; of a column of another name the score as it is."""
    if not set(key_of(name).split("_")) & set(RANKS) or not is_number(score) or isinstance(score, bool):
        return score
    if isinstance(score, str):
        return score.strip()[1:] if score.strip().startswith("-") else f"-{score.strip()}"
    return -score


def _find_lists(table: Table) -> dict[str, Any] | None:
    answers = next((key for key in LISTS if table.mostly(key, is_list)), None)
    answers = answers or next((key for key in ("completions", "responses") if key in table), None)
    scores = table.options.score if table.options.score in table.names else None
    known = [key for key in SCORE_LISTS if key in table and table.mostly(key, is_list)]
    if answers and not scores and len(known) > 1 and known[0] != "scores":
        raise ValueError(_which_score([table.names[key] for key in known], table, "beside the lists of answers"))
    scores = scores or (known[0] if known else table.first(("scores", "rewards")))
    if answers and scores is None and (labels := table.first(("labels", "label"))) and table.mostly(labels, is_list):
        # TRL's stepwise supervision has them for the steps of one answer.
        raise ValueError(_which_score([table.names[labels]], table, "for answers and not for steps"))
    if answers is None or scores is None or scores == answers:
        return None
    return {
        "prompt": find_prompt(table, {answers, scores}),
        "answers": answers,
        "scores": scores,
        "keys": {answers, scores},
    }


def _read_lists(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    answers, scores = roles["answers"], roles["scores"]
    columns = Columns(_prompt_name(roles), _named(roles, answers), _named(roles, scores))
    completions = listed(row.get(answers), columns.completions, where)
    numbers = [_negated(score, columns.scores) for score in listed(row.get(scores), columns.scores, where)]
    return [_parts(row, roles, where, completions, numbers, columns)]


_TEXT_KEYS = ("response", "text", "answer", "completion", "output", "content", "generated_text", "reply", "message")


def _find_nested(table: Table) -> dict[str, Any] | None:
    """Find a list of objects that hold an answer and its score."""
    for answers in LISTS:
        items = (
            [item for value in table.values(answers) if isinstance(value, list) for item in value]
            if answers in table
            else []
        )
        objects = [item for item in items if isinstance(item, Mapping) and not is_turn(item)]
        if not table.mostly(answers, _has_objects):
            continue
        keys = dict.fromkeys(key for item in objects for key in item)
        text = next((key for key in _TEXT_KEYS if key in keys), None)
        if text is None:
            continue
        numeric = [
            k
            for k in keys
            if k != text and any(isinstance(i.get(k), int | float) or is_number(i.get(k)) for i in objects)
        ]
        wanted = table.options.score
        known = [k for name in ("overall_score", *SCORES, *RANKS) for k in numeric if key_of(k) == name]
        score = next((k for k in keys if key_of(k) == wanted), None) if wanted else next(iter(known), None)
        if score is None and wanted and wanted not in table.names:
            raise ValueError(
                f"score_column is '{table.options.score_column}', and the entries of '{table.names[answers]}' have "
                f"{list(keys)}. Name one of these."
            )
        if score is None:
            if not numeric:
                continue
            raise ValueError(_which_score([f"{k}" for k in numeric], table, f"in '{table.names[answers]}'"))
        return {
            "prompt": find_prompt(table, {answers}),
            "answers": answers,
            "text": text,
            "scores": score,
            "keys": {answers},
        }
    return None


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) and not is_turn(item) for item in value)


def _read_nested(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    answers, text, score = roles["answers"], roles["text"], roles["scores"]
    columns = Columns(_prompt_name(roles), _named(roles, answers), score)
    items = listed(row.get(answers), columns.completions, where)
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise BadRow(
                f"{where}: '{columns.completions}'[{i}] is {short(item)}, expected an object with '{text}' and "
                f"'{score}'. {FIX}"
            )
    scores = [_negated(item.get(score), score) for item in items]
    return [_parts(row, roles, where, [item.get(text) for item in items], scores, columns)]


_INDEXED = re.compile(r"(.*?)_?(\d+|(?<=_)[a-z])")
_INDEXED_INSIDE = re.compile(r"(.*?)_?(\d+|(?<=_)[a-z])_(.+)")


def _families(table: Table) -> dict[str, dict[str, str]]:
    """Return stem -> index -> key of the columns that are numbered or lettered; the stem of a letter alone is ''."""
    found: dict[str, dict[str, str]] = {}
    for key in table.names:
        inside, at_end = _INDEXED_INSIDE.fullmatch(key), _INDEXED.fullmatch(key)
        if at_end:
            other = found.setdefault(at_end[1], {}).setdefault(at_end[2], key)
            if other != key:
                raise ValueError(
                    f"The columns {table.listing(other)} and {table.listing(key)} have one number. Rename one."
                )
        elif inside and re.fullmatch(rf"({'|'.join(SCORES)}|{'|'.join(RANKS)})", inside[3]):
            found.setdefault(f"{inside[1]}_{inside[3]}", {})[inside[2]] = key
    return found


def _answer_family(table: Table, families: Mapping[str, dict[str, str]], beside: Iterable[str] = ()) -> str | None:
    """Return the stem of the columns that hold the answers."""

    def holds_answers(stem: str) -> bool:
        keys = families[stem].values()
        answers = all(table.mostly(k, lambda v: is_answer(v) or is_turns(v)) or not table.values(k) for k in keys)
        return len(keys) > 1 and stem not in beside and answers

    known = [stem for stem in families if re.fullmatch(rf"(.*_)?({'|'.join((*ANSWERS, *CONVERSATIONS, 'a'))})s?", stem)]
    others = [
        stem for stem in families
        if not ABOUT.fullmatch(stem) and not any(word in stem.split("_") for word in SCORES) and stem not in known
        and any(table.mostly(k, lambda v: isinstance(v, str) and not is_number(v)) for k in families[stem].values())
    ]  # fmt: skip
    return next((stem for stem in (*known, *others) if holds_answers(stem)), None)


def _find_wide(table: Table) -> dict[str, Any] | None:
    """Find answer_1, score_1, answer_2, ...; A0, score_A0, ...; human_ref_A, score_A, ..."""
    families = _families(table)
    wanted = table.options.score
    wanted = next((stem for stem, keys in families.items() if wanted in keys.values()), wanted)
    words = (wanted,) if wanted else (*SCORES, *RANKS)
    scored = [s for s in families if any(re.search(rf"(^|_){re.escape(word)}s?(_|$)", s) for word in words)]
    stem = _answer_family(table, families, scored)
    if stem is None:
        return None
    answers = families[stem]
    scored = [s for s in scored if set(families[s]) & set(answers)]
    numeric = [
        s for s in families
        if s != stem and not ABOUT.fullmatch(s) and set(answers) <= set(families[s])
        and all(table.mostly(k, is_number) for k in families[s].values())
    ]  # fmt: skip
    if not scored:
        if numeric and _find_compared(table) is None:
            raise ValueError(_which_score([f"{s}_" for s in numeric], table, "in numbered columns"))
        return None
    if len(scored) > 1:
        exact = [s for s in scored if s in SCORES or s == f"score_{stem}"]
        scored = exact[:1] if exact else scored
    if len(scored) > 1:
        raise ValueError(_which_score(scored, table, "in numbered columns"))
    indices = sorted(set(answers) | set(families[scored[0]]), key=lambda i: (len(i), i))
    own = [(answers.get(i, _sibling(table, answers, i)), families[scored[0]].get(i)) for i in indices]
    keys = {key for pair in own for key in pair if key}
    return {"prompt": find_prompt(table, keys), "own": own, "stem": scored[0], "keys": keys}


def _sibling(table: Table, family: Mapping[str, str], index: str) -> str:
    """Return the name that a column of the family would have under another index."""
    first, key = next(iter(family.items()))
    return f"{table.names[key].removesuffix(first).removesuffix(first.upper())}{index}"


def _read_wide(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    # A ragged table leaves both columns of what a short row lacks empty.
    own = [(a, s) for a, s in roles["own"] if row.get(a) not in (None, "") or row.get(s) not in (None, "")]
    completions, scores = [row.get(a) for a, _ in own], [_negated(row.get(s), roles["stem"]) for _, s in own]
    named = [(_named(roles, a), _named(roles, s) if s else f"score of {_named(roles, a)}") for a, s in own]
    first = [_named(roles, key) for key in roles["own"][0]]
    columns = Columns(_prompt_name(roles), f"{first[0]}..", f"{first[1]}..", named)
    return [_parts(row, roles, where, completions, scores, columns)]


def _decisions(table: Table) -> list[str]:
    return [key for key in (*STRENGTHS, *WINNERS) if key in table and table.values(key)]


def _find_compared(table: Table) -> dict[str, Any] | None:
    """Find two answers and a column that says which is better."""
    families = _families(table)
    nested = "summaries" if table.mostly("summaries", lambda v: isinstance(v, list) and len(v) == 2) else None
    votes = [key for key in table.names if re.fullmatch(r"annotator_?\d+", key) and table.mostly(key, is_number)]
    one_hot = [
        key for key in table.names if re.fullmatch(r"winner_(.+_)?(a|b|tie|[0-9])", key) and table.mostly(key, is_score)
    ]
    stem = None if nested else _answer_family(table, families, {"winner_model", "annotator"})
    if stem is None and nested is None:
        return None
    answers = {"0": nested, "1": nested} if nested else families[stem]
    if len(answers) != 2:
        return None
    wanted = table.options.score
    decisions = [wanted] if wanted in table.names else _decisions(table)
    if len(one_hot) >= 2 and not wanted:
        decisions = one_hot
    elif len(votes) > 1 and not wanted:
        decisions = votes
    elif len(decisions) > 1:
        raise ValueError(_which_score([table.names[key] for key in decisions], table, "for the better of two answers"))
    if not decisions:
        return None
    kind = "one_hot" if decisions is one_hot else "votes" if decisions is votes else "decision"
    about = {"info"} if nested and "info" in table else set()
    keys = {*answers.values(), *decisions, *about}
    prompt = find_prompt(table, keys)
    pairs = sorted(answers.items(), key=lambda pair: (len(pair[0]), pair[0]))
    graded = (
        kind == "decision" and decisions[0] == "preference" and any(key.startswith("generator") for key in table.names)
    )
    return {
        "prompt": prompt,
        "own": pairs,
        "kind": kind,
        "by": decisions,
        "graded": graded,
        "about": about,
        "keys": keys,
    }


def _read_compared(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    (first, a), (second, b) = roles["own"]
    if a == b:
        texts = [
            item.get("text") if isinstance(item, Mapping) else item
            for item in listed(row.get(a), _named(roles, a), where)
        ]
        if len(texts) != 2:
            raise BadRow(f"{where}: '{_named(roles, a)}' has {len(texts)} answers, expected 2. {FIX}")
        columns = Columns("info" if roles["about"] else _prompt_name(roles), _named(roles, a), ", ".join(roles["by"]))
    else:
        texts = [row.get(a), row.get(b)]
        own = [(_named(roles, key), " and ".join(_named(roles, k) for k in roles["by"])) for key in (a, b)]
        columns = Columns(_prompt_name(roles), f"{own[0][0]}, {own[1][0]}", own[0][1], own)
    scores = _compared_scores(row, roles, first, second, where)
    if roles["about"]:
        row = {**row, "prompt": _post(row.get("info"), where)}
        roles = {**roles, "prompt": Prompt("prompt")}
    parts = _parts(row, roles, where, texts, scores, columns)
    return [_in_turns(parts)]


def _compared_scores(row: Row, roles: dict[str, Any], first: str, second: str, where: str) -> list[float]:
    names = roles["by"]
    values = [row.get(name) for name in names]
    what = f"{where}: '{_named(roles, names[0])}'"
    if roles["kind"] == "votes":
        votes = [number_of(value, f"{where}: '{_named(roles, n)}'") for n, value in zip(names, values, strict=True)]
        indices = (float(first), float(second))
        return [float(votes.count(index)) for index in indices]
    if roles["kind"] == "one_hot":
        won = [name for name, value in zip(names, values, strict=True) if number_of(value, what) == 1]
        if len(won) != 1:
            raise BadRow(f"{where}: {len(won)} of {[_named(roles, n) for n in names]} are 1, expected one. {FIX}")
        value: Any = won[0].removeprefix("winner_")
    else:
        value = values[0]
    if names[0] in STRENGTHS:
        strength = number_of(value, what)
        return [max(-strength, 0.0), max(strength, 0.0)]
    if roles["graded"]:
        preference = number_of(value, what)
        if not 1 <= preference <= 2:
            raise BadRow(f"{what} is {preference}, expected 1 (the first) to 2 (the second). {FIX}")
        return [2 - preference, preference - 1]
    scores = _winner(value, first, second)
    if scores is None:
        raise BadRow(f"{what} is {short(value)}, expected '{first}' or '{second}', the better answer, or 'tie'. {FIX}")
    return scores


def _winner(value: Any, first: str, second: str) -> list[float] | None:
    """Return the scores of two answers by what a column says of the better one; None for what is not known.

    >>> _winner("model_a", "a", "b"), _winner("B>>A", "a", "b"), _winner("1.0", "0", "1"), _winner("a=b", "a", "b")
    ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.5])
    """
    won = {"first": [1.0, 0.0], "second": [0.0, 1.0], "tie": [0.5, 0.5]}
    names = {first: "first", second: "second", "first": "first", "second": "second", "left": "first", "right": "second"}
    if first.isdigit():
        names |= {"a": "first", "b": "second"}
    if isinstance(value, bool):
        return None
    if is_number(value):
        number = float(value.replace(",", ".")) if isinstance(value, str) else float(value)
        return won[names[str(int(number))]] if number.is_integer() and str(int(number)) in names else None
    text = value.strip().lower() if isinstance(value, str) else ""
    if re.fullmatch(r"(tie|both|neither|equal|draw|same)\b.*", text):
        return won["tie"]
    if compared := re.fullmatch(r"(\w+)\s*(>+|<+|=+)\s*(\w+)", text):
        sides = [names.get(compared[1]), names.get(compared[3])]
        if set(sides) != {"first", "second"}:
            return None
        return won["tie" if "=" in compared[2] else sides[0] if ">" in compared[2] else sides[1]]
    things = "model|response|answer|output|option|assistant|candidate|completion|summary|conversation|text"
    named = re.fullmatch(rf"(?:(?:{things})[_ ]?)?(\w+)", text)
    return won[names[named[1]]] if named and named[1] in names else None


def _in_turns(parts: Parts) -> Parts:
    """Join lists of one text a turn, of the prompt and of both answers (LMSYS), into text or dialogues."""
    prompt, answers = parsed(parts.prompt), [parsed(answer) for answer in parts.completions]
    if not is_turns(prompt) or not all(isinstance(answer, list) for answer in answers):
        return parts
    if not all(map(is_turns, answers)):
        raise BadRow(f"{parts.columns.completions}: {short(answers)}, expected a text for each turn. {FIX}")
    asked = prompt
    if len(asked) == 1 and all(len(answer) == 1 for answer in answers):
        parts.prompt, parts.completions = asked[0], [answer[0] for answer in answers]
    elif all(len(answer) == len(asked) for answer in answers):
        turns = [
            [turn for q, a in zip(asked, answer, strict=True) for turn in
             ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
            for answer in answers
        ]  # fmt: skip
        parts.prompt, parts.completions = None, turns
    return parts


def _post(info: Any, where: str) -> Any:
    """Return the prompt of a comparison of summaries: the title, if there is one, and the post or article."""
    if not isinstance(info, Mapping) or not isinstance(info.get("post") or info.get("article"), str):
        raise BadRow(f"{where}: 'info' is {short(info)}, expected an object with 'post' or 'article'. {FIX}")
    texts = [info.get("title"), info.get("post") or info.get("article")]
    return "\n".join(text for text in texts if text)


def _find_pairs(table: Table) -> dict[str, Any] | None:
    pair = next((pair for pair in PAIRS if all(key in table for key in pair)), None)
    if pair is None:
        return None
    families = [
        (a, b) for word in ((table.options.score and [table.options.score]) or (*SCORES, *RANKS))
        for sides in dict.fromkeys((pair, tuple(side.split("_")[0] for side in pair)))
        for a, b in [[f"{word}_{side}" for side in sides], [f"{side}_{word}" for side in sides]]
        if a in table and b in table
    ]  # fmt: skip
    if not families and not table.options.score:  # chosen_avg_rating
        for key in table.names:
            twin = re.sub(rf"(^|_){pair[0]}(_|$)", rf"\1{pair[1]}\2", key)
            rated = set(key.split("_")) & {*SCORES, *RANKS} and twin != key and twin in table
            if rated and table.mostly(key, is_number) and table.mostly(twin, is_number):
                families.append((key, twin))
    if table.options.score and not families and table.options.score not in (None,):
        raise ValueError(
            f"score_column is '{table.options.score_column}', but no pair of columns "
            f"{table.options.score}_{pair[0]} and "
            f"{table.options.score}_{pair[1]} is there: the columns are {sorted(table.names.values())}."
        )
    scores = families[0] if families else None
    if len(families) > 1 and not table.options.hard_pairs:
        words = [a.replace(f"_{pair[0]}", "").replace(f"{pair[0]}_", "") for a, _ in families]
        raise ValueError(_which_score(words, table, "beside the pairs"))
    lists = [key for key in LISTS if key in table and table.mostly(key, is_list)]
    if (lists or _answer_family(table, _families(table))) and table.mostly(pair[0], _is_label):
        raise ValueError(
            f"'{table.names[pair[0]]}' and '{table.names[pair[1]]}' hold labels of answers, such as "
            f"{short(table.values(pair[0])[0])}, and not answers. Put the answers' texts into them."
        )
    keys = {*pair, *(scores or ())}
    prompt = find_prompt(table, keys)
    roles = {"prompt": prompt, "pair": pair, "scores": scores, "keys": keys, "hard": table.options.hard_pairs}
    roles["several"] = any(table.mostly(key, _several) for key in pair)
    dialogues = table.mostly(pair[0], lambda v: roles_of(v)[:1] not in ([], ["assistant"]))
    if dialogues and prompt.main in CONVERSATIONS:
        roles["prompt"] = Prompt(None, prompt.system, None, (), prompt.template)
    elif prompt.main is None and not dialogues and "prompt" not in table.options.columns:
        _check_implicit(table, keys | prompt.keys)
    return roles


def _is_label(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and bool(re.fullmatch(r"\d|[A-Ha-h]", value.strip())))


def _check_implicit(table: Table, taken: set[str]) -> None:
    """Refuse to take the beginning that chosen and rejected share for the prompt where a column may hold it."""
    others = [
        key for key in table.names
        if key not in taken and not ABOUT.fullmatch(key)
        and table.mostly(key, lambda v: (isinstance(v, str) and not is_number(v)) or is_conversation(v))
    ]  # fmt: skip
    if others:
        names = ", ".join(f"'{table.names[key]}'" for key in others)
        raise ValueError(
            f"The pairs have no 'prompt' column, and {names} may be the prompt. Name it with columns='prompt="
            f"{table.names[others[0]]}', or say that the prompt is what chosen and rejected share: columns='prompt='."
        )


def _read_pairs(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    a, b = roles["pair"]
    for key, value in ((a, row.get(a)), (b, row.get(b))):
        if value is None:
            raise BadRow(f"{where}: '{_named(roles, key)}' is missing. Fill it in or drop the row (on_bad_row='drop').")
    lists = [parsed(row[key], where) if roles["several"] else row[key] for key in (a, b)]  # a table's cells are JSON
    if any(map(_several, lists)):
        return [_read_several(row, roles, where, *lists)]
    chosen, rejected = row[a], row[b]
    prompt = roles["prompt"]
    names = Columns(
        _prompt_name(roles),
        f"{_named(roles, a)}, {_named(roles, b)}",
        "(1, 0)",
        [(_named(roles, a), _named(roles, a)), (_named(roles, b), _named(roles, b))],
    )
    scores: list[Any] = [1.0, 0.0]
    if roles["scores"] and not roles["hard"]:
        scores = [_negated(row.get(key), key) for key in roles["scores"]]
        names.own = list(
            zip((_named(roles, a), _named(roles, b)), (_named(roles, k) for k in roles["scores"]), strict=True)
        )
    parts = _parts(row, roles, where, [chosen, rejected], scores, names)
    if prompt.main is None:
        parts.prompt, parts.completions = _implicit(as_text(chosen, where), as_text(rejected, where), where, names)
    return [parts]


def _several(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not is_conversation(value)


def _read_several(row: Row, roles: dict[str, Any], where: str, chosen: Any, rejected: Any) -> Parts:
    """Read lists of chosen and of rejected answers."""
    sides = [value if _several(value) else [value] for value in (chosen, rejected)]
    names = [_named(roles, key) for key in roles["pair"]]
    own = [(f"{name}[{i}]", "(1, 0)") for name, side in zip(names, sides, strict=True) for i in range(len(side))]
    columns = Columns(_prompt_name(roles), ", ".join(names), "(1, 0)", own)
    scores = [1.0] * len(sides[0]) + [0.0] * len(sides[1])
    return _parts(row, roles, where, [*sides[0], *sides[1]], scores, columns)


def _implicit(chosen: Any, rejected: Any, where: str, names: Columns) -> tuple[Any, list[Any]]:
    """Split off what chosen and rejected share."""
    a, b = (name for name, _ in names.own or ())
    kinds = {type(chosen), type(rejected)}
    if kinds not in ({str}, {list}):
        raise BadRow(
            f"{where}: '{a}' is {short(chosen)} and '{b}' {short(rejected)}, expected both text or both messages. {FIX}"
        )
    shorter, longer = sorted((chosen, rejected), key=len)
    if longer[: len(shorter)] == shorter:
        raise BadRow(
            f"{where}: one of '{a}' and '{b}' is the beginning of the other, so that no prompt can be told from them. "
            "Give a 'prompt' column, or drop the row (on_bad_row='drop')."
        )
    if isinstance(chosen, list):
        return None, [chosen, rejected]  # the form of both is told from the dialogues
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    shared = chosen[: next(i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y)]
    if not re.search(r"\s", shared):
        raise BadRow(
            f"{where}: no prompt. '{a}' and '{b}' share {shared!r} at most at their beginning. Give a 'prompt' "
            "column, or drop the row (on_bad_row='drop')."
        )
    return split["prompt"], [split["chosen"], split["rejected"]]


def _find_last_turn(table: Table) -> dict[str, Any] | None:
    """Find a conversation whose last turn is the chosen answer, beside a rejected one."""
    talk = next((key for key in CONVERSATIONS if table.mostly(key, lambda v: is_conversation(v) and not asks(v))), None)
    rejected = table.first(("rejected_response", "rejected"))
    if talk is None or rejected is None or "chosen" in table:
        return None
    keys = {talk, rejected}
    return {
        "prompt": Prompt(None, *[find_prompt(table, keys).system]),
        "talk": talk,
        "rejected": rejected,
        "keys": keys,
    }


def _read_last_turn(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    talk, rejected = roles["talk"], roles["rejected"]
    turns = as_text(row.get(talk), f"{where}: '{_named(roles, talk)}'")
    columns = Columns(
        _named(roles, talk), _named(roles, rejected), "(1, 0)", [(_named(roles, k),) * 2 for k in (talk, rejected)]
    )
    if not isinstance(turns, list) or len(turns) < 2 or turns[-1].get("role") != "assistant":
        raise BadRow(
            f"{where}: '{_named(roles, talk)}' is {short(turns)}, expected messages that end with the answer. {FIX}"
        )
    parts = _parts(row, roles, where, [turns[-1:], row.get(rejected)], [1.0, 0.0], columns)
    parts.prompt = turns[:-1]
    return [parts]


def _find_tree(table: Table) -> dict[str, Any] | None:
    """Find OASST's trees: messages with replies, ranked."""
    tree = next(
        (k for k in ("prompt", "tree") if table.mostly(k, lambda v: isinstance(v, Mapping) and "replies" in v)), None
    )
    return {"prompt": Prompt(tree), "tree": tree, "keys": {tree}} if tree else None


def _read_tree(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    tree = roles["tree"]
    columns = Columns(_named(roles, tree), "replies", "rank")
    found: list[Parts] = []

    def walk(node: Any, before: list[dict[str, Any]]) -> None:
        if not isinstance(node, Mapping) or not isinstance(node.get("replies") or [], list):
            raise BadRow(
                f"{where}: '{_named(roles, tree)}' has {short(node)}, expected a message with its replies. {FIX}"
            )
        replies = node.get("replies") or []
        thread = [*before, *as_text({"role": node.get("role"), "content": node.get("text")}, where)]
        ranked = [reply for reply in replies if isinstance(reply, Mapping) and reply.get("rank") is not None]
        if thread[-1]["role"] == "user" and len(ranked) > 1:
            texts, ranks = (
                [reply.get("text") for reply in ranked],
                [_negated(reply["rank"], "rank") for reply in ranked],
            )
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            found.append(Parts(thread, answers, ranks, columns))
        for reply in replies:
            walk(reply, thread)

    walk(parsed(row.get(tree), where), [])
    if not found:
        raise BadRow(f"{where}: no message has two ranked replies. Drop the row (on_bad_row='drop').")
    return found


def _find_long(table: Table) -> dict[str, Any] | None:
    """Find one answer a row, with a score or a label."""
    answer = next((k for k in ANSWERS if k in table and table.mostly(k, is_answer)), None)
    if answer is None:
        return None
    prompt = find_prompt(table, {answer})
    if prompt.main is None:
        return None
    taken = prompt.keys | {answer}
    wanted = table.options.score
    known = [
        key for key in (*SCORES, *RANKS, *LABELS) if key in table and key not in taken and table.mostly(key, is_score)
    ]
    if wanted:
        if wanted not in table.names:
            raise ValueError(_no_such(table))
        score = wanted
    elif len(known) > 1:
        raise ValueError(_which_score([table.names[key] for key in known], table, "for one answer a row"))
    elif known:
        score = known[0]
    else:
        numeric = [
            key for key in table.names
            if key not in taken and table.mostly(key, is_number)
            and not re.fullmatch(r"(.*_)?(ids?|idx|index|seed|turn)", key)
        ]  # fmt: skip
        if not numeric:
            return None
        raise ValueError(_which_score([table.names[key] for key in numeric], table, "for one answer a row"))
    return {"prompt": prompt, "answer": answer, "score": score, "keys": {answer, score}}


def _read_long(row: Row, roles: dict[str, Any], where: str) -> list[Parts]:
    answer, score = roles["answer"], roles["score"]
    columns = Columns(
        _prompt_name(roles),
        _named(roles, answer),
        _named(roles, score),
        [(_named(roles, answer), _named(roles, score))],
    )
    return [_parts(row, roles, where, [row.get(answer)], [_negated(row.get(score), _named(roles, score))], columns)]


def _which_score(names: list[str], table: Table, where: str) -> str:
    names = [name.rstrip("_") for name in names]
    return (
        f"Several columns {where} may be the score: {', '.join(repr(name) for name in names)}. Say which: "
        f"score_column={names[0]!r}."
        if len(names) > 1
        else f"The column {names[0]!r} {where} may be the score. Say so: score_column={names[0]!r}."
    )


def _no_such(table: Table) -> str:
    near = difflib.get_close_matches(table.options.score or "", table.names, 1, 0.6)
    hint = f" Did you mean '{table.names[near[0]]}'?" if near else ""
    return f"score_column is '{table.options.score_column}', and the columns are {sorted(table.names.values())}.{hint}"


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("nested", "UltraFeedback, Nectar", _find_nested, _read_nested),
        Shape("lists", "RLHFlow, distilabel", _find_lists, _read_lists),
        Shape("tree", "OASST", _find_tree, _read_tree),
        Shape("wide", "WebGPT, SHP, the published NCA data", _find_wide, _read_wide),
        Shape("pairs", "UltraFeedback binarised, HH-RLHF, Orca DPO", _find_pairs, _read_pairs),
        Shape("last_turn", "ms-swift", _find_last_turn, _read_last_turn),
        Shape("compared", "HelpSteer2 preferences, Chatbot Arena, PandaLM", _find_compared, _read_compared),
        Shape("long", "HelpSteer2, KTO", _find_long, _read_long, joined=True),
    )
}


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class Reading:
    """How the rows of one data set are read."""

    shape: str
    roles: dict[str, Any]
    options: Options
    names: dict[str, str]  # key -> column
    read_columns: list[str]
    unread_columns: list[str]
    prompt_repeats: bool = False

    @property
    def joined(self) -> bool:
        return SHAPES[self.shape].joined

    def __call__(self, values: Mapping[str, Any], where: str) -> list[Parts]:
        """Read the columns of a row, unchecked."""
        return SHAPES[self.shape].read(by_key(values, self.options), self.roles, where)


def by_key(values: Mapping[str, Any], options: Options) -> Row:
    """Return a row's values by key, the columns that the user names under their roles."""
    row = {key_of(name): value for name, value in values.items() if name not in OWN_COLUMNS and name != DECIMAL_COMMA}
    if values.get(DECIMAL_COMMA):
        row[DECIMAL_COMMA] = True
    named = {role: row.get(key_of(column)) for role, column in options.columns.items() if column}
    hidden = {key_of(column) or role for role, column in options.columns.items()}
    return {key: value for key, value in row.items() if key not in hidden} | named


def recognise(rows: list[Mapping[str, Any]], columns: list[str], options: Options, shape: str | None = None) -> Reading:
    """Recognise the shape of a data set by its columns and a few rows.

    Args:
        rows: the first rows, which may be bad ones.
        columns: of the data set.
        options: what the user says.
        shape: the name of the only shape to try.

    Raises:
        ValueError: no shape fits, several columns may have a role, or two columns differ in case alone; says what was
            found, what it resembles and what to type.
    """
    names: dict[str, str] = {}
    for column in columns:
        if column in OWN_COLUMNS or column == DECIMAL_COMMA:
            continue
        if names.setdefault(key_of(column), column) != column:
            raise ValueError(
                f"The columns '{names[key_of(column)]}' and '{column}' differ in case or punctuation alone. Rename one."
            )
    given = dict(names)
    for role, column in options.columns.items():
        if column and key_of(column) not in names:
            near = difflib.get_close_matches(key_of(column), names, 1, 0.5)
            hint = f" Did you mean '{names[near[0]]}'?" if near else ""
            raise ValueError(
                f"columns='{role}={column}': there is no column '{column}', but {sorted(names.values())}.{hint}"
            )
        if role not in ROLES:
            raise ValueError(
                f"columns='{role}={column}': '{role}' is no part of a group. Parts are {', '.join(ROLES)}."
            )
    used = [key_of(column) for column in options.columns.values() if column]
    if len(set(used)) < len(used):
        raise ValueError(f"columns={dict(options.columns)!r} gives one column two roles. Give each one.")
    for role, column in options.columns.items():
        given.pop(key_of(column) or role, None)
    given |= {role: column for role, column in options.columns.items() if column}
    table = Table([by_key(row, options) for row in rows], given, options)
    for found in SHAPES.values() if shape is None else [SHAPES[shape]]:
        roles = found.find(table)
        if roles is None:
            continue
        roles["names"] = given
        keys = roles["keys"] | roles["prompt"].keys
        read = [given[key] for key in given if key in keys]
        unread = [name for name in names.values() if name not in read]
        reading = Reading(found.name, roles, options, given, read, unread)
        reading.prompt_repeats = _prompt_repeats(reading, rows)
        return reading
    raise ValueError(_unknown(table))


def _prompt_repeats(reading: Reading, rows: list[Mapping[str, Any]]) -> bool:
    """Whether every text of these rows begins with its prompt."""
    seen = 0
    for row in rows:
        try:
            found = reading(row, "")
        except BadRow:
            continue
        for parts in found:
            texts = [parts.prompt, *parts.completions]
            if not all(isinstance(text, str) for text in texts) or not parts.prompt:
                return False
            if not all(text.startswith(parts.prompt) for text in parts.completions):
                return False
            seen += 1
    return seen > 0


def _unknown(table: Table) -> str:
    """Say what the columns are, what they resemble and what to type."""
    kinds = {key: _kind(table, key) for key in table.names}
    listing = ", ".join(f"{name!r} ({kinds[key]})" for key, name in table.names.items())
    guess = _guess(kinds, table)
    return (
        f"No groups found in the columns {listing}. Expected a prompt, and completions with a score each (lists, "
        f"numbered columns, or one a row), or chosen and rejected. Say which column is which, {guess}."
    )


def _kind(table: Table, key: str) -> str:
    tests = {"number": is_number, "messages": is_conversation, "text": is_text, "list": is_list}
    return next(
        (name for name, test in tests.items() if table.mostly(key, test)),
        "empty" if not table.values(key) else "object",
    )


def _guess(kinds: Mapping[str, str], table: Table) -> str:
    words = {*SCORES, *RANKS, *LABELS, *WINNERS, *SYSTEMS, "judgment", "judgement", "mask", "history"}
    about = [k for k in kinds if ABOUT.fullmatch(k) or set(k.split("_")) & words]
    texts = [table.names[k] for k, kind in kinds.items() if kind in ("text", "messages") and k not in about]
    lists = [table.names[k] for k, kind in kinds.items() if kind == "list"]
    numbers = [table.names[k] for k, kind in kinds.items() if kind == "number" and not ABOUT.fullmatch(k)]
    prompt = _prompt_or_none(table)
    prompt_name = table.names[prompt] if prompt else (texts or ["NAME"])[0]
    texts = [name for name in texts if name != prompt_name]
    if len(lists) >= 2:
        return f"for instance columns='prompt={prompt_name},completions={lists[0]},scores={lists[1]}'"
    if len(texts) == 1 and numbers:
        return (
            f"for instance columns='prompt={prompt_name},completion={texts[0]},score={numbers[0]}' (one answer a row)"
        )
    if lists:
        return f"for instance columns='prompt={prompt_name},completions={lists[0]},scores=NAME'"
    return f"for instance columns='prompt={prompt_name},chosen=NAME,rejected=NAME'"


def _prompt_or_none(table: Table) -> str | None:
    with contextlib.suppress(ValueError):
        return find_prompt(table).main
    return None


def first_rows(rows: Iterable[Mapping[str, Any]], n: int = SAMPLE) -> list[Mapping[str, Any]]:
    """Return the first rows."""
    return list(itertools.islice(rows, n))
