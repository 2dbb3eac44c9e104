"""Reference log-probs beside the rows of a file, each known by the tokens that it was computed for."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contrastive_align.data.rows import BadRow


# A row of the data set has no group, one or several: the key of each, and its log-probs.
SCHEMA = pa.schema({"keys": pa.list_(pa.uint64()), "ref_logps": pa.list_(pa.list_(pa.float32()))})
COMMAND = "contrastive-align reference"
_TOLD = b"contrastive_align"


def key_of_tokens(group: dict[str, Any]) -> int:
    """Return a hash of a group's token ids.

    >>> one = {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]]}
    >>> key_of_tokens(one) == key_of_tokens({**one, "completion_ids": [[3, 4], [5]]})
    False
    """
    lists = [group["prompt_ids"], *group["completion_ids"]]
    digest = hashlib.blake2b(np.array([len(ids) for ids in lists], dtype="<i8").tobytes(), digest_size=8)
    digest.update(np.fromiter(itertools.chain.from_iterable(lists), dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


class LogpsWriter:
    """Writes the log-probs of a file's rows as they come.

    Args:
        told: what is noted of the file, as JSON.
    """

    def __init__(self, file: BinaryIO, told: dict[str, Any]) -> None:
        self._writer = pq.ParquetWriter(file, SCHEMA.with_metadata({_TOLD: json.dumps(told)}), compression="zstd")

    def write(self, rows: Sequence[Sequence[tuple[dict[str, Any], Sequence[float]]]]) -> None:
        """Write rows, each of its groups with their log-probs."""
        keys = [[key_of_tokens(group) for group, _ in row] for row in rows]
        columns = {"keys": keys, "ref_logps": [[list(logps) for _, logps in row] for row in rows]}
        self._writer.write_table(pa.table(columns, schema=SCHEMA))

    def close(self) -> None:
        self._writer.close()


def read_note(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the rows of a file of log-probs, and what is noted of it.

    Raises:
        OSError, pa.ArrowException: it is no such file.
    """
    metadata = pq.read_metadata(path)
    return metadata.num_rows, json.loads((metadata.metadata or {}).get(_TOLD, b"{}"))


def read_logps(path: Path, start: int = 0) -> Iterator[tuple[list[int], list[list[float]]]]:
    """Yield the keys and log-probs of each row, from a number on."""
    with pq.ParquetFile(path) as table:
        ends = itertools.accumulate(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
        ends = list(ends)
        first = next((i for i, end in enumerate(ends) if end > start), len(ends))
        start -= ends[first - 1] if first else 0
        for group in range(first, len(ends)):
            rows = table.read_row_group(group)
            for row in rows.slice(start).to_pylist():
                yield row["keys"], row["ref_logps"]
            start = 0


def add_logps(groups: list[dict[str, Any]], keys: list[int], logps: list[list[float]], where: str, file: Path) -> None:
    """Add ``ref_logps`` to the groups of a row.

    Raises:
        BadRow: they were computed for other tokens.
    """
    if [key_of_tokens(group) for group in groups] != keys:
        raise BadRow(
            f"{where}: its tokens are not those that {file} has reference log-probs of. The row, the tokenizer or "
            f"max_length has changed since. Remove that file and run {COMMAND} again."
        )
    for group, found in zip(groups, logps, strict=True):
        group["ref_logps"] = found
