"""Prompts that leave no room for a completion: found before training, left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHORT_MARGIN = 256  # tokens that no chat template adds to the bytes of a prompt


def surely_fits(prompt: Any, room: int) -> bool:
    """Whether a prompt needs no tokeniser to be short enough: a token has at least one byte."""
    return len(repr(prompt).encode()) + SHORT_MARGIN < room


def rows_of_long_prompts(
    dataset: Dataset, length: Callable[[int, Any], int], room: int, *, name: str, limits: Mapping[str, int]
) -> list[int]:
    """Return the rows whose prompt has more than ``room`` tokens, with a warning that they are left out.

    Args:
        dataset: rows with a column ``prompt``.
        length: row number and prompt -> tokens.
        room: tokens that a prompt may have.
        name: of the dataset, for messages.
        limits: what makes up the room, for messages.

    Raises:
        ValueError: no column 'prompt', or a prompt that is neither text nor messages.
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}, expected 'prompt' to sample from. Rename one: "
            "dataset.rename_column(old, 'prompt')."
        )
    long = []
    for i, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str | list):
            raise ValueError(f"{name}, row {i}: 'prompt' is {prompt!r}, expected text or messages.")
        if length(i, prompt) > room:
            long.append(i)
    if long:
        logger.warning(
            f"{len(long)} of {len(dataset)} prompts of {name} are longer than {room} tokens (condition included, where "
            f"there is one) and are left out; the first rows are {long[:5]}. "
            f"{', '.join(f'{limit}={tokens}' for limit, tokens in limits.items())}."
        )
    return long


def without_rows(dataset: Dataset, rows: Sequence[int], *, name: str) -> Dataset:
    """Return the dataset without some rows.

    Raises:
        ValueError: none is left.
    """
    if not rows:
        return dataset
    if len(rows) == len(dataset):
        raise ValueError(
            f"No prompt of {name} is short enough: see the warning above. Lower max_completion_length, raise "
            "max_length where there is one, or shorten the prompts."
        )
    gone = set(rows)
    return dataset.select([i for i in range(len(dataset)) if i not in gone])
