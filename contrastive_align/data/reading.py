"""Rows of a dataset -> groups as text: its shape is recognised, and the rows of a prompt are joined."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from contrastive_align.data import answers, better, columns, formats, messages, prompts, rows, scores, shapes
from contrastive_align.data.columns import Options
from contrastive_align.data.formats import Group, TooFew, checked_group
from contrastive_align.data.rows import OWN_COLUMNS, RAW, ROW, BadRow, number_in_file, values_of
from contrastive_align.data.shapes import Reading, first_rows, recognise


TOKEN_COLUMNS = ["prompt_ids", "completion_ids", "scores"]
FIRST_ROWS = 5
# Part of the caches' keys: rows that other code read are read again.
SOURCE = hashlib.sha256(
    b"".join(
        Path(f).read_bytes()
        for f in (
            __file__,
            *(m.__file__ for m in (answers, better, columns, formats, messages, prompts, rows, scores, shapes)),
        )
    )
).hexdigest()


def sample_of(dataset: Dataset | IterableDataset, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the first rows that can be read, and the names of the columns.

    Raises:
        ValueError: there is none.
    """
    sample, problem = [], None
    for number, row in enumerate(first_rows(dataset)):
        try:
            sample.append(values_of(row, f"{name}, row {number}"))
        except BadRow as error:
            problem = problem or error
    names = dataset.column_names
    if names is None or RAW in names:
        names = list(dict.fromkeys(column for row in sample for column in row))
    if not sample:
        raise problem or ValueError(f"The {name} dataset has no rows, expected at least one group.")
    return sample, [column for column in names if column not in OWN_COLUMNS]


def read_shape(dataset: Dataset | IterableDataset, options: Options, name: str) -> Reading | None:
    """Recognise how a dataset is spelled, by its first rows; None for token ids.

    Raises:
        ValueError: see :func:`contrastive_align.data.shapes.recognise`.
    """
    sample, names = sample_of(dataset, name)
    if "image" in names or "images" in names:
        raise ValueError(
            f"The {name} dataset has images (columns {names}), which are not supported here; for pairs use "
            "trl.DPOTrainer. If the texts are enough by themselves, leave the column out of the data."
        )
    if all(column in names for column in TOKEN_COLUMNS):
        return None
    return recognise(sample, names, options)


def join_rows(dataset: Dataset, reading: Reading, *, on_bad_row: str, name: str) -> tuple[Dataset, dict[str, Any]]:
    """Join the rows of a prompt, wherever they stand, into groups in the canonical form.

    Returns:
        The groups, and counts: ``rows``, ``dropped``, ``dropped_because``, ``single_answers`` (prompts with one,
        dropped).

    Raises:
        BadRow: a row cannot be read, under ``on_bad_row="raise"``.
    """
    keys = dataset.map(
        _Keys(reading, on_bad_row, name),
        with_indices=True,
        batched=True,
        batch_size=1000,
        remove_columns=dataset.column_names,
        features=Features(key=Value("int64"), problem=Value("string")),
        desc=f"Joining the {name} rows of each prompt",
    )
    found, problems = np.asarray(keys["key"][:], dtype=np.int64), keys["problem"][:]
    bad = [i for i, problem in enumerate(problems) if problem]
    good = np.setdiff1d(np.arange(len(found)), np.asarray(bad, dtype=np.int64))
    _, first, inverse, sizes = np.unique(found[good], return_index=True, return_inverse=True, return_counts=True)
    order = good[np.lexsort((good, first[inverse]))]
    counts = {
        "rows": len(dataset),
        "dropped": len(bad),
        "single_answers": int((sizes == 1).sum()),
        "dropped_because": {str(i): problems[i] for i in bad[:FIRST_ROWS]},
    }
    if not (sizes > 1).any():
        raise ValueError(
            f"No two rows of the {name} dataset have the same prompt ({len(dataset)} rows of one answer each, read as "
            f"'{reading.shape}'), and a group needs two answers. The prompt is {reading.prompt_columns()}: if "
            "another column is, say so with columns='prompt=NAME'."
        )
    told = {"order": order, "sizes": sizes[np.argsort(first)], "reading": reading, "name": name}
    joined = Dataset.from_generator(
        _joined_groups,
        gen_kwargs={"dataset": dataset, **told},
        features=Features({ROW: Value("int64"), RAW: Value("string")}),
        fingerprint=Hasher.hash((dataset._fingerprint, reading, SOURCE, on_bad_row)),
    )
    return joined, counts


@dataclass
class _Keys:
    """A picklable function of rows: a number for each prompt."""

    reading: Reading
    on_bad_row: str
    name: str
    source: str = SOURCE

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        keys, problems = [], []
        for row, number in zip(unbatched(batch), indices, strict=True):
            key, problem = 0, ""
            try:
                group, _ = _single(self.reading, row, number, self.name)
                told = json.dumps([group.prompt, group.template_kwargs], sort_keys=True)
                key = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big", signed=True)
            except BadRow as error:
                if self.on_bad_row == "raise":
                    raise
                problem = as_utf8(error)
            keys.append(key)
            problems.append(problem)
        return {"key": keys, "problem": problems}


def _single(reading: Reading, row: Mapping[str, Any], number: int, name: str) -> tuple[Group, int]:
    number = number_in_file(row, number)
    where = f"{name}, row {number}"
    values = values_of(row, where)
    [parts] = reading(values, where)
    return checked_group(parts, where, least=1, prompt_repeats=reading.prompt_repeats)[0], number


def _joined_groups(
    dataset: Dataset, order: np.ndarray, sizes: np.ndarray, reading: Reading, name: str
) -> Iterator[dict[str, Any]]:
    rows_in_order, at = iter(dataset.select(order)), 0
    for size in sizes:
        members = [_single(reading, next(rows_in_order), int(order[at + i]), name) for i in range(size)]
        at += size
        if size == 1:
            continue
        (first, number) = members[0]
        told = {
            "prompt": first.prompt, "completions": [c for group, _ in members for c in group.completions],
            "scores": [s for group, _ in members for s in group.scores], **first.template_kwargs,
        }  # fmt: skip
        extra = {k: told.pop(k) for k in list(first.template_kwargs) if k != "tools"}
        told |= {"chat_template_kwargs": extra} if extra else {}
        yield {ROW: number, RAW: json.dumps(told, ensure_ascii=False)}


def groups_of(dataset: Dataset | IterableDataset, *, options: Options, on_bad_row: str, name: str) -> Iterator[Group]:
    """Yield the groups of a dataset as text; bad rows raise, or are left out."""
    reading: Any = read_shape(dataset, options, name)
    if reading is None:
        raise ValueError(f"The {name} dataset holds token ids, and no text.")
    if reading.joined and isinstance(dataset, Dataset):
        dataset, _ = join_rows(dataset, reading, on_bad_row=on_bad_row, name=name)
        reading = read_shape(dataset, Options(), name)
    for number, row in enumerate(dataset):
        where = f"{name}, row {number_in_file(row, number)}"
        try:
            values = values_of(row, where)
            for parts in reading(values, where):
                yield checked_group(parts, where, prompt_repeats=reading.prompt_repeats)[0]
        except BadRow as error:
            if on_bad_row == "raise" and not isinstance(error, TooFew):
                raise


def unbatched(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch."""
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def as_utf8(error: Exception | None) -> str:
    """Return an error's text, which may quote what is no text; empty for None."""
    return "" if error is None else str(error).encode("utf-8", "backslashreplace").decode()
