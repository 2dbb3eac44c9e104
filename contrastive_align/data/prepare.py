"""A dataset of any shape -> token ids, cached and in parallel, and the report of what was read, cut and dropped."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from contrastive_align.data import formats, rows, tokenise
from contrastive_align.data.columns import Options
from contrastive_align.data.files import files_of
from contrastive_align.data.formats import Columns, Group, TooFew, check_scores, checked_group, distinct
from contrastive_align.data.reading import FIRST_ROWS, SOURCE, TOKEN_COLUMNS, as_utf8, join_rows, read_shape, unbatched
from contrastive_align.data.rows import BadRow, number_in_file, values_of, without_advice
from contrastive_align.data.shapes import Reading
from contrastive_align.data.shards import ShardedGroups, lengths_of
from contrastive_align.data.tokenise import NoRoom, TokenisedGroup, fit, tokenise_groups


logger = logging.get_logger(__name__)

TOKENS = "token ids"
BATCH = 256  # rows whose texts go to the tokenizer in one call
ALWAYS_DROPPED = (NoRoom, TooFew)
_SOURCE = hashlib.sha256(
    SOURCE.encode() + b"".join(Path(f).read_bytes() for f in (__file__, tokenise.__file__))
).hexdigest()


@dataclass
class DataReport:
    """What a dataset turned out to hold. Row numbers are the dataset's own, from 0.

    Of a stream the counts are those of the rows that this process read so far, each counted once.
    """

    spelling: str  # the name of its shape
    known_from: str = ""
    streamed: bool = False
    rows: int = 0
    groups: int = 0
    groups_by_k: dict[int, int] = field(default_factory=dict)
    read_columns: list[str] = field(default_factory=list)
    unread_columns: list[str] = field(default_factory=list)
    dropped: int = 0
    dropped_because: dict[str, str] = field(default_factory=dict)
    single_answers: int = 0
    no_signal: int = 0
    no_signal_rows: list[int] = field(default_factory=list)
    cut_completions: int = 0
    cut_prompts: int = 0
    moved_boundaries: int = 0
    equal_completions: int = 0
    repeated_prompts: int = 0
    ties: int = 0
    contradictions: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def recognised(self) -> str:
        """Say as what the dataset was recognised, and how many groups it holds."""
        known = f"{self.spelling} (like {self.known_from})" if self.known_from else self.spelling
        read = f", from {', '.join(self.read_columns)}" if self.read_columns else ""
        ks = ", ".join(f"{n} of K = {k}" for k, n in sorted(self.groups_by_k.items()))
        of = f"the first {self.rows} rows of a stream" if self.streamed else f"{self.rows} rows"
        return f"{self.groups} groups ({ks}) of {of}, read as {known}{read}"

    def count(self, columns: Mapping[str, list[Any]]) -> None:
        """Add rows as :func:`prepare_groups` makes them, before the bad ones are taken out."""
        for row in unbatched(columns):
            self._count_row(row)

    def count_of_stream(self, row: Mapping[str, Any]) -> None:
        """Add a row of a stream; the first that is dropped is said at once."""
        self._count_row(row)
        if row["problem"] and self.dropped == 1:
            logger.warning(f"Rows of the stream are dropped; the first: {without_advice(row['problem'])}")

    def _count_row(self, row: Mapping[str, Any]) -> None:
        self.rows += row["rows"]
        if row["problem"]:
            self.dropped += 1
            if len(self.dropped_because) < FIRST_ROWS:
                self.dropped_because[str(row["row"])] = without_advice(row["problem"])
            return
        k = len(row["scores"])
        self.groups += 1
        self.groups_by_k[k] = self.groups_by_k.get(k, 0) + 1
        if len(set(row["scores"])) == 1:
            self.no_signal += 1
            self.no_signal_rows += [row["row"]] if len(self.no_signal_rows) < FIRST_ROWS else []
        self.cut_completions += row["cut_completions"]
        self.cut_prompts += row["cut_prompt_tokens"] > 0
        self.moved_boundaries += row["moved_boundary"] > 0
        self.equal_completions += row["equal_completions"]
        self.repeated_prompts += row["repeated_prompt"]
        self.ties += row["rated"] == EQUAL
        self.contradictions += row["rated"] == LOWER

    def check_some_left(self, name: str) -> None:
        """Refuse a dataset without a group.

        Raises:
            ValueError: with the reasons of the first rows.
        """
        if not self.groups:
            reasons = "\n  ".join(self.dropped_because.values())
            raise ValueError(
                f"No group is left of the {name} dataset's {self.rows} rows. The first reasons:\n  {reasons}"
            )

    def lost(self) -> list[str]:
        """Say what was dropped or cut, a line each, with the first rows."""
        first = "; ".join(self.dropped_because.values())
        lines = {
            f"{self.dropped} of {self.rows} rows dropped. The first: {first}.": self.dropped,
            f"{self.single_answers} prompts with one answer dropped: a group needs two.": self.single_answers,
            f"{self.equal_completions} completions left out that equal another of their group.": self.equal_completions,
            f"{self.cut_completions} completions cut to fit max_length (they train no EOS).": self.cut_completions,
            f"{self.cut_prompts} prompts cut to max_prompt_length (their end is kept).": self.cut_prompts,
            f"in {self.moved_boundaries} groups the prompt's last token merges with the completion's first; the "
            "completions are scored from there on.": self.moved_boundaries,
            f"in {self.repeated_prompts} groups the completions began with the prompt, which was taken out of them.": (
                self.repeated_prompts
            ),
        }
        return [line for line, count in lines.items() if count]

    def notes(self) -> list[str]:
        """Say what was not read, what was lost, and what weighs nothing."""
        unread = [f"columns not read: {', '.join(self.unread_columns)}."] if self.unread_columns else []
        rated = []
        if self.ties or self.contradictions:
            rated = [
                f"of the pairs, {self.ties} have equal ratings and {self.contradictions} a higher one for the "
                "rejected; they are trained as pairs all the same."
            ]
        where = f"(first rows {self.no_signal_rows})"
        flat = [f"{self.no_signal} of {self.groups} groups have equal scores only {where}."] if self.no_signal else []
        return [*unread, *self.lost(), *rated, *flat]


def prepare_groups(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    on_bad_row: str,
    num_proc: int | None = None,
    name: str = "train",
    options: Options | None = None,
    vocabulary: int | None = None,
) -> tuple[Dataset | IterableDataset | ShardedGroups, DataReport]:
    """Turn a dataset of any known shape into one with ``prompt_ids``, ``completion_ids`` and ``scores``.

    A dataset that already has these columns is checked and cut to length like any other; further columns go. Files that
    are streamed become :class:`ShardedGroups`.

    Args:
        dataset: the rows.
        tokenizer: the model's.
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, which keeps its end.
        on_bad_row: ``"raise"`` at the first bad row, or ``"drop"`` and count. Groups whose prompt leaves no room under
            ``max_length`` are dropped and counted in either case, as TRL does; and those with fewer than two different
            completions.
        num_proc: processes.
        name: the split, for errors.
        options: what the user says of the columns.
        vocabulary: rows of the model's embedding; a token beyond them is refused.

    Raises:
        BadRow: with file, row and column.
        ValueError: no known shape, no group left, or tokens that the model does not have.
    """
    options = options or Options()
    files = files_of(dataset)
    dataset = dataset.with_format(None)  # plain lists and numbers, whatever tensors it would give
    reading = read_shape(dataset, options, name)
    spelling = TOKENS if reading is None else reading.shape
    joined: dict[str, Any] = {}
    told = DataReport(spelling, streamed=isinstance(dataset, IterableDataset))
    if reading is not None:
        told.known_from = reading.known_from
        told.read_columns, told.unread_columns = reading.read_columns, reading.unread_columns
        if reading.joined:
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"The {name} dataset has one answer a row, and the rows of a prompt may stand anywhere in it, "
                    "so it cannot be a stream. Load it whole, without streaming."
                )
            dataset, joined = join_rows(dataset, reading, on_bad_row=on_bad_row, name=name)
            told.dropped, told.single_answers = joined["dropped"], joined["single_answers"]
            told.dropped_because = {row: without_advice(why) for row, why in joined["dropped_because"].items()}
            reading = read_shape(dataset, Options(hard_pairs=options.hard_pairs), name)
    reader = _RowReader(reading, tokenizer, max_length, max_prompt_length, on_bad_row, name, vocabulary)
    if files is not None:
        reader.as_lists, lengths = True, lengths_of(files)
        starts = [0, *itertools.accumulate(map(int, lengths))]
        reader.files = tuple((start, path.name) for start, path in zip(starts, files, strict=False))
        return ShardedGroups(files, lengths, reader, told), told
    columns = list(dataset.column_names or next(iter(dataset)))
    map_options = {
        "with_indices": True,
        "batched": True,
        "batch_size": BATCH,
        "remove_columns": columns,
        "features": _FEATURES,
    }
    if isinstance(dataset, IterableDataset):
        reader.as_lists = True
        map_options["batch_size"] = 1  # a stream is read as it is trained on
        stream = dataset.map(reader, **map_options).filter(_GoodOfStream(told), with_indices=True)
        next(iter(stream), None)  # up to the first group: what is wrong with all rows is said before training
        told.check_some_left(name)
        return stream, told

    desc = f"Reading and tokenising the {name} groups"
    key = reader.cache_key(dataset)
    mapped = dataset.map(reader, **map_options, num_proc=num_proc, desc=desc, new_fingerprint=key)
    told.count({column: mapped[column][:] for column in ("scores", *_COUNTED)})
    told.rows = joined["rows"] if joined else len(dataset)
    told.check_some_left(name)
    good = [i for i, problem in enumerate(mapped["problem"][:]) if not problem]
    return (mapped if len(good) == len(mapped) else mapped.select(good)).remove_columns(_COUNTED), told


# Told, not guessed from the first rows: these may all be dropped ones, whose lists are empty.
_FEATURES = Features(
    prompt_ids=List(Value("int64")),
    completion_ids=List(List(Value("int64"))),
    scores=List(Value("float64")),
    rows=Value("int64"),  # 1 for the first group of a row of the dataset
    row=Value("int64"),
    problem=Value("string"),
    cut_completions=Value("int64"),
    cut_prompt_tokens=Value("int64"),
    moved_boundary=Value("int64"),
    equal_completions=Value("int64"),
    repeated_prompt=Value("int64"),
    rated=Value("int64"),
)
# Of a hard pair: how the ratings beside it are for the chosen; 0 where there are none.
LOWER, EQUAL, HIGHER = 1, 2, 3
_COUNTED = [name for name in _FEATURES if name not in TOKEN_COLUMNS]


@dataclass
class _Read:
    """A group on its way to token ids, or the error of its row."""

    row: int
    where: str
    group: Group | None = None
    tokens: TokenisedGroup | None = None
    scores: list[float] = field(default_factory=list)
    error: BadRow | None = None
    repeated_prompt: int = 0
    equal_completions: int = 0
    rated: int = 0


@dataclass
class _RowReader:
    """A picklable function of a batch of rows, so that ``datasets`` can cache and parallelise it."""

    reading: Reading | None
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    max_prompt_length: int | None
    on_bad_row: str
    name: str
    vocabulary: int | None = None
    as_lists: bool = False
    files: tuple[tuple[int, str], ...] = ()  # of shards: the number of the first row of each, and its name
    source: str = _SOURCE  # part of the cache's key: rows cached by other code are read again

    def cache_key(self, dataset: Dataset) -> str | None:
        """Return the key of the cache; None for a tokenizer in Python, of which datasets hashes every attribute.

        Of a fast tokenizer its own serialisation is hashed, which takes a hundredth of the time.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        options = replace(self, tokenizer=None)  # type: ignore[arg-type]
        tokenizer = type(self.tokenizer).__qualname__, self.tokenizer.chat_template, self.tokenizer.special_tokens_map
        written = hashlib.sha256(backend.to_str().encode()).hexdigest()
        return Hasher.hash((dataset._fingerprint, options, repr(tokenizer), written))

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> Any:
        read: list[_Read] = []
        for row, number in zip(unbatched(batch), indices, strict=True):
            read += self._read(row, number_in_file(row, number))
        waiting = [item for item in read if item.group is not None]
        limits = {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length}
        tokenised = tokenise_groups([item.group for item in waiting], self.tokenizer, **limits)
        for item, found in zip(waiting, tokenised, strict=True):
            if isinstance(found, BadRow):
                item.error = type(found)(f"{item.where}: {found}")
            else:
                item.tokens, item.scores = found, item.group.scores
        for item in read:
            if item.error is None:
                self._finish(item)
            if item.error is not None:
                if self.on_bad_row == "raise" and not isinstance(item.error, ALWAYS_DROPPED):
                    raise item.error
                item.tokens, item.scores = TokenisedGroup([], [[]]), [0.0]
        return _as_lists(read) if self.as_lists else _as_table(read)

    def _read(self, row: Mapping[str, Any], number: int) -> list[_Read]:
        where = self._where(number)
        try:
            values = values_of(row, where)
            if self.reading is None:
                scores = self._check_tokens(values, where)
                ids = TokenisedGroup(values["prompt_ids"], values["completion_ids"])
                try:
                    ids = fit(ids, self.max_length, self.max_prompt_length, self.tokenizer.bos_token_id)
                except BadRow as error:
                    raise type(error)(f"{where}: {error}") from error
                return [_Read(number, where, None, ids, scores)]
            return [self._group(parts, values, number, where) for parts in self.reading(values, where)]
        except BadRow as error:
            return [_Read(number, where, error=error)]

    def _where(self, number: int) -> str:
        if len(self.files) < 2:
            return f"{self.name}, row {number}"
        start, file = self.files[bisect.bisect_right(self.files, number, key=lambda found: found[0]) - 1]
        return f"{self.name}, {file}, row {number - start}"

    def _group(self, parts: Any, values: Mapping[str, Any], number: int, where: str) -> _Read:
        group, counts = checked_group(parts, where, prompt_repeats=self.reading.prompt_repeats)
        found = _Read(number, where, group, None, [], None, counts.repeated_prompt, counts.equal_completions)
        if self.reading.options.hard_pairs:
            found.rated = self._rated(values, where)
            best, worst = max(group.scores), min(group.scores)
            if best > worst:
                group.scores = [float(score == best) for score in group.scores]
        if self.reading.is_chat and not group.is_conversational and self.tokenizer.chat_template:
            group.prompt = [{"role": "user", "content": group.prompt}]
            group.completions = [[{"role": "assistant", "content": text}] for text in group.completions]
        return found

    def _rated(self, values: Mapping[str, Any], where: str) -> int:
        """Return how the ratings beside a pair are for the chosen, or 0 where there are none."""
        ratings, row = self.reading.ratings, self.reading.naming.by_key(values)
        if not ratings or any(row.get(key) is None for key in ratings):
            return 0
        try:  # they are only counted
            chosen, rejected = (formats.number_of(row[key], where) for key in ratings)
        except BadRow:
            return 0
        return EQUAL if chosen == rejected else HIGHER if chosen > rejected else LOWER

    def _finish(self, item: _Read) -> None:
        """Take out completions that are the same tokens after the cut, and check that the model has every token."""
        ids = item.tokens
        if ids.cut_completions and self.reading is not None:
            kept = distinct([str(tokens) for tokens in ids.completion_ids], item.scores)
            if len(kept) < len(ids.completion_ids):
                item.equal_completions += len(ids.completion_ids) - len(kept)
                if len(kept) < 2:
                    item.error = TooFew(
                        f"{item.where}: cut to max_length={self.max_length}, completions are the same tokens, and "
                        f"{len(kept)} of {len(ids.completion_ids)} are left. Dropped."
                    )
                    return
                ids.completion_ids = [ids.completion_ids[i] for i in kept]
                item.scores = [item.scores[i] for i in kept]
        if self.vocabulary is not None:
            largest = max(max(ids.prompt_ids), *(max(tokens) for tokens in ids.completion_ids if tokens))
            if largest >= self.vocabulary:
                fix = "Resize the model and save it, in Python by model.resize_token_embeddings(len(tokenizer))."
                if self.reading is None:
                    fix = "Tokenise with the model's own tokenizer, or drop the row (on_bad_row='drop')."
                raise_as = BadRow if self.reading is None else ValueError
                error = raise_as(
                    f"{item.where}: the token id {largest} is beyond the model's embedding of {self.vocabulary} "
                    f"rows. {fix}"
                )
                if self.reading is not None:
                    raise error
                item.error = error

    def _check_tokens(self, row: Mapping[str, Any], where: str) -> list[float]:
        prompt, completions = row["prompt_ids"], row["completion_ids"]
        for column, ok in (("prompt_ids", prompt), ("completion_ids", completions and all(completions))):
            if not ok:
                raise BadRow(f"{where}: '{column}' is empty, expected token ids. Drop the row (on_bad_row='drop').")
        lists = [prompt, *completions]
        if any(not isinstance(ids, list) or any(not isinstance(i, int) or i < 0 for i in ids) for ids in lists):
            raise BadRow(f"{where}: 'prompt_ids' or 'completion_ids' hold something else than token ids. {rows.FIX}")
        columns = Columns("prompt_ids", "completion_ids", "scores")
        return check_scores(row["scores"] or [], len(completions), where, columns)


def _columns_of(read: list[_Read]) -> dict[str, list[int] | list[str]]:
    rows = [item.row for item in read]
    return {
        "rows": [int(i == 0 or row != rows[i - 1]) for i, row in enumerate(rows)],
        "row": rows,
        "problem": [as_utf8(item.error) for item in read],
        "cut_completions": [item.tokens.cut_completions for item in read],
        "cut_prompt_tokens": [item.tokens.cut_prompt_tokens for item in read],
        "moved_boundary": [item.tokens.moved_boundary for item in read],
        "equal_completions": [item.equal_completions for item in read],
        "repeated_prompt": [item.repeated_prompt for item in read],
        "rated": [item.rated for item in read],
    }


def _as_lists(read: list[_Read]) -> dict[str, list[Any]]:
    ids = {"prompt_ids": [i.tokens.prompt_ids for i in read], "completion_ids": [i.tokens.completion_ids for i in read]}
    return {**ids, "scores": [item.scores for item in read], **_columns_of(read)}


def _as_table(read: list[_Read]) -> pa.Table:
    """Build the Arrow table of a batch from flat arrays, which is faster than from lists of lists."""
    completions = [item.tokens.completion_ids for item in read]
    columns = {
        "prompt_ids": _list_array([item.tokens.prompt_ids for item in read], np.int64),
        "completion_ids": pa.ListArray.from_arrays(
            _offsets(completions), _list_array([ids for group in completions for ids in group], np.int64)
        ),
        "scores": _list_array([item.scores for item in read], np.float64),
        **{name: pa.array(values) for name, values in _columns_of(read).items()},
    }
    return pa.table(columns, schema=_FEATURES.arrow_schema)


def _offsets(lists: list[Any]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, lists)], dtype=np.int32))


def _list_array(lists: list[list[Any]], dtype: Any) -> pa.ListArray:
    flat = np.fromiter(itertools.chain.from_iterable(lists), dtype=dtype)
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(flat))


@dataclass
class _GoodOfStream:
    """Whether a row of a stream holds a group; counts each row once, however often the stream is read."""

    report: DataReport
    counted: int = 0

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        if index == self.counted:
            self.counted += 1
            self.report.count_of_stream(row)
        return not row["problem"]
