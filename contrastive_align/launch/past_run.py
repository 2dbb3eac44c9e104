"""What a folder's ``summary.json`` says of the run that trained its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive_align.report.history import read_json


SUMMARY = "summary.json"


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the summary of a run: the folder's, or for a checkpoint that of the run around it; empty if there is none.

    A run writes it at its end.

    Raises:
        ValueError: the file is cut, or holds no mapping.
    """
    folder = Path(folder)
    around = [folder.parent] if folder.name.startswith("checkpoint-") else []
    found = next((path for place in (folder, *around) if (path := place / SUMMARY).is_file()), None)
    return {} if found is None else read_json(found)


def chats(run: Mapping[str, Any], tokenizer: Any) -> bool:
    """Return whether a text is asked as a user's message: there is a chat template, and the training used it.

    ``data.train.conversational`` says whether it did. Without it, a run that sampled for prompts
    (``method.max_completion_length``) is taken for one on text, as ``--prompt``, text files and the bundled prompts
    are; prompts that are given as messages stay messages in any case. Any other model is taken to know its template.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    >>> chats({}, tokenizer), chats({"method": {"max_completion_length": 32}}, tokenizer)
    (True, False)
    """
    if not tokenizer.chat_template:
        return False
    recorded = run.get("data", {}).get("train", {}).get("conversational")
    return "max_completion_length" not in run.get("method", {}) if recorded is None else bool(recorded)
