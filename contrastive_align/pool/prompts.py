"""Remember the prompts of a pool: a run that continues it needs the same prompts in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers.utils import logging

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.formats import Text
from contrastive_align.pool.pool import Pool


logger = logging.get_logger(__name__)

FILE = "prompts.json"


def fingerprint_of(prompts: Iterable[Text]) -> dict[str, Any]:
    """Return the number of prompts and a hash of their content in their order.

    >>> fingerprint_of(["Hi", "Hello"]) == fingerprint_of(["Hello", "Hi"])
    False
    >>> fingerprint_of([[{"role": "user", "content": "Hi"}]]) == fingerprint_of(
    ...     [[{"content": "Hi", "role": "user", "name": None}]]
    ... )
    True
    """
    digest, count = hashlib.sha256(), 0
    for prompt in prompts:
        digest.update(_line(prompt))
        count += 1
    return {"prompts": count, "sha256": digest.hexdigest()}


def remember_prompts(pool: Pool, prompts: Iterable[Text]) -> None:
    """Write ``prompts.json`` into the pool's folder before the first round, or where the file is missing."""
    path = pool.folder / FILE
    if not pool.rounds or not path.is_file():
        with atomic_write(path) as file:
            file.write(json.dumps(fingerprint_of(prompts)).encode() + b"\n")


def check_prompts(pool: Pool, prompts: list[Text]) -> None:
    """Check that the pool's rounds were sampled from these prompts.

    A pool without ``prompts.json`` is used with a warning.

    Raises:
        ValueError: the prompts differ, or ``prompts.json`` is damaged.
    """
    if not pool.rounds:
        return
    path = pool.folder / FILE
    if not path.is_file():
        logger.warning(
            f"{pool.folder} has no {FILE}, so that the prompts of its rounds {pool.rounds} are not known. They are "
            f"assumed to be the {len(prompts)} of this run."
        )
        return
    try:
        then = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, if the prompts are the same as before.") from error
    now = fingerprint_of(prompts)
    if now != then:
        raise ValueError(
            f"The rounds of {pool.folder} were sampled from {then.get('prompts')} prompts, and this run has "
            f"{now['prompts']}, expected the same in the same order{_first(pool, prompts)}. Go on with the same data "
            "and its max_length and max_completion_length (prompts that are too long are left out); or start anew in "
            "another output_dir or pool_dir."
        )


def _first(pool: Pool, prompts: list[Text]) -> str:
    """Describe the first prompt of round 1 that differs, or return an empty text."""
    rows, places = np.unique(pool.table(1).prompt_index, return_index=True)
    for row, sample in zip(rows.tolist(), pool.read(places, 1), strict=True):
        if row >= len(prompts):
            return f"; row {row} was {str(sample.prompt)[:60]!r} and is not there"
        if _line(sample.prompt) != _line(prompts[row]):
            return f"; row {row} was {str(sample.prompt)[:60]!r} and is {str(prompts[row])[:60]!r}"
    return ""


def _line(prompt: Text) -> bytes:
    # Arrow gives every message all keys that any message has, with None.
    messages = prompt if isinstance(prompt, str) else [{k: v for k, v in m.items() if v is not None} for m in prompt]
    return json.dumps(messages, sort_keys=True).encode() + b"\n"
