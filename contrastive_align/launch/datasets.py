"""Load training and evaluation rows from a dataset name, a file, a folder, a mixture or one prompt."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
from trl import DatasetMixtureConfig, get_dataset

from contrastive_align import demo
from contrastive_align.conditions import Condition
from contrastive_align.conditions.scored_rows import ScoredRows
from contrastive_align.data import read_shape
from contrastive_align.data.columns import SAMPLE, Naming, Table, key_of, read_options
from contrastive_align.data.files import KINDS, FileProblem, folder_files, kind_of, prompts_of, read_files
from contrastive_align.data.formats import with_system
from contrastive_align.data.messages import as_text
from contrastive_align.data.prompts import Prompt, find_prompt
from contrastive_align.data.reading import join_rows
from contrastive_align.data.rows import RAW, ROW, BadRow, number_in_file, values_of
from contrastive_align.launch.arguments import Arguments, RunArguments
from contrastive_align.launch.usage import UsageError
from contrastive_align.trl_seam import DatasetConfig


# Columns of groups and pairs, which are dropped where a dataset serves for its prompts alone.
NOT_PROMPTS = ("completion", "completions", "scores", "responses", "rewards", "chosen", "rejected", "completion_ids")
DEMO_NAME = "the bundled demo data"
Splits = DatasetDict | IterableDatasetDict


def load_splits(args: Arguments, *, on_bad_row: str | None = None) -> tuple[Any, Any]:
    """Load the training and evaluation rows of ``dataset_name`` or ``datasets``.

    Evaluation rows are ``dataset_test_split``, or are split off with ``test_split_size``. Without either they are None,
    or UsageError is raised if evaluation is asked for. ``on_bad_row`` is None where rows are no groups.
    """
    script, mixture = args.script, args.datasets
    wants_eval = args.training.eval_strategy != "no" or args.training.do_eval
    if mixture.datasets and script.dataset_name:
        raise UsageError("both 'datasets' and 'dataset_name' are given. Give one.")
    if not mixture.datasets and not script.dataset_name:
        raise UsageError("neither 'datasets' nor 'dataset_name' is given. Give one.")
    if mixture.datasets and script.dataset_streaming:
        raise UsageError("'dataset_streaming' belongs to 'dataset_name'; for 'datasets' set 'streaming'.")
    if mixture.streaming and not mixture.datasets:
        raise UsageError("'streaming' belongs to 'datasets'; for 'dataset_name' set 'dataset_streaming'.")
    if mixture.datasets:
        splits = _load_mixture(script, mixture, wants_eval)
    else:
        splits = _load_named(script.dataset_name, script.dataset_config, script.dataset_streaming)
    train_name, test_name = script.dataset_train_split, script.dataset_test_split
    if train_name not in splits:
        raise UsageError(f"the dataset has no split '{train_name}', but {sorted(splits)}. Set --dataset_train_split.")
    train, test = splits[train_name], splits.get(test_name)
    if on_bad_row is not None:
        train, test = (
            rows and _joined(args, rows, name, on_bad_row) for rows, name in ((train, "train"), (test, "eval"))
        )
    if isinstance(train, Dataset) and mixture.test_split_size is not None:
        if ROW not in train.column_names:  # errors name the row of the file, not of the shuffled split
            train = train.add_column(ROW, range(len(train)))
    if test is None and mixture.test_split_size is not None:
        if not isinstance(train, Dataset):
            raise UsageError("--test_split_size needs the whole dataset, found a stream. Name a --dataset_test_split.")
        train, test = train.train_test_split(test_size=mixture.test_split_size, seed=args.training.seed).values()
    if test is None and wants_eval:
        found = f"evaluation is asked for, but the dataset has no split '{test_name}' (it has {sorted(splits)})"
        fix = "Set --dataset_test_split, split some off with --test_split_size=0.1, or set --eval_strategy=no."
        raise UsageError(f"{found}. {fix}")
    return take(train, script.max_train_samples), take(test, script.max_eval_samples)


def _joined(args: Arguments, rows: Any, name: str, on_bad_row: str) -> Any:
    """Join the rows of a prompt where a row has one answer, before any are split off or left out."""
    training = args.training
    options = read_options(training.columns, training.score_column, training.hard_pairs)
    reading = read_shape(rows, options, name)
    if reading is None or not reading.joined or not isinstance(rows, Dataset):
        return rows
    joined, counts = join_rows(rows, reading, on_bad_row=on_bad_row, name=name)
    args.notes.append(
        f"{name}: {counts['rows']} rows of one answer each are {len(joined)} groups; dropped: {counts['dropped']} "
        f"rows, {counts['single_answers']} prompts with one answer"
    )
    first = next(iter(counts["dropped_because"].values()), None)
    args.notes += [f"the first row dropped: {first}"] if first else []
    training.columns, training.score_column = None, None  # the groups have the canonical ones
    return joined


def take(dataset: Any, n: int | None) -> Any:
    """Take the first ``n`` rows, or all if ``n`` is None."""
    if dataset is None or n is None:
        return dataset
    return dataset.select(range(min(n, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(n)


def load_demo(args: Arguments, *, preference: bool = False) -> tuple[Dataset, Dataset]:
    """Load the bundled training and held-out rows."""
    splits = demo.load_preference_dataset() if preference else demo.load_reward_dataset()
    return take(splits["train"], args.script.max_train_samples), take(splits["test"], args.script.max_eval_samples)


def load_prompts(args: Arguments) -> tuple[Dataset, Dataset | None, str]:
    """Load training and evaluation rows with a column ``prompt``, and the name of the data."""
    script, named = args.script, args.script.dataset_name
    if script.prompt is not None:
        if args.dataset:
            raise UsageError("both a prompt and a dataset are given. Give one.")
        return from_rows([{"prompt": script.prompt}], "--prompt"), None, "one prompt"
    if named and Path(named).suffix.lower() == ".txt":
        return take(_read_lines(Path(named).expanduser()), script.max_train_samples), None, named
    name = args.dataset or "the bundled demo prompts"
    train, test = load_demo(args) if args.bundled_data else load_splits(args)
    columns = getattr(args.script, "columns", None) or getattr(args.training, "columns", None)
    train, test = from_rows(train, name, columns), None if test is None else from_rows(test, name, columns)
    if hasattr(args.training, "columns"):
        args.training.columns = None  # the rows have the canonical one
    return train, test, name


def load_scored(args: Arguments, condition: Condition) -> tuple[Dataset, Dataset | None, str]:
    """Load completions with scores or feedback in the canonical form, and the name of the data.

    The training arguments name the columns, and forget them: the canonical ones are what a trainer looks for.
    """
    train, test = load_demo(args) if args.bundled_data else load_splits(args)
    training = args.training
    options = read_options(training.columns, training.score_column)
    told = {"feedback_column": training.feedback_column, "negate_score": training.negate_score}

    def canonical(rows: Any, name: str) -> Dataset:
        scored = ScoredRows.of(rows, condition, options=options, **told)
        found, problems = scored.to_dataset(on_bad_row=training.on_bad_row)
        if unread := scored.unread_columns:
            args.notes.append(f"{name}: columns not read: {', '.join(unread)}")
        if problems:
            args.notes.append(f"{name}: {len(problems)} of {len(rows)} rows dropped. The first: {problems[0]}")
        return found

    rows, held_out = canonical(train, "train"), None if test is None else canonical(test, "eval")
    training.columns = training.score_column = training.feedback_column = None
    training.negate_score = False
    return rows, held_out, args.dataset or DEMO_NAME


def from_rows(rows: Any, name: str, columns: Any = None) -> Dataset:
    """Check the prompts and return the rows in memory, without the columns of completions and scores.

    ``columns`` is what the user says of them, as in ``prompt=question``.
    """
    checked: list[dict[str, Any]] = []
    plain = []
    for number, row in enumerate(rows):
        try:
            plain.append(values_of(row, f"{name}, row {number_in_file(row, number)}"))
        except BadRow as error:
            raise UsageError(str(error)) from error
    if not plain:
        raise UsageError(f"{name} has no rows, expected at least one prompt.")
    options = read_options(columns, None)
    names = {key_of(column): column for row in plain[:SAMPLE] for column in row}
    naming = Naming.of(options, names)
    table = Table([naming.by_key(row) for row in plain[:SAMPLE]], naming.names(names), options, naming)
    prompt = find_prompt(table, map(key_of, NOT_PROMPTS))
    for number, row in enumerate(plain):
        where = f"{name}, row {number}"
        keyed = naming.by_key(row)
        if prompt.main is None or keyed.get(prompt.main) is None:
            raise UsageError(
                f"{where}: no 'prompt', only {sorted(row)}. Name the column that has it: columns='prompt=NAME'."
            )
        told = _read_prompt(prompt, keyed, where)
        if not is_prompt(told):
            raise UsageError(f"{where}: 'prompt' is {str(told)[:80]!r}, expected a text, or messages up to the user's.")
        read = {table.names[key] for key in prompt.keys if key in table.names}
        left = {key: value for key, value in row.items() if key not in NOT_PROMPTS and key not in read}
        checked.append({"prompt": told, **left})
    return Dataset.from_list(checked)


def _read_prompt(prompt: Prompt, row: dict[str, Any], where: str) -> Any:
    try:
        found = prompt.read(row, where)
        return with_system(as_text(found["prompt"], f"{where}: 'prompt'"), found["system"], where)
    except BadRow as error:
        raise UsageError(str(error)) from error


def repeat(rows: Dataset, at_least: int) -> Dataset:
    """Repeat the rows until there are ``at_least`` so many; TRL drops a step that is not full."""
    times = -(-at_least // len(rows))
    return rows if times <= 1 else rows.select(list(range(len(rows))) * times)


def only_prompts(script: RunArguments) -> bool:
    """Return whether the data are one prompt, or a text file of them."""
    return script.prompt is not None or str(script.dataset_name).lower().endswith(".txt")


def has_scores(args: Arguments) -> bool:
    """Return whether the rows of the data set are groups or pairs, in any shape that is read, and not prompts alone."""
    training = args.training
    train, _ = load_splits(args)
    try:
        read_shape(train, read_options(training.columns, training.score_column, training.hard_pairs), "train")
    except ValueError:
        return False
    return True


def is_prompt(value: Any) -> bool:
    """Return whether a value is text (also empty: generation starts from the BOS token) or messages to answer."""
    if isinstance(value, str):
        return True
    messages = isinstance(value, list) and value and all(isinstance(m, dict) and m.get("role") for m in value)
    return bool(messages) and value[-1]["role"] != "assistant"


def _load_mixture(script: RunArguments, mixture: DatasetMixtureConfig, want_eval: bool) -> Splits:
    # The caller splits into training and evaluation rows, with the run's seed.
    alone = all(kind_of(Path(part.path)) for part in mixture.datasets)
    parts = [_read_part(part, alone=alone) for part in mixture.datasets]
    whole = dataclasses.replace(mixture, datasets=parts, test_split_size=None)
    splits = get_dataset(whole)
    if want_eval and mixture.test_split_size is None:  # each part's own test split
        parts = [dataclasses.replace(d, split=script.dataset_test_split, fraction=None) for d in whole.datasets]
        splits[script.dataset_test_split] = get_dataset(dataclasses.replace(whole, datasets=parts))["train"]
    if script.dataset_train_split not in splits:
        splits[script.dataset_train_split] = splits.pop("train")  # a mixture names the split of each part itself
    return splits


def _read_part(part: DatasetConfig, *, alone: bool) -> DatasetConfig:
    """Read a part that is a local file; point to the Arrow file of its rows. ``alone``: all parts are local files."""
    path = Path(part.path).expanduser()
    if kind_of(path) is None:
        return part
    _check_file(part.path, path)
    rows = _read(path, [path], streaming=False)
    if RAW in rows.column_names and (part.columns or not alone):
        rows = typed(rows)
    elif ROW in rows.column_names:
        rows = rows.remove_columns(ROW)  # rows of several files have no numbers in common
        rows = rows.map(lambda row: row, load_from_cache_file=False)
    return dataclasses.replace(part, path="arrow", data_files=rows.cache_files[0]["filename"])


def typed(rows: Dataset) -> Dataset:
    """Return the rows of a file as columns of one type each.

    Raises:
        UsageError: rows whose values have several types.
    """
    if RAW not in rows.column_names:
        return rows
    try:
        return Dataset.from_generator(_plain_rows, gen_kwargs={"rows": rows})
    except DatasetGenerationError as error:
        raise UsageError(f"rows have values of several types in one column: {error.__cause__ or error}") from error


def _plain_rows(rows: Dataset) -> Iterator[dict[str, Any]]:
    found = [values_of(row, f"row {row[ROW]}") for row in rows]
    columns = dict.fromkeys(name for row in found for name in row)
    yield from ({**columns, **row} for row in found)


def _load_named(name: str, config: str | None, streaming: bool) -> Splits:
    path = Path(name).expanduser()
    if config is not None and (kind_of(path) or path.is_file()):
        raise UsageError(f"'dataset_config' is {config!r}, but '{name}' is a file and has none. Leave it out.")
    if kind_of(path) and not path.is_dir():
        _check_file(name, path)
        return _splits({"train": _read(path, [path], streaming)}, streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
        saved = load_from_disk(str(path))
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        streams = {split: rows.to_iterable_dataset() for split, rows in splits.items()} if streaming else {}
        return IterableDatasetDict(streams) if streaming else splits
    if path.is_dir():
        splits = {split: _read(path, files, streaming) for split, files in folder_files(path).items()}
        return _splits(splits, streaming) if splits else _load_folder(path, config, streaming)
    if path.is_file():
        raise UsageError(f"'{name}' ends in '{path.suffix}', expected one of {', '.join(KINDS)}, or a folder.")
    looks_local = os.path.isabs(name) or name.startswith(("~", ".")) or name.count("/") > 1
    if looks_local or (path.suffix[1:].isalpha() and path.parent.is_dir()):  # not the .5 of a hub name
        raise UsageError(
            f"no file or folder '{name}' (looked in {Path.cwd()}){_neighbour(path)} Files end in {', '.join(KINDS)}."
        )
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except ConnectionError as error:
        raise UsageError(f"'{name}' is no local file or folder, and the hub cannot be reached: {error}") from error


def _load_folder(path: Path, config: str | None, streaming: bool) -> Splits:
    """Load a folder by what datasets knows of its files."""
    try:
        return load_dataset(str(path), name=config, streaming=streaming)
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        found = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        raise UsageError(f"the folder '{path}' has no rows, but {found}. Files end in {', '.join(KINDS)}.") from error


def _splits(splits: Mapping[str, Any], streaming: bool) -> Splits:
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _read(path: Path, files: list[Path], streaming: bool) -> Any:
    try:
        return read_files(files, streaming=streaming)
    except FileProblem as error:
        raise UsageError(f"{error}") from error


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"no file '{name}' (looked in {Path.cwd()}){_neighbour(path)}")


def _neighbour(path: Path) -> str:
    folder = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1, cutoff=0.5)
    return f". Did you mean '{folder / near[0]}'?" if near else "."


def _read_lines(path: Path) -> Dataset:
    _check_file(str(path), path)
    try:
        return from_rows([{"prompt": line} for line in prompts_of(path)], str(path))
    except FileProblem as error:
        raise UsageError(f"{error}") from error
