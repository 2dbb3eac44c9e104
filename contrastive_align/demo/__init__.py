"""A tiny model, a reward set and a reward function, bundled so that every method can be tried at once.

Nothing is downloaded: the files lie next to this module and are read from there, also when the package was installed
from a wheel into a folder that cannot be written to. `benchmarks/build_demo.py` makes them anew.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .task import contains_please, reward


if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["LICENCE", "MODEL_PATH", "contains_please", "load_preference_dataset", "load_reward_dataset", "reward"]

_ROOT = Path(__file__).resolve().parent

MODEL_PATH = str(_ROOT / "model")
"""The folder of the bundled model and its tokenizer, for `from_pretrained`."""

LICENCE = "apache-2.0"
"""Of the bundled model and data: the package's own."""


def load_reward_dataset() -> "DatasetDict":
    """Load `train` and `test` with the columns `prompt`, `completions` and `scores` (2 to 6 per prompt)."""
    return _load("")


def load_preference_dataset() -> "DatasetDict":
    """Load `train` and `test` with the columns `prompt`, `chosen` and `rejected`: the best and worst of a group."""
    return _load("preference_")


def _load(prefix: str) -> "DatasetDict":
    # Imported here because `datasets` takes a second or more to import, and the reward function does not need it.
    from datasets import Dataset, DatasetDict

    splits = {}
    for split in ("train", "test"):
        lines = (_ROOT / "data" / f"{prefix}{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = Dataset.from_list([json.loads(line) for line in lines])
    return DatasetDict(splits)
