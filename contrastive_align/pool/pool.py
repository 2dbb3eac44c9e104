"""Hold the samples of all rounds: one file a round on disk, a few numbers a sample in memory."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive_align.data.atomic import atomic_write, leftovers
from contrastive_align.pool.draws import LEFT_OUT, balanced_order, keep
from contrastive_align.pool.files import Round, Sample, write_round


NEW = -2  # label, in a table that is being labelled, of a sample that had none before


def round_path(folder: Path, number: int) -> Path:
    """Return the file of a round."""
    return folder / f"round-{number:05d}.arrow"


def rounds_in(folder: Path) -> list[int]:
    """Return the numbers of the rounds on disk: 1, 2, ... without a gap.

    Raises:
        ValueError: a round is missing; its file is named.
    """
    names = (re.fullmatch(r"round-(\d{5,})\.arrow", path.name) for path in folder.glob("round-*.arrow"))
    found = sorted(int(name[1]) for name in names if name)
    for expected, number in enumerate(found, start=1):
        if number != expected:
            raise ValueError(
                f"{round_path(folder, expected)} is missing, although round {found[-1]} is there: a pool needs all "
                f"rounds from 1 on. Restore the file, or go back to round {expected - 1} by deleting the later ones."
            )
    return found


class _Columns:
    """The numbers of all samples of some rounds, in the order of files and rows."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._rounds = rounds
        parts = [r.column("prompt_index", np.int64) for r in rounds]
        sizes = [len(part) for part in parts]
        self.ends = np.cumsum(sizes)
        self.prompt_index = np.concatenate(parts)
        self.round = np.repeat(np.array([r.number for r in rounds], dtype=np.int32), sizes)
        self.row = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        self.score = np.concatenate([r.column("score", np.float64) for r in rounds])
        self.finished = np.concatenate([r.column("finished", bool) for r in rounds])
        self.sample_index = np.concatenate([r.column("sample_index", np.int32) for r in rounds])
        self.length = np.concatenate([r.lengths() for r in rounds])

    @cached_property
    def feedback(self) -> tuple[NDArray[np.int32], list[str]]:
        # Computed on first access: conditions on scores hold no text in memory.
        codes: dict[str, int] = {}
        parts = [r.feedback_codes(codes) for r in self._rounds]
        return np.concatenate(parts), list(codes)


class Table:
    """The samples that a pool holds after a round, as numpy columns of N entries.

    Labels are a function of these columns.

    Attributes:
        round, row: number of the file, and row in it.
        prompt_index: the prompt's row in the dataset.
        score: float64, NaN for None.
        finished: bool.
        sample_index: its number among its prompt's samples of the round.
        length: number of tokens.
        label: 0 the best, -1 never drawn. While labels are computed: the label of the round before, -2 for new samples.
    """

    def __init__(self, columns: _Columns, index: NDArray, label: NDArray) -> None:
        self._columns, self.index, self.label = columns, index, label
        self.round, self.row = columns.round[index], columns.row[index]
        self.prompt_index, self.score = columns.prompt_index[index], columns.score[index]
        self.finished, self.length = columns.finished[index], columns.length[index]
        self.sample_index = columns.sample_index[index]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def feedback_codes(self) -> NDArray[np.int32]:
        """(N,) indices into ``feedback_values``; -1 for None."""
        return self._columns.feedback[0][self.index]

    @property
    def feedback_values(self) -> list[str]:
        """Every distinct feedback of the pool, in order of appearance."""
        return self._columns.feedback[1]


class Pool:
    """Keep the samples of all rounds, thin out earlier ones, and label those that stay.

    After round r, a share of 1 - ``drop_factor`` of the samples kept after round r - 1 stays, label by label. The
    samples of round r are added, and all are labelled anew, as Quark, arXiv:2205.13636, sorts its pool again. This is
    replayed from the files, so that the result is the same after an interruption, in another process, and for a past
    round.

    A round is one file, ``round-00001.arrow`` and so on, which is written whole or not at all: a killed process loses
    at most the round that it was writing. One process writes; others see a new round after :meth:`reload`.

    Args:
        folder: created if missing.
        label: a pure function, table -> (N,) int, 0 the best, -1 left out; usually the ``label`` of a condition.
        drop_factor: 0 keeps all samples, 1 only those of the newest round.
        seed: of the choice of the samples that stay.

    Raises:
        ValueError: a round is missing or damaged; the message names the file and the way out.
        OSError: the folder cannot be created.
    """

    def __init__(
        self, folder: str | Path, *, label: Callable[[Table], ArrayLike], drop_factor: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 <= drop_factor <= 1:
            raise ValueError(f"drop_factor is {drop_factor}, expected 0 (all samples stay) to 1 (none does).")
        self.folder, self.drop_factor, self.seed, self._label = Path(folder), drop_factor, seed, label
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The folder {self.folder} cannot be made: {error.strerror}. Give another pool_dir or output_dir.",
            ) from error
        self._rounds: list[Round] = []
        self.reload()

    def reload(self) -> None:
        """Open rounds that were written since the last call."""
        known = {r.number: r for r in self._rounds if r.is_current()}
        self._set_rounds(
            [known.get(number) or Round(round_path(self.folder, number), number) for number in rounds_in(self.folder)]
        )

    def _set_rounds(self, rounds: list[Round]) -> None:
        self._rounds = rounds
        self._columns = _Columns(rounds) if rounds else None
        self._table: Table | None = None
        self._through = 0

    @property
    def rounds(self) -> list[int]:
        return [r.number for r in self._rounds]

    @property
    def steps(self) -> dict[int, int]:
        """Round -> number of optimizer steps before it was sampled."""
        return {r.number: r.step for r in self._rounds}

    def take_over(self, folder: Path, step: int) -> list[int]:
        """Copy the rounds that another pool had by an optimiser step, with the files beside them; return their numbers.

        Raises:
            ValueError: a round of the other pool is missing or damaged.
        """
        numbers = [n for n in rounds_in(folder) if Round(round_path(folder, n), n).step <= step]
        of_round = {path: re.search(r"-(\d{5,})$", path.stem) for path in folder.glob("*.json")}
        beside = [path for path, number in of_round.items() if number is None or int(number[1]) in numbers]
        for path in sorted([*beside, *(round_path(folder, n) for n in numbers)]):
            with path.open("rb") as source, atomic_write(self.folder / path.name) as file:
                shutil.copyfileobj(source, file)
        self.reload()
        return numbers

    def check_writable(self) -> None:
        """Raise OSError where no round can be written."""
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder} takes no new round: {error.strerror}. Make it writable and make room, or give another "
                "pool_dir or output_dir.",
            ) from error

    def add(self, samples: Iterable[Sample]) -> None:
        """Write the next round.

        Raises:
            OSError: the file could not be written. Earlier rounds are whole, and nothing of this one is left.
            ValueError: there are no samples, one has another round or step, or another process wrote this round.
                Nothing is written.
        """
        number = len(self._rounds) + 1
        if len(rounds_in(self.folder)) >= number:
            raise ValueError(f"{self.folder} already has round {number}: call reload(). Rounds are never overwritten.")
        for path in leftovers(self.folder, "round-*.arrow"):
            path.unlink()
        try:
            write_round(round_path(self.folder, number), number, samples)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} Go on with resume_from_checkpoint=True: round {number} is sampled again.",
            ) from error
        self._set_rounds([*self._rounds, Round(round_path(self.folder, number), number)])

    def table(self, through: int | None = None) -> Table:
        """Return the samples kept after round ``through``, by default the last, with their labels."""
        through = len(self._rounds) if through is None else through
        if not 1 <= through <= len(self._rounds):
            raise ValueError(f"Round {through} is not in {self.folder}, which has rounds {self.rounds}. Add it first.")
        if self._table is None or self._through != through:
            self._table, self._through = self._replay(through), through
        return self._table

    def _replay(self, through: int) -> Table:
        if self.drop_factor in (0, 1):  # earlier labels do not matter
            first = through if self.drop_factor else 1
            return self._labelled(np.arange(self._start(first), self._start(through + 1)), None)
        table = self._labelled(np.arange(self._start(2)), None)
        for number in range(2, through + 1):
            stays = keep(table.label, drop_factor=self.drop_factor, rng_seed=(self.seed, number))
            new = np.arange(self._start(number), self._start(number + 1))
            table = self._labelled(np.concatenate([table.index[stays], new]), table.label[stays])
        return table

    def _start(self, number: int) -> int:
        return int(self._columns.ends[number - 2]) if number > 1 else 0

    def _labelled(self, index: NDArray, earlier: NDArray | None) -> Table:
        before = np.full(len(index), NEW, dtype=np.int32)
        if earlier is not None:
            before[: len(earlier)] = earlier
        table = Table(self._columns, index, before)
        label = np.asarray(self._label(table))
        if label.shape != index.shape or label.dtype.kind != "i" or label.min() < LEFT_OUT:
            raise ValueError(
                f"The pool's label function returned {label.dtype} of shape {label.shape}, lowest {label.min()}; "
                f"expected an integer for each of {len(index)} samples, 0 the best, -1 for one to be left out."
            )
        return Table(self._columns, index, label.astype(np.int32))

    def read(self, indices: ArrayLike, through: int | None = None) -> list[Sample]:
        """Return the samples at these rows of ``table(through)``, in their order."""
        table, indices = self.table(through), np.asarray(indices, dtype=np.int64)
        numbers, rows = table.round[indices], table.row[indices]
        found: list = [None] * len(indices)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            for place, sample in zip(places, self._rounds[number - 1].read(rows[places]), strict=True):
                found[place] = sample
        return found

    def __len__(self) -> int:
        return len(self.table()) if self._rounds else 0

    def __getitem__(self, i: int) -> Sample:
        return self.read([i])[0]

    def draws(
        self, n: int, seed: int | Sequence[int], through: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Draw n samples, balanced over labels: return (n,) rows of ``table(through)`` and their (n,) labels."""
        table = self.table(through)
        indices = balanced_order(table.label, table.finished, n=n, seed=seed)
        return indices, table.label[indices]

    def counts(self, through: int | None = None) -> dict[int, dict[int, int]]:
        """Return round -> label -> number of samples kept."""
        table = self.table(through)
        pairs = Counter(zip(table.round.tolist(), table.label.tolist(), strict=True))
        counts: dict[int, dict[int, int]] = {}
        for (number, label), count in sorted(pairs.items()):
            counts.setdefault(number, {})[label] = count
        return counts
