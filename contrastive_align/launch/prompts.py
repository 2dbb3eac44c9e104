"""A dataset, a text file or one string -> rows with a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig

from contrastive_align.launch.arguments import RunArguments, UsageError
from contrastive_align.launch.datasets import load_splits, take


# Columns of groups and pairs: a dataset for the other scripts serves here too, for its prompts.
NOT_READ = ("completion", "completions", "scores", "responses", "rewards", "chosen", "rejected", "completion_ids")


def load_prompts(
    script: RunArguments, mixture: DatasetMixtureConfig, prompt: str | None, *, want_eval: bool, seed: int
) -> tuple[Dataset, Dataset | None, str]:
    """Training and evaluation rows with a column ``prompt``, and what they are called.

    Raises:
        UsageError: more than one source, a missing file, no prompts, or one that is neither text nor messages.
    """
    named = script.dataset_name
    if prompt is not None:
        if named or mixture.datasets:
            raise UsageError("both a prompt and a dataset are given. Give one.")
        return from_rows([{"prompt": prompt}], "--prompt"), None, "one prompt"
    if named and Path(named).suffix.lower() == ".txt":
        if script.dataset_streaming:
            raise UsageError(f"dataset_streaming is given, and {named} is read as a whole. Leave it out.")
        return take(_read_lines(Path(named).expanduser()), script.max_train_samples), None, named
    train, test = load_splits(script, mixture, want_eval=want_eval, seed=seed, on_bad_row=None)
    name = named or ", ".join(part.path for part in mixture.datasets)
    return from_rows(train, name), None if test is None else from_rows(test, name), name


def from_rows(rows: Any, name: str) -> Dataset:
    """The rows as a dataset in memory, checked, without what f-DPG does not read."""
    kept: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise UsageError(f"{name}, row {number}: no 'prompt', only {sorted(row)}. Rename the column that has it.")
        _check_prompt(row["prompt"], f"{name}, row {number}")
        kept.append({key: value for key, value in row.items() if key not in NOT_READ})
    if not kept:
        raise UsageError(f"{name} has no rows, expected at least one prompt.")
    return Dataset.from_list(kept)


def repeat(rows: Dataset, at_least: int) -> Dataset:
    """The rows so often that a step finds its prompts: TRL drops a step that is not full."""
    times = -(-at_least // len(rows))
    return rows if times <= 1 else rows.select(list(range(len(rows))) * times)


def _check_prompt(prompt: Any, where: str) -> None:
    if isinstance(prompt, str):
        return  # also the empty one: the model is then started by its BOS alone
    messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") for m in prompt)
    if not messages or prompt[-1]["role"] == "assistant":
        raise UsageError(f"{where}: 'prompt' is {str(prompt)[:80]!r}, expected a text, or messages up to the user's.")


def _read_lines(path: Path) -> Dataset:
    if not path.is_file():
        raise UsageError(f"no file '{path}' (looked in {Path.cwd()}).")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8, one prompt a line.") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return from_rows([{"prompt": line} for line in lines if line.strip()], str(path))
