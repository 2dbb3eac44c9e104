"""Mutated data sets through the door of the command: each is read as it stands, or refused with a sentence.

    python benchmarks/door_fuzz.py [--cases 700] [--seed 0] [--only NUMBER ...] [--keep FOLDER]

A case is a small data set in one of the published shapes, mutated once or twice (values, keys, cells, bytes, names),
and written as JSON, a table, Parquet, a spreadsheet or a folder. It goes through ``load_splits`` and
``prepare_groups``, with ``on_bad_row="drop"`` in every second case. The same file is read again by the code below,
which knows the shape and uses nothing but json, csv, pyarrow and openpyxl. The two are compared by token ids:

- groups: each accepted group holds the texts and scores of a row, in order, and every row is accepted or counted;
- refused: an error of ours. "good refused" counts those of files in which every row is good, and cases in which good
  rows are dropped and counted. They are loud, and no faults here;
- wrong: a group that no row holds, a bad row that is accepted, or a good row that is lost without being counted;
- crash: any other exception, a process that dies, or more than a minute.

Prints a table of mutations and outcomes, then each crash and each wrong case. Their files are kept in a folder, and
the exit status is 1. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig

import contrastive_align
from contrastive_align import demo
from contrastive_align.data import BadRow, prepare_groups
from contrastive_align.data.columns import read_options
from contrastive_align.data.files import FileProblem
from contrastive_align.launch.arguments import Arguments, RunArguments
from contrastive_align.launch.datasets import load_splits
from contrastive_align.launch.usage import UsageError


SECONDS = 60  # for one case
LARGEST = 3.4028234663852886e38  # in float32
HAS_OPENPYXL = find_spec("openpyxl") is not None
# Unlike the bundled template it writes the roles, so that a swapped role is seen.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PACKAGE = str(Path(contrastive_align.__file__).parent)
ROLES = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
    "developer": "developer", "bot": "assistant", "model": "assistant",
}  # fmt: skip
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- good rows

WORDS = "How are the red café, you; said: 'no' \"yes\" 好 🎉 1.5 and\nwell | a\tb # x".split(" ")


def sentence(rng: random.Random) -> str:
    return f"{' '.join(rng.choices(WORDS, k=rng.randint(2, 6)))} {rng.randrange(10**6)}"


@dataclass
class Case:
    """A data set: how it is spelled, mutated, written and read."""

    number: int
    shape: str
    chat: str | None  # None, "role" or "from"
    format: str
    drop: bool
    hard: bool
    columns: dict[str, str]  # part -> column
    k: int
    rows: list[Row] = field(default_factory=list)
    mutations: list[str] = field(default_factory=list)
    delimiter: str = ","
    encoding: str = "utf-8"
    ending: str | None = None  # instead of the one of the format
    name: str = "rows"
    folder: str | None = None  # "splits", "shards" or "nested"
    text_edits: list[Callable[[str], str]] = field(default_factory=list)
    byte_edits: list[Callable[[bytes], bytes]] = field(default_factory=list)
    doubtful: bool = False  # the file may be refused, though its rows are good
    ascii: bool = False
    compression: str | None = None  # the ending
    members: int = 1  # of the compressed file
    arrow_types: str | None = None
    stream: bool = False
    written: str = "numbers"  # how the scores are: "numbers", "percentages", or labels: "words", "truths"


SHAPES = ("lists", "pairs", "rated", "lettered", "wide", "long", "nested", "compared", "tagged", "openai")
JOINED = ("long", "tagged")  # a row is one answer
TRUTHS = {"words": ("yes", "no"), "truths": ("True", "False")}
TABLES = {"csv": ",", "tsv": "\t"}


def columns_of(shape: str, chat: str | None, rng: random.Random) -> dict[str, str]:
    prompt = "conversations" if chat == "from" and shape in ("pairs", "rated") else "prompt"
    named = {
        "lists": [{"answers": "completions", "scores": "scores"}, {"answers": "responses", "scores": "rewards"}],
        "pairs": [{"chosen": "chosen", "rejected": "rejected"}],
        "rated": [
            {"chosen": "chosen", "rejected": "rejected", "a": "chosen_rating", "b": "rejected_rating"},
            {"chosen": "chosen", "rejected": "rejected", "a": "score_chosen", "b": "score_rejected"},
        ],
        "lettered": [{"answer": "A", "score": "score_A", "first": "0"}],
        "wide": [{"answer": "answer_", "score": "score_", "first": "1"}],
        "long": [{"answer": "response", "score": "score"}, {"answer": "completion", "score": "label"}],
        "nested": [{"answers": a, "text": t, "score": "score"} for a in ("answers", "completions")
                   for t in ("text", "response")],
        "compared": [{"a": "response_a", "b": "response_b", "winner": "winner"},
                     {"a": "first_answer", "b": "second_answer", "winner": "preference"}],
        "tagged": [{"talk": "messages", "score": "kto_tag"}, {"talk": "conversations", "score": "label"}],
        "openai": [{"chosen": "preferred_output", "rejected": "non_preferred_output", "prompt": "input"}],
    }  # fmt: skip
    return {"prompt": prompt, **rng.choice(named[shape])}


def own_columns(case: Case) -> list[tuple[str, str]]:
    first = int(case.columns["first"])
    return [(f"{case.columns['answer']}{i}", f"{case.columns['score']}{i}") for i in range(first, first + case.k)]


def spell_rows(case: Case, rng: random.Random) -> list[Row]:
    """Good groups in the spelling of the case."""
    c, rows = case.columns, []
    for _ in range(rng.randint(4, 7)):
        prompt, shared = sentence(rng), rng.choice(["", "The answer is ", "It "])
        answers = [shared + sentence(rng) for _ in range(case.k)]
        scores: list[Any] = rng.sample([0, 1, 2, 3, 4, 0.5, 2.5, -1.25, 7, 1e-3], case.k)
        if c.get("score") in ("label", "kto_tag"):
            scores = [rng.randint(0, 1) for _ in scores]
            if case.written in TRUTHS:
                scores = [TRUTHS[case.written][1 - score] for score in scores]
        elif case.written == "percentages":
            scores = [f"{abs(10 * score):g}%" for score in scores]
        if case.chat:
            role, content, user, assistant = (
                ("role", "content", "user", "assistant") if case.chat == "role" else ("from", "value", "human", "gpt")
            )
            before = [{role: "system", content: "Be kind."}] if rng.random() < 0.3 else []
            if rng.random() < 0.3:
                before += [{role: user, content: "Hi!"}, {role: assistant, content: "Hello."}]
            prompt = [*before, {role: user, content: prompt}]
            answers = [[{role: assistant, content: a}] for a in answers]
            if rng.random() < 0.3:
                answers = [a[0] for a in answers]
        if case.shape == "lists":
            rows.append({c["prompt"]: prompt, c["answers"]: answers, c["scores"]: scores})
        elif case.shape in ("pairs", "rated"):
            row = {c["prompt"]: prompt, c["chosen"]: answers[0], c["rejected"]: answers[1]}
            rows.append(row | ({c["a"]: scores[0], c["b"]: scores[1]} if case.shape == "rated" else {}))
        elif case.shape in ("lettered", "wide"):
            own = own_columns(case)
            row = {c["prompt"]: prompt} | {a: x for (a, _), x in zip(own, answers, strict=True)}
            rows.append(row | {s: x for (_, s), x in zip(own, scores, strict=True)})
        elif case.shape == "compared":
            marks = [key.split("_")[0] if key.endswith("answer") else key[-1] for key in (c["a"], c["b"])]
            winner = rng.choice([*marks, *marks, f"response_{marks[0]}", marks[1].upper(), "tie", "Tie (both bad)"])
            rows.append({c["prompt"]: prompt, c["a"]: answers[0], c["b"]: answers[1], c["winner"]: winner})
        elif case.shape == "tagged":
            turns = [a if isinstance(a, list) else [a] for a in answers]
            rows += [{c["talk"]: [*prompt, *turn], c["score"]: s} for turn, s in zip(turns, scores, strict=True)]
        elif case.shape == "openai":
            turns = [a if isinstance(a, list) else [a] for a in answers]
            rows.append({c["prompt"]: {"messages": prompt}, c["chosen"]: turns[0], c["rejected"]: turns[1]})
        elif case.shape == "long":
            rows += [{c["prompt"]: prompt, c["answer"]: a, c["score"]: s} for a, s in zip(answers, scores, strict=True)]
        else:
            items = [{c["text"]: a, c["score"]: s} for a, s in zip(answers, scores, strict=True)]
            rows.append({c["prompt"]: prompt, c["answers"]: items})
    if case.shape in JOINED and rng.random() < 0.5:
        rng.shuffle(rows)
    return rows


# ---------------------------------------------------------------------------------------------------------- mutations
# "@raw:1.50" is written as the number 1.50, and the key "@dup:prompt" as another "prompt".


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a row."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _place(case: Case, rng: random.Random, kind: type | tuple[type, ...] = object) -> tuple[Any, Any]:
    places = [p for p in _places(rng.choice(case.rows)) if isinstance(p[0][p[1]], kind)]
    return rng.choice(places) if places else (case.rows[0], case.columns["prompt"])


def _replace(kind: Any, values: Callable[[random.Random], Any]) -> Callable[[Case, random.Random], None]:
    def mutate(case: Case, rng: random.Random) -> None:
        container, key = _place(case, rng, kind)
        container[key] = values(rng)

    return mutate


def _one_of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda rng: copy.deepcopy(rng.choice(values))


def _nest(case: Case, rng: random.Random) -> None:
    container, key = _place(case, rng)
    value = container[key]
    container[key] = rng.choice([[value], {"text": value}, json.dumps(value), [[value]], {"content": value}])


def _missing(case: Case, rng: random.Random) -> None:
    container, key = _place(case, rng)
    del container[key]


def _missing_prompt(case: Case, rng: random.Random) -> None:
    rng.choice(case.rows).pop(case.columns["prompt"], None)


def _duplicate(case: Case, rng: random.Random) -> None:
    row = rng.choice(case.rows)
    inner = [c for c, _ in _places(row) if isinstance(c, dict)] or [row]
    found = rng.choice([row, *inner])
    if found:
        key = rng.choice(list(found))
        found[f"@dup:{key}"] = copy.deepcopy(found[key]) if rng.random() < 0.3 else "another"


EXTRA = (
    "id", "note", "source", "length", "topic", "system", "input", "context", "index", "model", "Unnamed: 0", "",
    "text_2", "tokens_1", "rank", "metadata", "__row__", "winner", "score_mean", "history", "tools", "label",
)  # fmt: skip


def _extra(case: Case, rng: random.Random) -> None:
    name = rng.choice(EXTRA)
    values = _one_of("a text", 7, 0.5, None, True, ["x"], {"a": 1}, "2021-01-11", "")
    told = values(rng)
    for row in case.rows if rng.random() < 0.6 else [rng.choice(case.rows)]:
        row[name] = told if rng.random() < 0.8 else values(rng)
    case.doubtful = True


def _header_case(case: Case, rng: random.Random) -> None:
    def renamed(name: str) -> str:
        return {"upper": name.upper(), "title": name.title(), "space": f" {name}", "dash": name.replace("_", "-")}[how]

    how = rng.choice(["upper", "title", "space", "dash"])
    case.rows[:] = [{renamed(name): value for name, value in row.items()} for row in case.rows]


def _other_k(case: Case, rng: random.Random) -> None:
    row = rng.choice(case.rows)
    lists = [container[key] for container, key in _places(row) if isinstance(container[key], list)]
    if case.shape in ("lettered", "wide"):
        a, s = rng.choice(own_columns(case))
        row[a] = row[s] = None
        if rng.random() < 0.3:
            row[rng.choice([a, s])] = 1
    elif lists:
        found = rng.choice(lists)
        if rng.random() < 0.5 and found:
            del found[rng.randrange(len(found))]
        else:
            found.append(copy.deepcopy(rng.choice(found)) if found else "more")


def _equal(case: Case, rng: random.Random) -> None:
    row = rng.choice(case.rows)
    places = [(c, k) for c, k in _places(row) if isinstance(c[k], str)]
    if len(places) > 1:
        (a, i), (b, j) = rng.sample(places, 2)
        a[i] = b[j]


def _begin(case: Case, rng: random.Random) -> None:
    """All answers of a row, or of all rows, begin with the prompt."""
    for row in case.rows if rng.random() < 0.5 else [rng.choice(case.rows)]:
        prompt = row[case.columns["prompt"]] if case.columns["prompt"] in row else None
        if isinstance(prompt, str):
            for container, key in list(_places(row)):
                if isinstance(container[key], str) and not (container is row and key == case.columns["prompt"]):
                    container[key] = prompt + container[key]


def _text_edit(edit: Callable[[str, random.Random], str]) -> Callable[[Case, random.Random], None]:
    def mutate(case: Case, rng: random.Random) -> None:
        seed = rng.randrange(10**9)
        case.text_edits.append(lambda text: edit(text, random.Random(seed)))

    return mutate


def _blank_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(["", "", " ", "\t", "\r"]))
    return "\n".join(lines)


def _cut_text(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) // 2, len(text))] if rng.random() < 0.8 else text[: rng.randrange(len(text))]


def _garbage(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(['"', "}", "{", "]", ",", "\\", "\n", "null", "\x00", "[", ":", "//"]) + text[at:]


def _garbage_line(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    junk = ["{", "null", "[]", "// note", "{}", "7", '"text"', "[", "}", "NaN", '{"prompt": "p"}', "---", ",,,"]
    lines.insert(rng.randrange(len(lines)), rng.choice(junk))
    return "\n".join(lines)


def _unclosed(text: str, rng: random.Random) -> str:
    at = rng.choice([m.start() for m in re.finditer(r"[,;\t|\n]", text)] or [0])
    return text[: at + 1] + '"' + text[at + 1 :]


def _more_cells(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    delimiter = next((d for d in ",;\t|" if d in lines[0]), ",")
    lines[at] = lines[at].rstrip("\r") + rng.choice([delimiter, f"{delimiter}x", f"{delimiter}{delimiter}"])
    return "\n".join(lines)


def _fewer_cells(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    delimiter = next((d for d in ",;\t|" if d in lines[0]), ",")
    lines[at] = lines[at].rsplit(delimiter, 1)[0]
    return "\n".join(lines)


def _carriage_returns(case: Case, rng: random.Random) -> None:
    case.text_edits.append(lambda text: text.replace("\n", "\r"))
    case.doubtful = True  # such tables are refused


def _bytes(edit: Callable[[bytes, random.Random], bytes]) -> Callable[[Case, random.Random], None]:
    def mutate(case: Case, rng: random.Random) -> None:
        seed = rng.randrange(10**9)
        case.byte_edits.append(lambda data: edit(data, random.Random(seed)))

    return mutate


def _set(**values: tuple) -> Callable[[Case, random.Random], None]:
    def mutate(case: Case, rng: random.Random) -> None:
        for name, choices in values.items():
            setattr(case, name, rng.choice(choices))

    return mutate


def _cut_bytes(data: bytes, rng: random.Random) -> bytes:
    return data[: -rng.choice([1, 4, 8, 9, 20, len(data) // 2, max(1, len(data) - 12)])]


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _compressed(*endings: str, members: int = 1, cut: bool = False) -> Callable[[Case, random.Random], None]:
    def mutate(case: Case, rng: random.Random) -> None:
        case.compression, case.members = rng.choice(endings), members
        if cut:
            _bytes(_cut_bytes)(case, rng)

    return mutate


PACKERS: dict[str | None, Callable[[bytes], bytes]] = {
    None: bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
JSON_LIKE = (
    '["apple", "pear"]', '["apple"]', '{"question": "What is 2?", "format": "json"}', "[]", "{}", "[1, 2]", "null",
    "true", '"quoted"', '{"role": "admin", "content": "x"}', '{"text": "inside"}', " [1] is a note", '{"a": [1, 2.50]}',
    '[["a", "b"]]', "[sic] yes", '{"role": "user"}',
)  # fmt: skip
NUMBERS = (
    "@raw:14", "@raw:1.50", "@raw:1e3", "@raw:-0", "@raw:0.1000000000000000055", "@raw:12345678901234567890",
    "@raw:1E-7", "@raw:9007199254740993",
)  # fmt: skip
SCORES = (
    "@raw:NaN", "@raw:Infinity", "@raw:-Infinity", "@raw:1e400", "nan", "inf", "@raw:1e39", "-inf", "1e400", "NaN",
)  # fmt: skip
HUGE = ("@raw:" + "9" * 400, "@raw:9223372036854775808", "@raw:" + "1" * 38)
SPECIAL = (
    "line\u2028two", "nul\x00 byte", "next\x85line", "cr\rinside", "crlf\r\nin", "\ufeffbom", " spaces ", "tab\t",
    "quote\" and ' and \\", "zero\u200bwidth", "fs\x1cgs\x1d", "e\u0301", "\u00a0hard", "a\n\nb", '""', "<|x|>", "\\n",
)  # fmt: skip
NAMES = (
    "a[1]", "a*b", "what?", "{x}", "a#b", "100%", "a b", "v1.2.3", "train-[0-9]", "ü", "a%20b", "-x", "=1", "a&b",
    "a'b", "a::b", "test", "x.csv", "x.gz", "hf:data",
)  # fmt: skip

ROW_MUTATIONS: dict[str, Callable[[Case, random.Random], None]] = {
    "number": _replace(object, _one_of(*NUMBERS)),
    "number for text": _replace(str, _one_of(*NUMBERS)),
    "bool": _replace(object, _one_of(True, False)),
    "null": _replace(object, _one_of(None)),
    "list": _replace(object, _one_of([], ["a"], ["a", "b"], [1], [None], [["a"], ["b"]])),
    "object": _replace(
        object,
        _one_of({}, {"text": "x"}, {"a": 1}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"},
                {"text": "x", "score": 1}, {"from": "gpt", "value": "z"}, {"role": "narrator", "content": "q"}),
    ),
    "nesting": _nest,
    "missing key": _missing,
    "missing prompt": _missing_prompt,
    "duplicate key": _duplicate,
    "extra column": _extra,
    "header case": _header_case,
    "surrogate": _replace(str, _one_of("half \ud83d", "\udc00", "\ud83d\ude00 whole", "\ud83d x \ude00")),
    "huge integer": _replace((int, float), _one_of(*HUGE)),
    "not finite": _replace((int, float), _one_of(*SCORES)),
    "score as text": _replace(
        (int, float), _one_of("4.5", " 3 ", "4,5", "1,000", "1_000", "+2", "٣", "0x10", "1.", "50%", "4/5", "", "TRUE")
    ),
    "date": _replace(str, _one_of("2021-01-11", "2021-01-11T10:00:00Z", "01/02/2023", "12:30")),
    "NA": _replace(str, _one_of("NA", "null", "007", "None", "nan", "N/A", "1e5", "true", "-", "#N/A", "1.50", "+1")),
    "JSON-like text": _replace(str, _one_of(*JSON_LIKE)),
    "empty list": _replace(list, _one_of([])),
    "empty text": _replace(str, _one_of("", " ", "\n", "\u00a0", "\u200b")),
    "other K": _other_k,
    "equal texts": _equal,
    "prompt in answers": _begin,
    "special characters": _replace(str, _one_of(*SPECIAL)),
}  # fmt: skip
FILE_MUTATIONS: dict[str, Callable[[Case, random.Random], None]] = {
    "truncated": _text_edit(_cut_text),
    "blank lines": _text_edit(_blank_lines),
    "garbage": _text_edit(_garbage),
    "garbage line": _text_edit(_garbage_line),
    "BOM": _set(encoding=("utf-8-sig",)),
    "UTF-16": _set(encoding=("utf-16", "utf-16-be-bom", "utf-32")),
    "UTF-16 without BOM": _set(encoding=("utf-16-le", "utf-16-be")),
    "CRLF": _text_edit(lambda text, rng: text.replace("\n", "\r\n")),
    "CR": _carriage_returns,
    "latin-1": _set(encoding=("latin-1",)),
    "bytes cut": _bytes(_cut_bytes),
    "bit flipped": _bytes(_flip),
    "gzip": _compressed(".gz"),
    "gzip cut": _compressed(".gz", cut=True),
    "several members": _compressed(".gz", ".bz2", ".zst", members=2),
    "bzip2, zstd": _compressed(".bz2", ".zst"),
    "wrong ending": _set(
        ending=(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".arrow", ".jsonl.gz", ".csv.gz", ".txt",
                ".JSONL", ".Csv", ".dat", ".parquet.gz", ".jsonl.zst", ".jsonl.bz2"),
    ),
    "unclosed quote": _text_edit(_unclosed),
    "more cells": _text_edit(_more_cells),
    "fewer cells": _text_edit(_fewer_cells),
    "file name": _set(name=NAMES),
    "folder": _set(folder=("splits", "shards", "nested")),
    "column types": _set(
        arrow_types=("large_string", "dictionary", "float32", "decimal", "binary", "timestamp", "row groups", "null",
                     "int8", "date", "map"),
    ),
}  # fmt: skip
FORMATS = ("jsonl", "jsonl", "json list", "json object", "json pretty", "csv", "csv", "tsv", "parquet", "xlsx")
NONE = "none"


def make_case(seed: int, number: int) -> Case:
    """The data set of this number, in memory."""
    rng = random.Random(f"{seed} {number}")
    shape = rng.choice(SHAPES)
    chat = rng.choice([None, None, None, "role", "from"])
    chat = (chat or "role") if shape == "tagged" else "role" if shape == "openai" else chat
    style = rng.choice(FORMATS)
    if style == "xlsx" and not HAS_OPENPYXL:
        style = "csv"
    case = Case(
        number=number,
        shape=shape,
        chat=chat,
        format=style,
        drop=number % 2 == 1,
        hard=rng.random() < 0.2,
        columns=columns_of(shape, chat, rng),
        k=2 if shape in ("pairs", "rated", "compared", "openai") else rng.randint(2, 4),
    )
    if case.columns.get("score") in ("label", "kto_tag"):
        case.written = rng.choice(["numbers", "words", "truths"])
    elif shape in ("lists", "wide", "long", "nested") and rng.random() < 0.2:
        case.written = "percentages"
    case.rows = spell_rows(case, rng)
    case.delimiter = "\t" if style == "tsv" else rng.choice(",,;\t|") if style == "csv" else ","
    case.ascii = rng.random() < 0.5
    case.stream = shape not in JOINED and rng.random() < 0.1
    if number % 20 == 0:
        case.mutations = [NONE]
        return case
    names = [rng.choice(list(rng.choice([ROW_MUTATIONS, ROW_MUTATIONS, FILE_MUTATIONS])))]
    if rng.random() < 0.35:
        names.append(rng.choice(list(rng.choice([ROW_MUTATIONS, FILE_MUTATIONS]))))
    for name in dict.fromkeys(names):
        case.mutations.append(name)
        (ROW_MUTATIONS.get(name) or FILE_MUTATIONS[name])(case, rng)
    return case


# ------------------------------------------------------------------------------------------------------------ writing


def _dumps(value: Any, case: Case, **options: Any) -> str:
    text = json.dumps(value, ensure_ascii=case.ascii or _has_half(value), **options)
    return re.sub(r'"@raw:([^"]*)"', r"\1", text).replace('"@dup:', '"')


def _has_half(value: Any) -> bool:
    return bool(re.search(r"[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)))


def _cell(value: Any, case: Case) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.removeprefix("@raw:")
    if isinstance(value, float) and case.delimiter == ";" and case.number % 3 == 0:
        return str(value).replace(".", ",")
    return _dumps(value, case) if isinstance(value, list | dict) else str(value)


def _write_table(rows: list[Row], case: Case) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, delimiter=case.delimiter, lineterminator="\n")
    writer.writerow([name.removeprefix("@dup:") for name in names])
    writer.writerows([_cell(row.get(name), case) for name in names] for row in rows)
    return out.getvalue()


def _arrow_value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("@raw:"):
        number = value.removeprefix("@raw:")
        return int(number) if re.fullmatch(r"-?\d+", number) else float(number)
    if isinstance(value, dict):
        return {key: _arrow_value(item) for key, item in value.items()}
    return [_arrow_value(item) for item in value] if isinstance(value, list) else value


def _with_types(table: pa.Table, kind: str | None) -> pa.Table:
    def cast(column: pa.ChunkedArray) -> pa.ChunkedArray:
        target = {
            (True, "large_string"): pa.large_string(), (True, "dictionary"): pa.dictionary(pa.int32(), pa.string()),
            (True, "binary"): pa.binary(), (False, "float32"): pa.float32(), (False, "decimal"): pa.decimal128(20, 6),
            (False, "int8"): pa.int8(),
        }.get((pa.types.is_string(column.type), kind or ""))  # fmt: skip
        if target is None or not (pa.types.is_string(column.type) or pa.types.is_primitive(column.type)):
            return column
        try:
            return column.cast(target) if kind != "dictionary" else column.dictionary_encode()
        except pa.ArrowInvalid:
            return column

    table = pa.table({name: cast(table[name]) for name in table.column_names})
    n = len(table)
    extra = {
        "timestamp": lambda: pa.array([datetime.datetime(2021, 1, 11)] * n), "null": lambda: pa.nulls(n),
        "date": lambda: pa.array([datetime.date(2021, 1, 11)] * n),
        "map": lambda: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    }.get(kind or "")  # fmt: skip
    return table.append_column("when", extra()) if extra else table


def written(rows: list[Row], case: Case) -> bytes:
    """The bytes of a file with these rows; a format that cannot hold them becomes JSON lines."""
    if case.format == "parquet":
        try:
            table = _with_types(pa.Table.from_pylist(_arrow_value(rows)), case.arrow_types)
            out = pa.BufferOutputStream()
            pq.write_table(table, out, row_group_size=2 if case.arrow_types == "row groups" else None)
            return _packed(out.getvalue().to_pybytes(), case)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
            case.format = "jsonl"
    if case.format == "xlsx":
        try:
            return _packed(_write_sheet(rows, case), case)
        except Exception:  # of openpyxl, for characters that a sheet cannot hold
            case.format = "jsonl"
    if case.format == "json list":
        text = _dumps(rows, case, indent=None if case.number % 3 else 2) + "\n"
    elif case.format == "json object":
        text = _dumps({"data": rows} | ({"version": "1"} if case.number % 3 else {}), case)
        text = f'{{"data": [\n{text[10:]}\n' if case.number % 4 else _dumps({"data": rows}, case, indent=1)
    elif case.format == "json pretty":
        text = "[\n" + ",\n".join(_dumps(row, case, indent=1) for row in rows) + "\n]"
    elif case.format in TABLES:
        text = _write_table(rows, case)
    else:
        text = "".join(f"{_dumps(row, case)}\n" for row in rows)
    for edit in case.text_edits:
        text = edit(text)
    if case.encoding == "utf-16-be-bom":
        data = b"\xfe\xff" + text.encode("utf-16-be", "surrogatepass")
    elif case.encoding == "latin-1":
        data = text.encode("latin-1", "replace")
    else:
        data = text.encode(case.encoding, "surrogatepass")
    return _packed(data, case)


def _write_sheet(rows: list[Row], case: Case) -> bytes:
    from openpyxl import Workbook

    book = Workbook()
    names = list(dict.fromkeys(name for row in rows for name in row))
    book.active.append([name.removeprefix("@dup:") for name in names])
    for row in _arrow_value(rows):
        cells = [row.get(name) for name in names]
        book.active.append([_dumps(cell, case) if isinstance(cell, list | dict) else cell for cell in cells])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def _packed(data: bytes, case: Case) -> bytes:
    size = -(-len(data) // case.members)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    data = b"".join(PACKERS[case.compression](part) for part in parts)
    for edit in case.byte_edits:
        data = edit(data)
    return data


def write_case(case: Case, folder: Path) -> tuple[str, dict[str, list[Path]]]:
    """Write the files; return the name that the command is given, and split -> files."""
    data = written(case.rows, case)
    ending = {"csv": ".csv", "tsv": ".tsv", "parquet": ".parquet", "xlsx": ".xlsx", "jsonl": ".jsonl"}
    ending = case.ending or ending.get(case.format, ".json")
    if case.compression and not case.ending:
        ending += case.compression
    if case.folder is None:
        path = folder / f"{case.name}{ending}"
        path.write_bytes(data)
        return str(path), {"train": [path]}
    root = folder / f"{case.name}.d"
    plain = copy.copy(case)
    plain.text_edits, plain.byte_edits = [], []
    good = written(spell_rows(plain, random.Random(case.number)), plain)
    names = {
        "splits": {"train": [f"train{ending}"], "test": [f"test{ending}"]},
        "shards": {"train": [f"data/train-0{ending}", f"data/train-1{ending}"]},
        "nested": {"train": [f"train/{case.name}{ending}"], "test": [f"validation.old/eval{ending}"]},
    }[case.folder]
    if case.folder == "nested":
        names["validation"] = names.pop("test")
    found: dict[str, list[Path]] = {}
    for split, files in names.items():
        for at, name in enumerate(files):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if split == "train" and at == 0 else good)
            found.setdefault(split, []).append(path)
    (root / "README.md").write_text("About these rows.\n")
    return str(root), found


# ------------------------------------------------------------------------------------------- the reading of our own


class Bad(Exception):
    """A row, or a file, that must be refused."""


@dataclass(frozen=True)
class Number:
    """A number as it is written."""

    text: str


@dataclass(frozen=True)
class Told:
    """A conversation that is read already."""

    turns: list[tuple[str, str]]


class Twice(dict):
    """An object in which a key stands twice."""


@dataclass
class Group:
    prompt: Any
    completions: list[Any]
    scores: list[float]


@dataclass
class Reading:
    """What a row may be read as. ``must``: it is good, and has to be there; no groups: it has to be refused."""

    groups: list[Group]
    must: bool = True
    few: bool = False  # fewer than two different answers: dropped without an error
    why: str = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return (dict if len(dict(pairs)) == len(pairs) else Twice)(pairs)


def _loads(text: str) -> Any:
    return json.loads(text, parse_float=Number, parse_int=Number, parse_constant=Number, object_pairs_hook=_object)


def _unpacked(path: Path, case: Case) -> bytes:
    data = path.read_bytes()
    try:
        if case.compression == ".gz":
            return gzip.decompress(data)
        if case.compression == ".bz2":
            return bz2.decompress(data)
        if case.compression == ".zst":
            return b"".join(pa.input_stream(pa.py_buffer(part), compression="zstd").read() for part in _frames(data))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Bad(f"compressed data: {error}") from error
    return data


def _frames(data: bytes) -> list[bytes]:
    magic = b"\x28\xb5\x2f\xfd"
    starts = [m.start() for m in re.finditer(re.escape(magic), data)]
    return [data[a:b] for a, b in itertools.pairwise([*starts, len(data)])]


def _decoded(data: bytes, case: Case) -> str:
    encoding = {"utf-8": "utf-8-sig", "utf-16-be-bom": "utf-16"}.get(case.encoding, case.encoding)
    if encoding in ("latin-1", "utf-16-le", "utf-16-be"):  # without a mark the file says nothing of its encoding
        if encoding != "latin-1" or not data.isascii():
            raise Bad("not UTF-8")
        encoding = "ascii"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Bad(f"not {encoding}: {error}") from error


def file_rows(path: Path, case: Case) -> list[Any]:
    """The rows of a file: dicts, or Bad for one that is none. Raises Bad where the file must be refused."""
    data = _unpacked(path, case)
    if case.format == "parquet":
        try:
            return [_numbered(row) for row in pq.read_table(pa.BufferReader(data)).to_pylist()]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise Bad(f"Parquet: {error}") from error
    if case.format == "xlsx":
        return _sheet_rows(data)
    text = _decoded(data, case)
    return _table_rows(text, case) if case.format in TABLES else _json_rows(text)


def _numbered(value: Any) -> Any:
    if isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
        return Number(str(value) if isinstance(value, decimal.Decimal) else repr(value))
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    return [_numbered(item) for item in value] if isinstance(value, list) else value


def _json_rows(text: str) -> list[Any]:
    with contextlib.suppress(ValueError, RecursionError):
        whole = _loads(text)
        if isinstance(whole, list):
            return [row if isinstance(row, dict) else Bad("no object") for row in whole]
        if isinstance(whole, dict) and "data" in whole:
            if isinstance(whole, Twice) or not isinstance(whole["data"], list):
                raise Bad("an object whose rows are not told")
            return [row if isinstance(row, dict) else Bad("no object") for row in whole["data"]]
    first = text.lstrip().split("\n", 1)[0]
    if first.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            _loads(first)  # a line by itself, among others
            first = ""
    if first.startswith("["):
        raise Bad("a list that is no JSON")
    rows: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                row = _loads(line)
            except (ValueError, RecursionError) as error:
                row = Bad(f"no JSON: {error}")
            rows.append(row if isinstance(row, dict | Bad) else Bad("no object"))
    return rows


def _table_rows(text: str, case: Case) -> list[Any]:
    try:
        lines = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=case.delimiter, strict=True) if row]
    except csv.Error as error:
        raise Bad(f"table: {error}") from error
    return _cells_as_rows(lines)


def _cells_as_rows(lines: list[list[Any]]) -> list[Any]:
    if not lines:
        raise Bad("no header")
    header = ["" if name is None else str(name).strip() for name in lines[0]]
    while header and not header[-1]:
        header.pop()
    named = [name for name in header if name]
    if not header or len(set(named)) < len(named):
        raise Bad("a header without names, or with one twice")
    nameless = [i for i, name in enumerate(header) if i and not name]
    if any(cells[i] not in (None, "") for cells in lines[1:] if len(cells) >= len(header) for i in nameless):
        raise Bad("a column without a name that has cells")
    rows: list[Any] = []
    for cells in lines[1:]:
        if len(cells) < len(header) or any(cell not in (None, "") for cell in cells[len(header) :]):
            rows.append(Bad("another number of cells"))
        elif [str(cell).strip() for cell in cells[: len(header)]] == header:
            rows.append(Bad("the header once more"))
        elif any(cell not in (None, "") for cell in cells):
            told = enumerate(zip(header, cells, strict=False))
            rows.append({name: None if cell == "" else cell for i, (name, cell) in told if name or not i})
    return rows


def _sheet_rows(data: bytes) -> list[Any]:
    from openpyxl import load_workbook

    try:
        sheet = load_workbook(io.BytesIO(data), data_only=True).active
    except Exception as error:
        raise Bad(f"spreadsheet: {error}") from error
    lines = [list(row) for row in sheet.iter_rows(values_only=True) if any(cell is not None for cell in row)]
    as_text = [[c if c is None or isinstance(c, str) else str(c).upper() if isinstance(c, bool) else repr(c)
                for c in row] for row in lines]  # fmt: skip
    return _cells_as_rows(as_text)


class RowReader:
    """Reads the rows of one data set, whose shape is known."""

    def __init__(self, case: Case) -> None:
        self.case, self.c = case, case.columns
        self.table = case.format in TABLES or case.format == "xlsx"
        self.decimal_comma = case.format in TABLES and case.delimiter != ","
        self.doubt = False

    def read(self, raw: Any) -> Reading:
        self.doubt = self.case.doubtful
        try:
            if isinstance(raw, Bad):
                raise raw
            _check_keys(raw)
            row = {re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_"): value for name, value in raw.items()}
            self.doubt |= len(row) < len(raw) or any(_has_half_of(value) for value in row.values())
            found = [group for parts in self.parts(row) for group in self.groups(*parts, row)]
            if self.case.shape == "compared" and any(len(set(map(repr, g.completions))) < 2 for g in found):
                self.doubt = True
        except Bad as error:
            return Reading([], False, False, str(error))
        if self.case.shape in JOINED:
            return Reading(found, not self.doubt)
        kept = [group for group in map(_distinct, found) if group is not None]
        if not kept:
            return Reading([], False, True, "fewer than two different answers")
        return Reading([self.finished(g) for g in kept], not self.doubt and len(kept) == len(found))

    def finished(self, group: Group) -> Group:
        case, best = self.case, max(group.scores)
        if case.hard and best > min(group.scores):
            group = Group(group.prompt, group.completions, [float(s == best) for s in group.scores])
        if case.shape == "nested" and case.columns["text"] == "response" and isinstance(group.prompt, str):
            return _in_chat(group)
        return group

    # Parts: a prompt, and answers and scores side by side; all as they stand.

    def parts(self, row: Row) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        c, shape = self.c, self.case.shape
        prompt = row.get(c["prompt"])
        if shape == "lists":
            yield prompt, self.listed(row.get(c["answers"])), self.listed(row.get(c["scores"]))
        elif shape == "nested":
            items = self.listed(row.get(c["answers"]))
            if not all(isinstance(item, dict) for item in items):
                raise Bad("an answer that is no object")
            yield prompt, [item.get(c["text"]) for item in items], [item.get(c["score"]) for item in items]
        elif shape == "long":
            yield prompt, [row.get(c["answer"])], [row.get(c["score"])]
        elif shape == "compared":
            answers = [row.get(c["a"]), row.get(c["b"])]
            yield prompt, answers, self.better(row.get(c["winner"]), answers)
        elif shape == "tagged":
            if isinstance(row.get(c["talk"]), str):
                with contextlib.suppress(ValueError, RecursionError):
                    _check_keys({"": _loads(row[c["talk"]])})
            for turns in self.texts(row.get(c["talk"])):
                if isinstance(turns, str) or len(turns) < 2 or turns[-1][0] != "assistant":
                    raise Bad("no conversation that ends with an answer")
                yield Told(turns[:-1]), [Told(turns[-1:])], [row.get(c["score"])]
        elif shape == "openai":
            yield from self.pair(self.messages_in(prompt), row)
        elif shape in ("pairs", "rated"):
            yield from self.pair(prompt, row)
        else:
            own = [(row.get(a.lower()), row.get(s.lower())) for a, s in own_columns(self.case)]
            self.doubt |= any(a == "" for a, _ in own)
            own = [(a, s) for a, s in own if a not in (None, "") or s not in (None, "")]
            yield prompt, [a for a, _ in own], [s for _, s in own]

    def pair(self, prompt: Any, row: Row) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        c = self.c
        chosen, rejected = row.get(c["chosen"]), row.get(c["rejected"])
        scores: list[Any] = [Number("1"), Number("0")]
        if self.case.shape == "rated":
            rated = [row.get(c["a"]), row.get(c["b"])]
            if not self.case.hard:
                scores = rated
            elif any(not isinstance(r, Number) or not math.isfinite(float(r.text)) for r in rated):
                self.doubt = True
        sides = [v if isinstance(v, list) and v and not all(map(_is_turn, v)) else [v] for v in (chosen, rejected)]
        if any(isinstance(v, list) and v == side for v, side in zip((chosen, rejected), sides, strict=True)):
            self.doubt = True
            scores = [Number("1")] * len(sides[0]) + [Number("0")] * len(sides[1])
        yield prompt, [*sides[0], *sides[1]], scores

    def better(self, value: Any, answers: list[Any]) -> list[Number]:
        """The scores of two answers by the word for the better one."""
        if not isinstance(value, str):
            raise Bad(f"the better answer {value!r}")
        word = value.strip().lower().removeprefix("response_")
        marks = ("first", "second") if self.c["a"].endswith("answer") else ("a", "b")
        if word.startswith("tie"):
            return [Number("0.5"), Number("0.5")]
        if word not in marks and [answer == value for answer in answers].count(True) == 1:
            self.doubt = True  # the text of an answer names it
            return [Number(str(int(answer == value))) for answer in answers]
        if word not in marks:
            raise Bad(f"the better answer {value!r}")
        return [Number(str(int(word == mark))) for mark in marks]

    def messages_in(self, value: Any) -> Any:
        """The messages in the object of a prompt, which a table has as JSON."""
        inner = value
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):
                inner = _loads(value)
            self.doubt |= not self.table
        _check_keys({"": inner})
        if isinstance(inner, dict) and _talks(inner.get("messages")):
            self.doubt |= not isinstance(inner["messages"], list)
            return inner["messages"]
        self.doubt = True
        return value

    def listed(self, value: Any) -> list[Any]:
        if isinstance(value, str):
            try:
                value = _loads(value)
            except (ValueError, RecursionError) as error:
                raise Bad("no list") from error
            _check_keys({"": value})
            self.doubt |= not self.table
        if not isinstance(value, list):
            raise Bad("no list")
        return value

    def groups(self, prompt: Any, answers: list[Any], scores: list[Any], row: Row) -> Iterator[Group]:
        least = 1 if self.case.shape in JOINED else 2
        if len(answers) != len(scores) or len(answers) < least:
            raise Bad(f"{len(answers)} answers, {len(scores)} scores")
        numbers = [self.score(score) for score in scores]
        prompts = self.texts(prompt, is_prompt=True)
        found = []
        for told in prompts:
            for completions in itertools.product(*(self.texts(answer) for answer in answers)):
                with contextlib.suppress(Bad):
                    for each in _one_form(told, list(completions)):
                        found += [Group(p, each[1], numbers) for p in self.with_extras(each[0], row)]
                        kinds = {isinstance(x, str) for x in (told, *completions)}
                        self.doubt |= len(kinds) > 1 or any(
                            isinstance(told, str) and isinstance(x, str) and x.startswith(told) for x in completions
                        )
        if not found:
            raise Bad("roles in a wrong order, or nothing left of an answer")
        yield from found

    def with_extras(self, prompt: Any, row: Row) -> list[Any]:
        """The prompt, with the text of further columns that the shapes know."""
        if not self.case.doubtful:
            return [prompt]
        found = [prompt]
        for key in ("input", "context"):
            if isinstance(row.get(key), str):
                found += [
                    f"{p}\n{row[key]}" if isinstance(p, str) else [("user", f"{p[0][1]}\n{row[key]}")]
                    for p in found if isinstance(p, str) or [role for role, _ in p] == ["user"]
                ]  # fmt: skip
        system = row.get("system")
        if system is not None and not isinstance(system, str):
            return []
        if isinstance(system, str) and system.strip():
            found += [f"{system}\n\n{p}" if isinstance(p, str) else [("system", system), *p] for p in found]
        return found

    def score(self, value: Any) -> float:
        text = value.text if isinstance(value, Number) else value
        if self.case.written in TRUTHS and self.case.shape != "compared":
            return self.label(text)
        if isinstance(text, bool):
            self.doubt = True
            return float(text)
        if not isinstance(text, str):
            raise Bad(f"the score {value!r}")
        self.doubt |= isinstance(value, str) and not self.table
        text, percent = text.strip(), self.case.written == "percentages"
        if percent != text.endswith("%"):
            raise Bad(f"the score {text!r}")
        text = text.removesuffix("%").rstrip()
        if self.decimal_comma and re.fullmatch(r"[+-]?\d+,\d+", text):
            text = text.replace(",", ".")
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
            raise Bad(f"the score {text!r}")
        number = float(text) / (100 if percent else 1)
        if not abs(number) <= LARGEST:
            raise Bad(f"the score {text!r}")
        return number

    def label(self, text: Any) -> float:
        """The number of a label; words of another kind may be understood."""
        if isinstance(text, bool):
            self.doubt = True
            return float(text)
        word = text.strip().lower() if isinstance(text, str) else ""
        for good, bad in TRUTHS.values():
            if word in (good.lower(), bad.lower()):
                self.doubt |= word not in [told.lower() for told in TRUTHS[self.case.written]]
                return float(word == good.lower())
        raise Bad(f"the label {text!r}")

    def texts(self, value: Any, *, is_prompt: bool = False) -> list[Any]:
        """The readings of a text or a conversation."""
        if isinstance(value, Told):
            return [value.turns]
        if isinstance(value, Number):
            self.doubt = True
            return [value.text]
        if isinstance(value, str):
            if not value.strip() or _has_half_of(value):
                raise Bad(f"the text {value!r}")
            found, inner = [value], None
            with contextlib.suppress(ValueError, RecursionError):
                inner = _loads(value)
            _check_keys({"": inner})
            with contextlib.suppress(Bad):
                if isinstance(inner, dict | list):
                    told = self.texts(inner, is_prompt=is_prompt) if _talks(inner) or self.table else []
                    chat = self.table and self.case.chat and _talks(inner)
                    self.doubt |= bool(told) and not chat
                    found = told if chat else [value, *told]
                    if self.table and self.case.chat and isinstance(inner, list) and all(map(_is_turn, inner)):
                        found = told
            return found
        if _talks(value):
            turns = value if isinstance(value, list) else [value]
            self.doubt |= not self.case.chat
            return [[self.message(turn) for turn in turns]]
        if is_prompt and isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and value[0].strip():
            self.doubt = True
            return self.texts(value[0], is_prompt=True)
        if is_prompt and isinstance(value, dict):
            inner = [v for k in ("full_text", "text", "content", "question") if isinstance(v := value.get(k), str)]
            if inner and inner[0].strip() and not _has_half_of(inner[0]):
                self.doubt = True
                return inner[:1]
        raise Bad(f"the text {value!r}")

    def message(self, turn: Row) -> tuple[str, str]:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value", turn.get("text")))
        self.doubt |= set(turn) not in ({"role", "content"}, {"from", "value"})
        if isinstance(content, list):
            self.doubt = True
            content = "".join(part if isinstance(part, str) else str(part.get("text")) if isinstance(part, dict) else ""
                              for part in content)  # fmt: skip
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Bad(f"the role {role!r}")
        self.doubt |= role not in ROLES
        if not isinstance(content, str) or not content.strip() or _has_half_of(content):
            raise Bad(f"the content {content!r}")
        return ROLES[role.lower()], content


def _check_keys(value: Any) -> None:
    if isinstance(value, Twice):
        raise Bad("a key that stands twice")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_keys(item)


def _has_half_of(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_half_of, [*value, *value.values()]))
    if isinstance(value, list):
        return any(map(_has_half_of, value))
    return isinstance(value, str) and bool(re.search("[\ud800-\udfff]", value))


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _talks(value: Any) -> bool:
    return _is_turn(value) or (isinstance(value, list) and bool(value) and all(map(_is_turn, value)))


def _one_form(prompt: Any, completions: list[Any]) -> list[tuple[Any, list[Any]]]:
    """All text or all messages; the roles in order. A prompt that all answers repeat may have been taken out."""
    if isinstance(prompt, str) and all(isinstance(c, str) for c in completions):
        found = [(prompt, completions)]
        if all(c.startswith(prompt) and c[len(prompt) :].strip() for c in completions):
            found.append((prompt, [c[len(prompt) :] for c in completions]))
        return found
    prompt = [("user", prompt)] if isinstance(prompt, str) else prompt
    completions = [[("assistant", c)] if isinstance(c, str) else c for c in completions]
    if any(c[0][0] != "assistant" for c in completions) and all(c[: len(prompt)] == prompt for c in completions):
        completions = [c[len(prompt) :] for c in completions]
    roles = [role for role, _ in prompt]
    rest = roles[1:] if roles[0] in ("system", "developer") else roles
    if not rest or rest[0] != "user" or rest[-1] not in ("user", "tool") or "system" in rest or "developer" in rest:
        raise Bad("the prompt's roles")
    if any(a == b != "tool" for a, b in itertools.pairwise(rest)):
        raise Bad("the prompt's roles")
    if not all(c and {role for role, _ in c} <= {"assistant", "tool"} for c in completions):
        raise Bad("the completion's roles")
    return [(prompt, completions)]


def _in_chat(group: Group) -> Group:
    return Group([("user", group.prompt)], [[("assistant", c)] for c in group.completions], group.scores)


def _distinct(group: Group) -> Group | None:
    """Of equal answers with one score the first is kept, of those with several scores none."""
    told: dict[str, set[float]] = {}
    for completion, score in zip(group.completions, group.scores, strict=True):
        told.setdefault(repr(completion), set()).add(score)
    kept, seen = [], set()
    for i, completion in enumerate(group.completions):
        key = repr(completion)
        if len(told[key]) == 1 and key not in seen:
            kept.append(i)
            seen.add(key)
    if len(kept) < 2:
        return None
    return Group(group.prompt, [group.completions[i] for i in kept], [group.scores[i] for i in kept])


# ---------------------------------------------------------------------------------------------------------- comparing


class Ids:
    """Token ids of a group, of its texts alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of(self, group: Group) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt alone, and of prompt + completion without a last EOS."""
        tokenizer, eos = self.tokenizer, self.tokenizer.eos_token
        if isinstance(group.prompt, str):
            texts = [group.prompt, *(group.prompt + completion for completion in group.completions)]
        else:
            turns = [[{"role": r, "content": c} for r, c in talk] for talk in (group.prompt, *group.completions)]
            texts = [tokenizer.apply_chat_template(turns[0], tokenize=False, add_generation_prompt=True)]
            texts += [tokenizer.apply_chat_template([*turns[0], *t], tokenize=False) for t in turns[1:]]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert all(tokenizer.decode(i) == t for i, t in zip(ids, texts, strict=True)) or eos in "".join(texts)
        return ids[0], [self.open(each) for each in ids[1:]]

    def open(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def same(self, row: Row, group: Group) -> bool:
        prompt, whole = self.of(group)
        found = [self.open([*row["prompt_ids"], *ids]) for ids in row["completion_ids"]]
        start = min(_shared(prompt, ids) for ids in whole)
        return found == whole and row["scores"] == group.scores and len(row["prompt_ids"]) == start

    def text(self, row: Row) -> str:
        texts = [self.tokenizer.decode(ids) for ids in (row["prompt_ids"], *row["completion_ids"])]
        return f"{texts[0]!r} -> {texts[1:]!r} {row['scores']}"


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def joined(readings: list[Reading], case: Case) -> Iterator[list[Group]]:
    """The groups of rows of one answer each, under every reading of the doubtful ones."""
    choices = [r.groups if r.must else [*r.groups, None] for r in readings if r.groups]
    most = max((len(r.groups) for r in readings), default=0)
    alike = [[r.groups[min(at, len(r.groups) - 1)] for r in readings if r.groups] for at in range(most)]
    for chosen in itertools.chain(alike, itertools.islice(itertools.product(*choices), 2000)):
        found: dict[str, Group] = {}
        for group in chosen:
            if group is not None:
                told = found.setdefault(repr(group.prompt), Group(group.prompt, [], []))
                told.completions += group.completions
                told.scores += group.scores
        kept = [_distinct(group) for group in found.values() if len(group.completions) > 1]
        yield [RowReader(case).finished(group) for group in kept if group is not None]


@dataclass
class Outcome:
    kind: str  # groups, refused, good refused, wrong, crash
    detail: str = ""


def compare(case: Case, split: str, readings: list[Reading], rows: list[Row], lost: int | None, ids: Ids) -> Outcome:
    """Compare accepted groups with what the rows of the file say; ``lost`` are the rows counted as dropped."""
    bad = [i for i, r in enumerate(readings) if not r.groups and not r.few]
    if bad and not case.drop:
        return Outcome("wrong", f"{split}: row {bad[0]} ({readings[bad[0]].why}) was not refused")
    if case.shape in JOINED:
        for expected in joined(readings, case):
            if len(expected) == len(rows) and all(map(ids.same, rows, expected)):
                return Outcome("groups")
        first = next(joined(readings, case))
        at = next((i for i, (r, e) in enumerate(zip(rows, first, strict=False)) if not ids.same(r, e)), -1)
        if all(any(ids.same(row, e) for some in joined(readings, case) for e in some) for row in rows):
            missing = f"good groups are missing or in another order: {len(rows)} of {len(first)}"
            return Outcome("wrong" if not case.drop or not lost else "good refused", f"{split}: {missing}")
        return Outcome("wrong", f"{split}: {ids.text(rows[at])}, expected for instance {first[at] if first else None}")
    at, missing = 0, []
    for row in rows:
        start = at
        while at < len(readings) and not any(ids.same(row, group) for group in readings[at].groups):
            at += 1
        if at == len(readings):
            near = next((r.groups for r in readings[start:] if r.groups), None)
            return Outcome("wrong", f"{split}: {ids.text(row)} is in no row; the next one is {near}")
        missing += [i for i in range(start, at) if readings[i].must]
        at += 1
    missing += [i for i in range(at, len(readings)) if readings[i].must]
    if lost is not None and len(rows) + lost != len(readings):
        return Outcome("wrong", f"{split}: {len(readings)} rows, but {len(rows)} groups and {lost} dropped")
    if missing:
        return Outcome("wrong" if not case.drop else "good refused", f"{split}: the good rows {missing} are missing")
    return Outcome("groups")


# ------------------------------------------------------------------------------------------------------------ running


def through_the_door(name: str, case: Case, tokenizer: Any) -> dict[str, tuple[list[Row], int | None]]:
    """What the command makes of it: split -> rows of token ids, and how many rows were dropped."""
    told = {"columns": None, "score_column": None, "hard_pairs": case.hard}
    training = SimpleNamespace(eval_strategy="no", do_eval=False, seed=0, **told)
    script = RunArguments(dataset_name=name, dataset_streaming=case.stream)
    if case.folder == "nested":
        script.dataset_test_split = "validation"
    args = Arguments(script, training, ModelConfig(), DatasetMixtureConfig(), set(), [])
    on_bad_row = "drop" if case.drop else "raise"
    train, test = load_splits(args, on_bad_row=on_bad_row)
    found = {}
    for split, rows in (("train", train), ("test", test)):
        if rows is None:
            continue
        options = read_options(training.columns, training.score_column, training.hard_pairs)
        told = {"max_length": None, "max_prompt_length": None, "on_bad_row": on_bad_row, "name": split}
        prepared, report = prepare_groups(rows, tokenizer, options=options, **told)
        found[split] = (list(prepared), None if case.stream else report.dropped)
        if case.shape in JOINED:
            notes = " ".join(args.notes)
            found[split] = (
                list(prepared),
                report.dropped + sum(map(int, re.findall(r"(\d+) (?:rows,|prompts)", notes))),
            )
    return found


def run_case(case: Case, folder: Path, tokenizer: Any) -> Outcome:
    name, files = write_case(case, folder)
    readings: dict[str, list[Reading]] = {}
    refuse = None
    reader = RowReader(case)
    for split, paths in files.items():
        try:
            rows = [row for path in paths for row in file_rows(path, case)]
            readings["train" if split == "train" else "test"] = [reader.read(row) for row in rows]
        except Bad as error:
            refuse = f"{split}: {error}"
    try:
        found = through_the_door(name, case, tokenizer)
    except (UsageError, BadRow, FileProblem, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        message = getattr(error, "message", str(error))
        if not isinstance(error, UsageError | BadRow | FileProblem) and not last.startswith(PACKAGE):
            return Outcome("crash", _crash(error))
        must = [r.must for rows in readings.values() for r in rows]
        good = refuse is None and not case.ending and not case.doubtful and any(must) and (case.drop or all(must))
        return Outcome("good refused" if good else "refused", " ".join(message.split()))
    except BaseException as error:
        return Outcome("crash", _crash(error))
    if refuse is not None:
        groups = " | ".join(Ids(tokenizer).text(row) for row in found["train"][0][:3])
        return Outcome("wrong", f"accepted, but the file must be refused ({refuse}): {groups}")
    if set(found) != set(readings):
        return Outcome("wrong", f"the splits {sorted(found)}, expected {sorted(readings)}")
    ids = Ids(tokenizer)
    results = [compare(case, split, readings[split], rows, lost, ids) for split, (rows, lost) in found.items()]
    return max(results, key=lambda outcome: ("groups", "good refused", "wrong").index(outcome.kind))


def _crash(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    cause = f" from {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{type(error).__name__}: {error}{cause} (at {at})".split())[:600]


def _work(seed: int, numbers: list[int], folder: Path, tokenizer: Any, pipe: Any) -> None:
    """Run cases in a child, and send what came of each."""
    datasets.disable_progress_bars()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    cache = Path(tempfile.mkdtemp(prefix="cache", dir=folder))
    datasets.config.HF_DATASETS_CACHE = cache
    for number in numbers:
        own = folder / f"case_{number}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        pipe.send((number, None))
        try:
            outcome = run_case(make_case(seed, number), own, tokenizer)
        except Exception as error:
            outcome = Outcome("crash", f"of the benchmark itself: {traceback.format_exception(error)[-2:]}")
        if outcome.kind not in ("wrong", "crash"):
            shutil.rmtree(own)
        pipe.send((number, outcome))
    shutil.rmtree(cache, ignore_errors=True)
    pipe.close()


def run_cases(seed: int, numbers: Iterable[int], folder: Path) -> dict[int, Outcome]:
    """Run cases in children, so that one which dies or hangs is seen."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    tokenizer.chat_template = TEMPLATE
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    left, found = list(numbers), {}
    while left:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(seed, left, folder, tokenizer, theirs))
        child.start()
        theirs.close()
        current, problem = None, None
        while True:
            if not ours.poll(SECONDS):
                problem = f"longer than {SECONDS} s"
                break
            try:
                current, outcome = ours.recv()
            except EOFError:
                break
            if outcome is not None:
                found[current] = outcome
        if problem:
            child.kill()
        child.join()
        if problem or child.exitcode:
            lost = current if current is not None and current not in found else left[0]
            found[lost] = Outcome("crash", problem or f"the process ended with the exit code {child.exitcode}")
        left = [number for number in left if number not in found]
    return found


def faults(found: dict[int, Outcome]) -> dict[int, Outcome]:
    """The cases that crashed or were read wrongly."""
    return {number: outcome for number, outcome in found.items() if outcome.kind in ("crash", "wrong")}


def table(seed: int, found: dict[int, Outcome]) -> str:
    kinds = ("groups", "refused", "good refused", "wrong", "crash")
    counts: dict[str, Counter] = {name: Counter() for name in (NONE, *ROW_MUTATIONS, *FILE_MUTATIONS)}
    for number, outcome in found.items():
        for name in make_case(seed, number).mutations:
            counts[name][outcome.kind] += 1
    lines = [f"| mutation | {' | '.join(kinds)} |", f"|---|{'---:|' * len(kinds)}"]
    lines += [f"| {name} | {' | '.join(str(c[kind]) for kind in kinds)} |" for name, c in counts.items() if c]
    total = Counter(outcome.kind for outcome in found.values())
    return "\n".join([*lines, f"| cases | {' | '.join(str(total[kind]) for kind in kinds)} |"])


def describe(seed: int, number: int) -> str:
    case = make_case(seed, number)
    told = [case.shape, case.chat and f"chat ({case.chat})", case.format, "drop" if case.drop else "raise"]
    told += [
        "hard_pairs" if case.hard else None,
        "stream" if case.stream else None,
        f"with {', '.join(case.mutations)}",
    ]
    return " ".join(filter(None, told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of the cases to run")
    parser.add_argument("--keep", type=Path, help="where the files of faults are kept (default: a new folder)")
    parser.add_argument("--good-refused", action="store_true", help="also list good data that was refused or dropped")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="door_fuzz_"))
    folder.mkdir(parents=True, exist_ok=True)
    found = run_cases(args.seed, args.only or range(args.cases), folder)
    print(table(args.seed, found))
    listed = dict(faults(found))
    if args.good_refused:
        listed |= {number: outcome for number, outcome in found.items() if outcome.kind == "good refused"}
    for number, outcome in sorted(listed.items()):
        print(f"\n{number} ({describe(args.seed, number)}): {outcome.kind}: {outcome.detail}")
        if outcome.kind != "good refused":
            print(f"    {', '.join(str(f) for f in (folder / f'case_{number}').rglob('*') if f.is_file())}")
    if wrong := faults(found):
        sys.exit(f"\n{len(wrong)} of {len(found)} cases crashed or were read wrongly.")
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
