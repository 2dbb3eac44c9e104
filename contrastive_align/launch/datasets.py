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
from contrastive_align.launch.arguments import RunArguments, UsageError


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
Splits = DatasetDict | IterableDatasetDict


def load_splits(
    script: RunArguments, mixture: DatasetMixtureConfig, *, want_eval: bool, seed: int, on_bad_row: str
) -> tuple[Any, Any]:
    """Training and evaluation rows of ``dataset_name`` or ``datasets``.

    Evaluation rows come from ``dataset_test_split``, or are split off with ``test_split_size``; None where neither is
    there and ``want_eval`` is False.

    Raises:
        UsageError: both or neither source, a missing file or split.
    """
    if mixture.datasets and script.dataset_name:
        raise UsageError("both 'datasets' and 'dataset_name' are given. Keep one.")
    if mixture.datasets:
        splits = _load_mixture(script, mixture, want_eval)
    else:
        splits = _load_named(script.dataset_name, script.dataset_config, script.dataset_streaming, on_bad_row)
    train_name, test_name = script.dataset_train_split, script.dataset_test_split
    if train_name not in splits:
        raise UsageError(f"the dataset has no split '{train_name}', but {sorted(splits)}. Set --dataset_train_split.")
    train, test = splits[train_name], splits.get(test_name)
    if test is None and mixture.test_split_size is not None and not mixture.datasets:
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
    splits = get_dataset(mixture)
    if want_eval and mixture.test_split_size is None:  # each part's own test split
        parts = [dataclasses.replace(d, split=script.dataset_test_split, fraction=None) for d in mixture.datasets]
        splits[script.dataset_test_split] = get_dataset(dataclasses.replace(mixture, datasets=parts))["train"]
    if script.dataset_train_split not in splits:
        splits[script.dataset_train_split] = splits.pop("train")  # a mixture names the split of each part itself
    return splits


def _load_named(name: str, config: str | None, streaming: bool, on_bad_row: str) -> Splits:
    path = Path(name).expanduser()
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise UsageError(f"no file '{name}' (looked in {Path.cwd()}){_neighbour(path)}")
        try:
            return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=streaming)
        except DatasetGenerationError as error:
            return _read_json_lines(path, error, on_bad_row)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            dataset = load_from_disk(str(path))
            return DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
        return load_dataset(str(path), name=config, streaming=streaming)
    if path.suffix or os.path.isabs(name) or name.startswith(("~", ".")) or name.count("/") > 1:
        raise UsageError(
            f"no file or folder '{name}' (looked in {Path.cwd()}){_neighbour(path)} Files end in {', '.join(BUILDERS)}."
        )
    return load_dataset(name, name=config, streaming=streaming)


def _neighbour(path: Path) -> str:
    folder = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1, cutoff=0.5)
    return f". Did you mean '{folder / near[0]}'?" if near else "."


def _read_json_lines(path: Path, error: Exception, on_bad_row: str) -> Splits:
    """A JSON file whose rows do not make one table: find the row that is to blame, or drop such rows."""
    rows, problems = [], []
    try:
        lines = _json_rows(path)
    except ValueError as broken:
        raise UsageError(f"{path} cannot be read: {broken}") from error
    for number, row in enumerate(lines):
        try:
            if isinstance(row, Exception):
                raise BadRow(f"{path.name}, row {number}: not JSON: {row}")
            if not isinstance(row, dict):
                raise BadRow(f"{path.name}, row {number}: {type(row).__name__}, expected an object with columns.")
            group = read_group(row, number, detect_spelling(list(row), row), source=path.name)
        except ValueError as bad:
            if on_bad_row == "raise":
                raise bad if isinstance(bad, BadRow) else BadRow(f"{path.name}, row {number}: {bad}") from error
            problems.append(str(bad))
        else:
            rows.append({"prompt": group.prompt, "completions": group.completions, "scores": group.scores})
    if not rows:
        raise UsageError(f"{path}: no row can be used. The first problem: {problems[0]}") from error
    print(f"{path.name}: {len(problems)} rows dropped while reading. The first: {problems[:3]}")
    return DatasetDict({"train": Dataset.from_list(rows)})


def _json_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for line in text.splitlines():
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(error)
    return rows
