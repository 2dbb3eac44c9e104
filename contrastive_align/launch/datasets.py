"""A dataset name, file, folder or mixture -> training and evaluation rows."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, get_dataset

from contrastive_align.data import BadRow, detect_spelling, read_group
from contrastive_align.data.formats import ROW, UNREADABLE
from contrastive_align.launch.arguments import RunArguments, UsageError
from contrastive_align.trl_seam import DatasetConfig


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
Splits = DatasetDict | IterableDatasetDict


def load_splits(
    script: RunArguments, mixture: DatasetMixtureConfig, *, want_eval: bool, seed: int, on_bad_row: str | None
) -> tuple[Any, Any]:
    """Training and evaluation rows of ``dataset_name`` or ``datasets``.

    Evaluation rows come from ``dataset_test_split``, or are split off with ``test_split_size``; None where neither is
    there and ``want_eval`` is False. ``on_bad_row`` is None where rows are prompts and not groups.

    Raises:
        UsageError: both or neither source, a missing file or split.
    """
    if bool(mixture.datasets) == bool(script.dataset_name):
        found = (
            "both 'datasets' and 'dataset_name' are" if mixture.datasets else "neither 'datasets' nor 'dataset_name' is"
        )
        raise UsageError(f"{found} given. Give one.")
    if mixture.datasets and script.dataset_streaming:
        raise UsageError("'dataset_streaming' belongs to 'dataset_name'; for 'datasets' set 'streaming'.")
    if mixture.streaming and not mixture.datasets:
        raise UsageError("'streaming' belongs to 'datasets'; for 'dataset_name' set 'dataset_streaming'.")
    if mixture.datasets:
        splits = _load_mixture(script, mixture, want_eval)
    else:
        splits = _load_named(script.dataset_name, script.dataset_config, script.dataset_streaming, on_bad_row)
    train_name, test_name = script.dataset_train_split, script.dataset_test_split
    if train_name not in splits:
        raise UsageError(f"the dataset has no split '{train_name}', but {sorted(splits)}. Set --dataset_train_split.")
    train, test = splits[train_name], splits.get(test_name)
    if isinstance(train, Dataset) and mixture.test_split_size is not None:
        train = train.add_column(ROW, range(len(train)))  # errors name the row of the file, not of the shuffled split
    if test is None and mixture.test_split_size is not None:
        if not isinstance(train, Dataset):
            raise UsageError("--test_split_size needs the whole dataset, found a stream. Name a --dataset_test_split.")
        train, test = train.train_test_split(test_size=mixture.test_split_size, seed=seed).values()
    if test is None and want_eval:
        raise UsageError(
            f"evaluation is asked for, but the dataset has no split '{test_name}' (it has {sorted(splits)}). Set "
            "--dataset_test_split, split some off with --test_split_size=0.1, or set --eval_strategy=no."
        )
    return take(train, script.max_train_samples), take(test, script.max_eval_samples)


def take(dataset: Any, n: int | None) -> Any:
    """The first ``n`` rows, or all."""
    if dataset is None or n is None:
        return dataset
    return dataset.select(range(min(n, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(n)


def _load_mixture(script: RunArguments, mixture: DatasetMixtureConfig, want_eval: bool) -> Splits:
    # The split into training and evaluation rows is seeded, so that it is the caller's.
    whole = dataclasses.replace(mixture, datasets=[_as_builder(d) for d in mixture.datasets], test_split_size=None)
    splits = get_dataset(whole)
    if want_eval and mixture.test_split_size is None:  # each part's own test split
        parts = [dataclasses.replace(d, split=script.dataset_test_split, fraction=None) for d in whole.datasets]
        splits[script.dataset_test_split] = get_dataset(dataclasses.replace(whole, datasets=parts))["train"]
    if script.dataset_train_split not in splits:
        splits[script.dataset_train_split] = splits.pop("train")  # a mixture names the split of each part itself
    return splits


def _as_builder(part: DatasetConfig) -> DatasetConfig:
    """A local file as ``datasets.load_dataset`` wants it: the name of its reader, and the file."""
    path = Path(part.path).expanduser()
    if path.suffix.lower() not in BUILDERS:
        return part
    if not path.is_file():
        raise UsageError(f"no file '{part.path}' (looked in {Path.cwd()}){_neighbour(path)}")
    return dataclasses.replace(part, path=BUILDERS[path.suffix.lower()], data_files=str(path))


def _load_named(name: str, config: str | None, streaming: bool, on_bad_row: str | None) -> Splits:
    path = Path(name).expanduser()
    builder = BUILDERS.get(path.suffix.lower())
    if config is not None and (builder or path.is_file()):
        raise UsageError(f"'dataset_config' is {config!r}, but '{name}' is a file and has none. Leave it out.")
    if builder:
        return _load_file(name, path, builder, streaming, on_bad_row)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _load_saved(path, streaming)
        return load_dataset(str(path), name=config, streaming=streaming)
    if path.is_file():
        raise UsageError(f"'{name}' ends in '{path.suffix}', expected one of {', '.join(BUILDERS)}, or a folder.")
    looks_local = os.path.isabs(name) or name.startswith(("~", ".")) or name.count("/") > 1
    if looks_local or (path.suffix[1:].isalpha() and path.parent.is_dir()):  # not the .5 of a hub name
        raise UsageError(
            f"no file or folder '{name}' (looked in {Path.cwd()}){_neighbour(path)} Files end in {', '.join(BUILDERS)}."
        )
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except ConnectionError as error:
        raise UsageError(f"'{name}' is no local file or folder, and the hub cannot be reached: {error}") from error


def _load_file(name: str, path: Path, builder: str, streaming: bool, on_bad_row: str | None) -> Splits:
    if not path.is_file():
        raise UsageError(f"no file '{name}' (looked in {Path.cwd()}){_neighbour(path)}")
    if not path.stat().st_size:
        raise UsageError(f"'{name}' is empty, expected at least one row.")
    try:
        return load_dataset(builder, data_files=str(path), streaming=streaming)
    except DatasetGenerationError as error:
        if builder == "json":
            return _read_json_lines(path, error, on_bad_row)
        raise UsageError(f"'{name}' cannot be read as {builder}: {error.__cause__ or error}") from error
    except ValueError as error:
        raise UsageError(f"'{name}' cannot be read as {builder}: {error}") from error


def _load_saved(path: Path, streaming: bool) -> Splits:
    """A folder written by ``save_to_disk``."""
    saved = load_from_disk(str(path))
    splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
    if streaming:
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    return splits


def _neighbour(path: Path) -> str:
    folder = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1, cutoff=0.5)
    return f". Did you mean '{folder / near[0]}'?" if near else "."


def _read_json_lines(path: Path, error: Exception, on_bad_row: str | None) -> Splits:
    """A JSON file whose rows do not make one table: find the row that is to blame, or drop such rows."""
    try:
        found = _json_rows(path)
    except ValueError as broken:
        raise UsageError(f"{path} cannot be read: {broken}") from error
    rows, problems = [], []
    for number, row in enumerate(found):
        try:
            if isinstance(row, Exception):
                raise BadRow(f"{path.name}, row {number}: not JSON: {row}")
            if not isinstance(row, dict):
                raise BadRow(f"{path.name}, row {number}: {type(row).__name__}, expected an object with columns.")
            if on_bad_row is not None:
                read_group(row, number, detect_spelling(list(row), row), source=path.name)
        except ValueError as bad:
            bad = bad if isinstance(bad, BadRow) else BadRow(f"{path.name}, row {number}: {bad}")
            if on_bad_row != "drop":
                raise bad from error
            problems.append(str(bad))
            rows.append({UNREADABLE: str(bad)})  # dropped and counted later on, so that the others keep their numbers
        else:
            rows.append(row)
    if len(problems) == len(rows):
        raise UsageError(f"{path}: no row can be used. The first problem: {problems[0]}") from error
    columns = dict.fromkeys(column for row in rows for column in row)
    return DatasetDict({"train": Dataset.from_list([columns | row for row in rows])})


def _json_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for line in text.split("\n"):  # splitlines() would also cut at the line separators inside of strings
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(error)
    return rows
