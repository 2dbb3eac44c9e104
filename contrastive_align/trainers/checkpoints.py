"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging


logger = logging.get_logger(__name__)


def checkpoint_to_resume(resume: str | os.PathLike | bool, output_dir: str | Path, *needed: str) -> str:
    """The folder that ``resume_from_checkpoint`` means: of True the last whole one.

    Raises:
        ValueError: there is none.
    """
    if resume is not True:
        return os.fspath(resume)
    found = last_whole_checkpoint(output_dir, *needed)
    if found is None:
        raise ValueError(f"resume_from_checkpoint=True, but {output_dir} holds no checkpoint that is whole.")
    return os.fspath(found)


def last_whole_checkpoint(output_dir: str | Path, *needed: str) -> Path | None:
    """The newest checkpoint of a folder that was written to its end, or None.

    The Trainer writes ``trainer_state.json`` after all else of its own, so a checkpoint without a readable one was cut
    off by whatever stopped the run; so was one without a file of ``needed``, which a trainer adds behind it. Such ones
    are left where they are and said.
    """
    found = [(int(m[1]), p) for p in Path(output_dir).glob("checkpoint-*") if (m := re.fullmatch(r".*-(\d+)", p.name))]
    for _, folder in sorted(found, reverse=True):
        if _is_whole(folder) and all((folder / name).is_file() for name in needed):
            return folder
        logger.warning(f"{folder} was not written to its end and is skipped.")
    return None


def _is_whole(folder: Path) -> bool:
    try:
        return "global_step" in json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
