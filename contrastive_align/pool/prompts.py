"""Which prompts a pool was sampled from: a run that goes on with it needs the same, in the same order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers.utils import logging

from contrastive_align.conditions.forms import Prompt
from contrastive_align.data.atomic import atomic_write
from contrastive_align.pool.pool import Pool


logger = logging.get_logger(__name__)

FILE = "prompts.json"


def fingerprint_of(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """How many prompts there are, and a hash of their content in their order; nothing of where they come from.

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


def remember_prompts(pool: Pool, prompts: Iterable[Prompt]) -> None:
    """Write ``prompts.json`` into the pool's folder, where its first round is to be sampled or the file is missing."""
    path = pool.folder / FILE
    if not pool.rounds or not path.is_file():
        with atomic_write(path) as file:
            file.write(json.dumps(fingerprint_of(prompts)).encode() + b"\n")


def check_prompts(pool: Pool, prompts: list[Prompt]) -> None:
    """Raise ValueError where the pool has rounds of other prompts. Of a pool that does not say, a warning."""
    if not pool.rounds:
        return
    path = pool.folder / FILE
    if not path.is_file():
        logger.warning(
            f"{pool.folder} does not say which prompts its rounds {pool.rounds} were sampled from (no {FILE}): these "
            f"{len(prompts)} are taken for the same."
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


def _first(pool: Pool, prompts: list[Prompt]) -> str:
    """The first difference that the samples of round 1 show."""
    rows, places = np.unique(pool.table(1).prompt_index, return_index=True)
    for row, sample in zip(rows.tolist(), pool.read(places, 1), strict=True):
        if row >= len(prompts):
            return f"; row {row} was {str(sample.prompt)[:60]!r} and is not there"
        if _line(sample.prompt) != _line(prompts[row]):
            return f"; row {row} was {str(sample.prompt)[:60]!r} and is {str(prompts[row])[:60]!r}"
    return ""


def _line(prompt: Prompt) -> bytes:
    # Arrow gives every message all the keys that any message has.
    messages = prompt if isinstance(prompt, str) else [{k: v for k, v in m.items() if v is not None} for m in prompt]
    return json.dumps(messages, sort_keys=True).encode() + b"\n"
