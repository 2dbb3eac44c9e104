"""Groups in files that are read as they are trained on: one order for any number of processes and workers.

An epoch is a sequence of row numbers, a function of the files' lengths, the seed and the epoch alone. Processes and
dataloader workers take batches of it in turn, so that a position in it is all that a checkpoint needs, whatever number
of them reads on. Every reader passes over all rows as bytes, and parses and tokenises its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import Dataset, Sampler

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.files import SOURCE, Unread, count_rows, unread_rows
from contrastive_align.data.reading import TOKEN_COLUMNS, unbatched
from contrastive_align.data.reference_shards import add_logps, read_logps
from contrastive_align.data.rows import BadRow


BLOCK = 64  # successive rows of a file that stay together until the rows of a window are shuffled
OPEN_FILES = 16  # files that are read in turn
WINDOW = 32  # blocks whose rows are shuffled together


def lengths_of(files: Sequence[Path]) -> np.ndarray:
    """Return the rows of each file; a count is kept on disk as long as the file does not change."""
    return np.array([_length_of(path) for path in files], dtype=np.int64)


def _length_of(path: Path) -> int:
    stamp = path.stat()
    told = json.dumps([str(path.resolve()), stamp.st_size, stamp.st_mtime_ns, SOURCE])
    key = hashlib.sha256(told.encode()).hexdigest()[:32]
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "contrastive_align" / f"rows_{key}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    found = count_rows(path)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept) as file:
        file.write(json.dumps(found).encode())
    return found


class Window(NamedTuple):
    """Rows that stand together in the order of an epoch."""

    epoch: int
    start: int  # the position of the first
    files: np.ndarray
    rows: np.ndarray  # their numbers in their files

    def __contains__(self, place: Any) -> bool:
        epoch, position = place
        return epoch == self.epoch and self.start <= position < self.start + len(self.rows)


class ShardOrder:
    """The order of an epoch over the rows of several files.

    Files are shuffled, and ``OPEN_FILES`` of them are read at a time. Their blocks follow each other at random, those
    of one file as they stand in it, so that each file is read once from beginning to end. Then the rows of every
    ``WINDOW`` blocks are shuffled.

    >>> order = ShardOrder([100, 1, 50], seed=1)
    >>> places = [place for epoch in (0, 0, 1) for window in order.windows(epoch) for place in zip(*window[2:])]
    >>> len(places), len(set(places)), places[:151] == places[151:302], places[:151] == places[302:]
    (453, 151, True, False)
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, seed: int = 0, shuffle: bool = True) -> None:
        self.lengths, self.seed, self.shuffle = np.asarray(lengths, dtype=np.int64), seed, shuffle
        self.rows = int(self.lengths.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._part: tuple[int, int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def window_at(self, epoch: int, position: int) -> Window:
        """Return the window that holds a position of an epoch."""
        part = int(np.searchsorted(self._parts(epoch), position, side="right")) - 1
        files, blocks, ends = self._blocks(epoch, part)
        start = int(self._parts(epoch)[part])
        first = int(np.searchsorted(ends, position - start, side="right")) // WINDOW * WINDOW
        start += int(ends[first - 1]) if first else 0
        files, blocks = files[first : first + WINDOW], blocks[first : first + WINDOW]
        sizes = np.minimum(BLOCK, self.lengths[files] - blocks * BLOCK)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        files, rows = np.repeat(files, sizes), np.repeat(blocks * BLOCK, sizes) + within
        if self.shuffle:
            mixed = self._random(epoch, part, first).permutation(len(rows))
            files, rows = files[mixed], rows[mixed]
        return Window(epoch, start, files, rows)

    def windows(self, epoch: int) -> Iterator[Window]:
        """Yield all windows of an epoch."""
        position = 0
        while position < self.rows:
            window = self.window_at(epoch, position)
            yield window
            position += len(window.rows)

    def _parts(self, epoch: int) -> np.ndarray:
        """Return the position at which each part of an epoch begins: ``OPEN_FILES`` files each."""
        return self._of_epoch(epoch)[1]

    def _of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            files = np.flatnonzero(self.lengths)
            files = self._random(epoch).permutation(files) if self.shuffle else files
            sizes = np.add.reduceat(self.lengths[files], np.arange(0, len(files), OPEN_FILES))
            self._epoch = (epoch, files, np.cumsum(sizes) - sizes)
        return self._epoch[1:]

    def _blocks(self, epoch: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the blocks of a part in their order: file, number in the file, and rows up to the end of each."""
        if self._part is None or self._part[:2] != (epoch, part):
            files = self._of_epoch(epoch)[0][part * OPEN_FILES : (part + 1) * OPEN_FILES]
            counts = -(-self.lengths[files] // BLOCK)
            turns = np.repeat(np.arange(len(files)), counts)
            turns = self._random(epoch, part).permutation(turns) if self.shuffle else turns
            blocks = np.empty_like(turns)
            blocks[np.argsort(turns, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
            found = files[turns]
            ends = np.cumsum(np.minimum(BLOCK, self.lengths[found] - blocks * BLOCK))
            self._part = (epoch, part, found, blocks, ends)
        return self._part[2:]

    def _random(self, *place: int) -> np.random.RandomState:
        # RandomState's numbers are frozen, so that a run goes on in its order under another version of numpy.
        told = hashlib.sha256(repr((self.seed, *place)).encode()).digest()
        return np.random.RandomState(np.frombuffer(told, dtype=np.uint32))


class ShardBatches(Sampler[list[int]]):
    """Batches of positions for one process; those of all processes are successive, batch by batch.

    A position counts through all epochs. All processes have the same number of batches, of which the last ones may be
    empty.

    >>> [list(ShardBatches(10, size=2, ranks=2, rank=rank)) for rank in (0, 1)]
    [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], []]]
    """

    def __init__(self, rows: int, *, size: int, ranks: int = 1, rank: int = 0, drop_last: bool = False) -> None:
        self.rows, self.size, self.ranks, self.rank, self.drop_last = rows, size, ranks, rank, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = self.rows / (self.size * self.ranks)
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            first = (i * self.ranks + self.rank) * self.size
            yield [self.epoch * self.rows + at for at in range(first, min(first + self.size, self.rows))]


@dataclass
class ReadRow:
    """The groups of a row, and what the report counts of it."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    counted: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class ReadBatch:
    """Rows at positions of the order, or the error that one of them is."""

    positions: list[int]
    rows: list[ReadRow] = field(default_factory=list)
    error: ValueError | None = None


class ShardedGroups(Dataset):
    """The groups of several files, by their position in a :class:`ShardOrder`.

    A batch of positions is read forwards: a reader that is asked for increasing positions, as a dataloader's workers
    are, reads every file once.

    Args:
        files: the shards.
        lengths: their rows.
        reader: columns of rows and their numbers over all files -> columns of groups.
        report: counts what is read.

    Attributes:
        order: that of the files; a trainer sets the one that it reads in.
        references: files of reference log-probs beside ``files``, where they are cached.
        first: the first group, which fills batches without one.
    """

    def __init__(
        self,
        files: Sequence[Path],
        lengths: np.ndarray,
        reader: Callable[[Mapping[str, list[Any]], list[int]], Mapping[str, list[Any]]],
        report: Any,
    ) -> None:
        self.files, self.lengths, self.reader, self.report = tuple(files), lengths, reader, report
        self.starts = np.cumsum(lengths) - lengths
        self.order = ShardOrder(lengths, shuffle=False)
        self.references: Sequence[Path] | None = None
        self._kept: tuple[int, _Reader] | None = None
        self._counted: tuple[int, int] | None = None
        self._before = 0  # rows that were counted in the order of the files
        first = next(iter(self), None)
        report.check_some_left(reader.name)
        self.first: dict[str, Any] = first or {}

    def __len__(self) -> int:
        return self.order.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all groups, file after file, and count their rows, each once."""
        for number, row in enumerate(row for file in range(len(self.files)) for [row] in self.rows_of(file)):
            if number == self._before:
                self._before += 1
                self.count(row)
            yield from row.groups

    def __getitem__(self, position: int) -> ReadBatch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[ReadBatch]:
        if self._kept is None or self._kept[0] != os.getpid():  # a forked worker shares no open file
            self._kept = (os.getpid(), _Reader(self))
        try:
            return [ReadBatch(positions, self._read(*self._kept[1].at(positions)))]
        except ValueError as error:  # raised by :meth:`take_note`: a worker would send a traceback
            return [ReadBatch(positions, error=error)]

    def rows_of(self, file: int, size: int = 1) -> Iterator[list[ReadRow]]:
        """Yield the rows of a file, some at a time."""
        source = self.open(file, 0)
        for start in itertools.count(0, size):
            unread = list(itertools.islice(source, size))
            if not unread:
                return
            yield self._read([(file, start + i) for i in range(len(unread))], unread)

    def open(self, file: int, start: int) -> Iterator[tuple[Unread, Any]]:
        """Yield the rows of a file from a number on, each with its reference log-probs, where they are cached."""
        kept = itertools.repeat(None) if self.references is None else read_logps(self.references[file], start)
        return zip(unread_rows(self.files[file], start), kept, strict=False)

    def take_note(self, batch: ReadBatch) -> None:
        """Count the rows of a batch, each once; to be called where the batch is used.

        Raises:
            ValueError: a row of the batch cannot be trained on.
        """
        if batch.error is not None:
            raise batch.error
        for position, row in zip(batch.positions, batch.rows, strict=True):
            epoch, last = self._counted or (position // len(self), -1)
            if position > last and position // len(self) == epoch:
                self._counted = (epoch, position)
                if row.counted and row.counted[0]["row"] >= self._before:
                    self.count(row)

    def count(self, row: ReadRow) -> None:
        """Count a row in the report."""
        for counted in row.counted:
            self.report.count_of_stream(counted)

    def _read(self, places: list[tuple[int, int]], unread: list[tuple[Unread, Any]]) -> list[ReadRow]:
        if not places:
            return []
        rows = [read() for read, _ in unread]
        numbers = [int(self.starts[file]) + row for file, row in places]
        names = dict.fromkeys(name for row in rows for name in row)
        found = {number: ReadRow() for number in numbers}
        for group in unbatched(self.reader({name: [row.get(name) for row in rows] for name in names}, numbers)):
            row = found[group["row"]]
            if not group["problem"]:
                row.groups.append({name: group[name] for name in (*TOKEN_COLUMNS, "row")})
            row.counted.append({name: value for name, value in group.items() if name not in TOKEN_COLUMNS[:2]})
        for number, (file, place), (_, kept) in zip(numbers, places, unread, strict=True):
            if kept is not None:
                add_logps(found[number].groups, *kept, f"{self.files[file].name}, row {place}", self.references[file])
        return [found[number] for number in numbers]


class _Reader:
    """Reads files forwards, each at a place of its own."""

    def __init__(self, groups: ShardedGroups) -> None:
        self.groups = groups
        self.window: Window | None = None
        self.unread: list[tuple[Unread, Any] | None] = []
        self.sources: dict[int, tuple[int, Iterator[tuple[Unread, Any]]]] = {}  # file -> the next row, and from it on

    def at(self, positions: list[int]) -> tuple[list[tuple[int, int]], list[tuple[Unread, Any]]]:
        """Return the places of positions, and what stands there."""
        places, found = [], []
        for epoch, position in (divmod(at, len(self.groups)) for at in positions):
            if self.window is None or (epoch, position) not in self.window:
                self.window = self.groups.order.window_at(epoch, position)
                self._fill(self.window)
            i = position - self.window.start
            places.append((int(self.window.files[i]), int(self.window.rows[i])))
            found.append(self.unread[i])
        return places, found

    def _fill(self, window: Window) -> None:
        """Read the rows of a window, as they stand in their files."""
        self.unread = [None] * len(window.rows)
        for file in set(self.sources) - set(window.files.tolist()):
            if len(self.sources) > 2 * OPEN_FILES:
                del self.sources[file]
        for i in np.lexsort((window.rows, window.files)).tolist():
            file, row = int(window.files[i]), int(window.rows[i])
            at, source = self.sources.get(file, (-1, iter(())))
            if not 0 <= at <= row:
                at, source = row, self.groups.open(file, row)
            found = next(itertools.islice(source, row - at, None), None)
            if found is None:
                raise BadRow(
                    f"{self.groups.files[file]} ends before its row {row}, expected {self.groups.lengths[file]} rows: "
                    "it was changed while it was read. Start again."
                )
            self.unread[i] = found
            self.sources[file] = (row + 1, source)
