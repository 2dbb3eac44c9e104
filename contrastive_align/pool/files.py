"""Write a round of samples as one Arrow IPC file, and read it through a memory map."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from contrastive_align.data.atomic import atomic_write


BATCH = 4096  # samples held in memory while writing; also the unit of random access


@dataclass(frozen=True)
class Sample:
    """One completion with its score and feedback.

    Args:
        prompt: text, or the messages of a conversation, without a condition.
        completion_ids: its tokens, with the end-of-sequence token where it was sampled.
        completion: its text.
        score: higher is better; None where it was not scored. NaN is stored as None.
        feedback: a judge's words, or None.
        finished: whether it ended by itself, before the token limit.
        prompt_index: the prompt's row in the dataset.
        sample_index: its number among the prompt's samples of this round, from 0.
        round: from 1.
        step: number of optimizer steps before it was sampled.
    """

    prompt: str | list[dict[str, Any]]
    completion_ids: list[int]
    completion: str
    score: float | None
    feedback: str | None
    finished: bool
    prompt_index: int
    sample_index: int
    round: int
    step: int


_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),  # JSON where conversational
        pa.field("conversational", pa.bool_(), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("feedback", pa.string()),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
    ]
)


_FIELDS = [field.name for field in fields(Sample)]
_TYPES = {"prompt": (str, list), "completion_ids": list, "completion": str, "score": (float, int, type(None))}
_TYPES |= {"feedback": (str, type(None)), "finished": bool, "prompt_index": int, "sample_index": int, "step": int}
_EXPECTED = {"prompt": "text or a list of messages", "completion_ids": "a list of ints", "completion": "text"}
_EXPECTED |= {"score": "a number or None", "feedback": "text or None", "finished": "True or False"}
_EXPECTED |= {"prompt_index": "an int", "sample_index": "an int", "step": "an int"}


def write_round(path: Path, number: int, samples: Iterable[Sample]) -> None:
    """Write one round; an error leaves no file.

    Raises:
        ValueError: there are no samples, or one has another round or step, or a field of another type.
        OSError: the file cannot be written.
    """
    checked = _checked(samples, number)
    with atomic_write(path) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        if not (rows := list(islice(checked, BATCH))):
            raise ValueError(f"Round {number} has no samples, expected at least one.")
        while rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            rows = list(islice(checked, BATCH))


def _checked(samples: Iterable[Sample], number: int) -> Iterator[dict[str, Any]]:
    step = None
    for i, sample in enumerate(samples):
        step = sample.step if step is None else step
        for name, expected in (("round", number), ("step", step)):
            if (found := getattr(sample, name)) != expected:
                raise ValueError(
                    f"round {number}, sample {i}: '{name}' is {found}, expected {expected}. Add one round at a time, "
                    "in order; all of its samples come from the same weights."
                )
        for name, kind in _TYPES.items():
            if not isinstance(found := getattr(sample, name), kind):
                raise ValueError(f"round {number}, sample {i}: '{name}' is {found!r}, expected {_EXPECTED[name]}.")
        if not set(map(type, sample.completion_ids)) <= {int}:
            raise ValueError(f"round {number}, sample {i}: 'completion_ids' is {sample.completion_ids}, expected ints.")
        row = {name: getattr(sample, name) for name in _FIELDS}
        row["conversational"] = not isinstance(sample.prompt, str)
        if row["conversational"]:
            row["prompt"] = json.dumps(sample.prompt, ensure_ascii=False)
        if sample.score is not None and math.isnan(sample.score):
            row["score"] = None
        yield row


class Round:
    """Open one file as a memory map: numbers are copied to memory, texts and tokens stay on disk until they are read.

    Raises:
        ValueError: the file is damaged or has other columns.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in self._batches:
                batch.validate()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(str(error)) from error
        if not reader.schema.equals(_SCHEMA):
            raise self._damaged(f"its columns are {reader.schema.names}, expected {_SCHEMA.names} with their types")
        if any(len(batch) != BATCH for batch in self._batches[:-1]) or not self._batches:
            raise self._damaged(f"its batches have {[len(b) for b in self._batches]} samples, expected {BATCH} each")
        self.step = self._batches[0]["step"][0].as_py()
        self._identity = _identity(self.path)

    def is_current(self) -> bool:
        """Return whether the file on disk is still the one that was opened."""
        return self.path.exists() and _identity(self.path) == self._identity

    def _damaged(self, found: str) -> ValueError:
        return ValueError(
            f"{self.path} cannot be read: {found}. Restore the file, or delete it and all later rounds: the pool is "
            f"then what it was after round {self.number - 1}."
        )

    def column(self, name: str, dtype: Any) -> NDArray:
        """Return a column as (N,) numbers, NaN for None."""
        parts = [batch[name].to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts).astype(dtype)

    def lengths(self) -> NDArray[np.int32]:
        """Return the (N,) numbers of tokens of the completions."""
        return np.concatenate([pc.list_value_length(batch["completion_ids"]).to_numpy() for batch in self._batches])

    def feedback_codes(self, codes: dict[str, int]) -> NDArray[np.int32]:
        """Return the (N,) codes of the feedbacks, -1 for None; new feedbacks are added to ``codes``."""
        parts = []
        for batch in self._batches:
            coded = batch["feedback"].dictionary_encode()
            translate = np.array([codes.setdefault(x, len(codes)) for x in coded.dictionary.to_pylist()] + [-1])
            parts.append(translate[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
        return np.concatenate(parts).astype(np.int32)

    def read(self, rows: NDArray) -> list[Sample]:
        """Return the samples at these rows, in their order."""
        found: list[Any] = [None] * len(rows)
        batch_of = np.asarray(rows) // BATCH
        for b in np.unique(batch_of):
            places = np.flatnonzero(batch_of == b)
            taken = self._batches[b].take(pa.array(rows[places] - b * BATCH)).to_pylist()
            for place, row in zip(places, taken, strict=True):
                found[place] = _sample(row)
        return found


def _sample(row: dict[str, Any]) -> Sample:
    if row.pop("conversational"):
        row["prompt"] = json.loads(row["prompt"])
    return Sample(**row)


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
