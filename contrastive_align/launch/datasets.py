"""Load training and evaluation rows from a dataset name, a file, a folder, a mixture or one prompt."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, get_dataset

from contrastive_align import demo
from contrastive_align.conditions import AttributeCondition, Condition
from contrastive_align.data import BadRow, detect_spelling, read_group
from contrastive_align.data.formats import PROMPT_COLUMNS, ROW, UNREADABLE
from contrastive_align.launch.arguments import Arguments, RunArguments
from contrastive_align.launch.usage import UsageError
from contrastive_align.trl_seam import DatasetConfig


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Columns of groups and pairs, which are dropped where a dataset serves for its prompts alone.
NOT_PROMPTS = ("completion", "completions", "scores", "responses", "rewards", "chosen", "rejected", "completion_ids")
SCORES = ("score", "scores", "reward", "rewards")  # names of a column of scores, without --score_column
FEEDBACK = ("feedback", "feedbacks")
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
        train, test = train.train_test_split(test_size=mixture.test_split_size, seed=args.training.seed).values()
    if test is None and wants_eval:
        found = f"evaluation is asked for, but the dataset has no split '{test_name}' (it has {sorted(splits)})"
        fix = "Set --dataset_test_split, split some off with --test_split_size=0.1, or set --eval_strategy=no."
        raise UsageError(f"{found}. {fix}")
    return take(train, script.max_train_samples), take(test, script.max_eval_samples)


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
        if script.dataset_streaming:
            raise UsageError(f"dataset_streaming is given, and {named} is read as a whole. Leave it out.")
        return take(_read_lines(Path(named).expanduser()), script.max_train_samples), None, named
    name = args.dataset or "the bundled demo prompts"
    train, test = load_demo(args) if args.bundled_data else load_splits(args)
    return from_rows(train, name), None if test is None else from_rows(test, name), name


def load_scored(args: Arguments, condition: Condition, **columns: Any) -> tuple[Dataset, Dataset | None, str]:
    """Load completions with scores or feedback as :func:`with_feedback` names them, and the name of the data."""
    train, test = load_demo(args) if args.bundled_data else load_splits(args)
    train = with_feedback(train, condition, **columns)
    return train, None if test is None else with_feedback(test, condition, **columns), args.dataset or DEMO_NAME


def from_rows(rows: Any, name: str) -> Dataset:
    """Check the prompts and return the rows in memory, without the columns of completions and scores."""
    checked: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise UsageError(f"{name}, row {number}: no 'prompt', only {sorted(row)}. Rename the column that has it.")
        if not is_prompt(row["prompt"]):
            found = f"{name}, row {number}: 'prompt' is {str(row['prompt'])[:80]!r}"
            raise UsageError(f"{found}, expected a text, or messages up to the user's.")
        checked.append({key: value for key, value in row.items() if key not in NOT_PROMPTS})
    if not checked:
        raise UsageError(f"{name} has no rows, expected at least one prompt.")
    return Dataset.from_list(checked)


def repeat(rows: Dataset, at_least: int) -> Dataset:
    """Repeat the rows until there are ``at_least`` so many; TRL drops a step that is not full."""
    times = -(-at_least // len(rows))
    return rows if times <= 1 else rows.select(list(range(len(rows))) * times)


def only_prompts(script: RunArguments) -> bool:
    """Return whether the data are one prompt, or a text file of them."""
    return script.prompt is not None or str(script.dataset_name).lower().endswith(".txt")


def is_prompt(value: Any) -> bool:
    """Return whether a value is text (also empty: generation starts from the BOS token) or messages to answer."""
    if isinstance(value, str):
        return True
    messages = isinstance(value, list) and value and all(isinstance(m, dict) and m.get("role") for m in value)
    return bool(messages) and value[-1]["role"] != "assistant"


def with_feedback(
    dataset: Dataset,
    condition: Condition,
    *,
    score_column: str | None = None,
    negate_score: bool = False,
    feedback_column: str | None = None,
) -> Dataset:
    """Rename the columns of scores, feedback and prompts to the names that the trainer reads.

    ``negate_score`` is for scores of which lower is better (toxicity). Feedback is words, or JSON objects for the
    condition ``attributes``; without a ``feedback_column``, the columns with the names of its attributes are joined.
    """
    if not isinstance(dataset, Dataset):
        raise UsageError("scored completions are sorted by their scores, so they cannot be a stream. Leave it out.")
    for option, name in (("score_column", score_column), ("feedback_column", feedback_column)):
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"{option} is '{name}', and the data has the columns {sorted(dataset.column_names)}.")
    lists = bool({"completions", "responses"} & set(dataset.column_names))
    score_name, feedback_name = ("scores", "feedbacks") if lists else ("score", "feedback")
    score_column = score_column or _first(dataset, SCORES)
    if negate_score:
        if score_column is None:
            raise ValueError("negate_score is given, and the data has no scores. Name them with score_column.")
        negated = [_negative(x, f"row {i}, '{score_column}'") for i, x in enumerate(dataset[score_column])]
        dataset = dataset.remove_columns(score_column).add_column(score_column, negated)
    dataset = _rename(dataset, score_column, score_name, SCORES)
    attributes = list(condition.attributes) if isinstance(condition, AttributeCondition) else []
    missing = [name for name in attributes if name not in dataset.column_names]
    if feedback_column is None and attributes and not missing:
        dataset = dataset.map(
            lambda row: {feedback_name: _objects({a: row[a] for a in attributes})}, load_from_cache_file=False
        )
    elif feedback_column is None and attributes and _first(dataset, FEEDBACK) is None:
        raise ValueError(
            f"The condition 'attributes' is of {attributes}, and the data has no column for {missing}, only "
            f"{sorted(dataset.column_names)}. Rename them, or name a column of JSON objects with feedback_column."
        )
    dataset = _rename(dataset, feedback_column, feedback_name, FEEDBACK)
    return _rename(dataset, None, "prompt", PROMPT_COLUMNS)


def _load_mixture(script: RunArguments, mixture: DatasetMixtureConfig, want_eval: bool) -> Splits:
    # The caller splits into training and evaluation rows, with the run's seed.
    whole = dataclasses.replace(mixture, datasets=[_as_builder(d) for d in mixture.datasets], test_split_size=None)
    splits = get_dataset(whole)
    if want_eval and mixture.test_split_size is None:  # each part's own test split
        parts = [dataclasses.replace(d, split=script.dataset_test_split, fraction=None) for d in whole.datasets]
        splits[script.dataset_test_split] = get_dataset(dataclasses.replace(whole, datasets=parts))["train"]
    if script.dataset_train_split not in splits:
        splits[script.dataset_train_split] = splits.pop("train")  # a mixture names the split of each part itself
    return splits


def _as_builder(part: DatasetConfig) -> DatasetConfig:
    """Give a local file the form that ``datasets.load_dataset`` reads: a builder and ``data_files``."""
    path = Path(part.path).expanduser()
    if path.suffix.lower() not in BUILDERS:
        return part
    _check_file(part.path, path)
    return dataclasses.replace(part, path=BUILDERS[path.suffix.lower()], data_files=str(path))


def _load_named(name: str, config: str | None, streaming: bool, on_bad_row: str | None) -> Splits:
    path = Path(name).expanduser()
    builder = BUILDERS.get(path.suffix.lower())
    if config is not None and (builder or path.is_file()):
        raise UsageError(f"'dataset_config' is {config!r}, but '{name}' is a file and has none. Leave it out.")
    if builder:
        return _load_file(name, path, builder, streaming, on_bad_row)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
        saved = load_from_disk(str(path))
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        streams = {split: rows.to_iterable_dataset() for split, rows in splits.items()} if streaming else {}
        return IterableDatasetDict(streams) if streaming else splits
    if path.is_dir():
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
    _check_file(name, path)
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


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"no file '{name}' (looked in {Path.cwd()}){_neighbour(path)}")


def _neighbour(path: Path) -> str:
    folder = path.parent
    near = difflib.get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1, cutoff=0.5)
    return f". Did you mean '{folder / near[0]}'?" if near else "."


def _read_json_lines(path: Path, error: Exception, on_bad_row: str | None) -> Splits:
    """Read a JSON file whose rows do not form one table; report the first bad row, or drop bad rows."""
    try:
        found = _json_rows(path)
    except ValueError as broken:
        raise UsageError(f"{path} cannot be read: {broken}") from error
    rows, problems = [], []
    for number, row in enumerate(found):
        try:
            if isinstance(row, Exception):
                raise ValueError(f"not JSON: {row}")
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}, expected an object with columns.")
            if on_bad_row is not None:
                read_group(row, number, detect_spelling(list(row), row), source=path.name)
        except ValueError as bad:
            bad = bad if isinstance(bad, BadRow) else BadRow(f"{path.name}, row {number}: {bad}")
            if on_bad_row != "drop":
                raise bad from error
            problems.append(str(bad))
            rows.append({UNREADABLE: str(bad)})  # dropped and counted later, so that all other rows keep their numbers
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
    for line in text.split("\n"):  # splitlines() would also split at line separators within strings
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(error)
    return rows


def _read_lines(path: Path) -> Dataset:
    _check_file(str(path), path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8, one prompt a line.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return from_rows([{"prompt": line} for line in lines if line.strip()], str(path))


def _first(dataset: Dataset, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in dataset.column_names), None)


def _rename(dataset: Dataset, old: str | None, new: str, aliases: tuple[str, ...]) -> Dataset:
    """Rename a column, by default the first alias that is there, and drop the other aliases."""
    old = old or _first(dataset, aliases)
    if old is None:
        return dataset
    dataset = dataset.remove_columns([c for c in dataset.column_names if c in aliases and c != old])
    return dataset if old == new else dataset.rename_column(old, new)


def _negative(value: Any, where: str) -> Any:
    if value is None or isinstance(value, list):
        return None if value is None else [_negative(x, where) for x in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}, expected a number to negate.")
    return -value


def _objects(values: Mapping[str, Any]) -> str | list[str]:
    """Encode the attributes of a completion, or of each of K completions where they are lists, as JSON.

    >>> _objects({"helpful": 2}), _objects({"helpful": [2, 0]})
    ('{"helpful": 2}', ['{"helpful": 2}', '{"helpful": 0}'])
    """
    sizes = {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if not sizes:
        return json.dumps(dict(values))
    if len(sizes) < len(values) or len(set(sizes.values())) > 1:
        raise ValueError(f"attributes of one row have {sizes} entries, expected as many of each of {list(values)}.")
    return [json.dumps(dict(zip(values, each, strict=True))) for each in zip(*values.values(), strict=True)]
