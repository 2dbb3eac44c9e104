"""Keep a judge's answers and its count of calls on disk, so that it never repeats a question nor exceeds its budget."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from contrastive_align.judge.answers import Verdict, check_words
from contrastive_align.openai_client import Unreadable


logger = logging.get_logger(__name__)

# JSON writes a character with at most 12 bytes; a verdict and the names of a line's fields have some kilobytes.
BYTES_PER_CHARACTER, BYTES_BESIDE_ANSWER = 12, 64 * 1024


def content_key(**what: Any) -> str:
    """Return the SHA-256 of everything that an answer depends on."""
    text = json.dumps(what, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Append answers and calls to two files of a folder.

    ``answers.jsonl`` has a line for each answer, ``{"key", "answer", "verdict", "calls"}``: the reply, the verdict read
    from it (null where it was unparsable), and the number of calls. Each line is one write, so that a kill loses at
    most the line that it interrupts, which is skipped when the file is read. A verdict that is none, or that no file
    can store, is read as null.

    ``calls`` has a byte for each call, written before the call is made. The file's size is compared with the budget.
    Processes that share a folder share its budget.

    Args:
        folder: created if missing.
        longest: characters of an answer. Of a longer one, which is unparsable, the beginning is stored.
    """

    def __init__(self, folder: str | Path, longest: int) -> None:
        self._longest, self._longest_line = longest, BYTES_PER_CHARACTER * longest + BYTES_BESIDE_ANSWER
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.answers_file, self.calls_file = self.folder / "answers.jsonl", self.folder / "calls"
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict | None] = {}
        self._open_line = False
        if self.answers_file.exists():
            self._load()

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def __getitem__(self, key: str) -> Verdict | None:
        return self._verdicts[key]

    def __len__(self) -> int:
        return len(self._verdicts)

    @property
    def calls(self) -> int:
        """The number of calls made, restarts included."""
        return self.calls_file.stat().st_size if self.calls_file.exists() else 0

    def take_call(self, budget: int | None) -> bool:
        """Count one call and return True, or return False where the budget is used up."""
        if budget is not None and self.calls >= budget:
            return False
        fd = os.open(self.calls_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, b".")
            # The byte's own position decides between two processes that both saw the last call free.
            return budget is None or os.lseek(fd, 0, os.SEEK_CUR) <= budget
        finally:
            os.close(fd)

    def add(self, key: str, answer: str, verdict: Verdict | None, calls: int) -> None:
        """Store an answer in one write, so that lines of several processes do not mix.

        Raises:
            OSError: the disk is full.
        """
        found = None if verdict is None else asdict(verdict)
        row = {"key": key, "answer": answer[: self._longest], "verdict": found, "calls": calls}
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            line = b"\n" + line if self._open_line else line
            fd = os.open(self.answers_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(fd, line)
            finally:
                os.close(fd)
            self._open_line = written < len(line)
            if self._open_line:
                raise OSError(f"{self.answers_file}: {written} of {len(line)} bytes written. Is the disk full?")
            self._verdicts[key] = verdict

    def _load(self) -> None:
        damaged = []
        with self.answers_file.open("rb") as file:
            for number in itertools.count(1):
                if not (line := file.readline(self._longest_line)):
                    break
                end, too_long = line, False
                while len(end) == self._longest_line and not end.endswith(b"\n"):
                    end, too_long = file.readline(self._longest_line), True
                self._open_line = not end.endswith(b"\n")
                try:
                    key, verdict = _beginning_of(line) if too_long else _read(line)
                    self._verdicts[key] = verdict
                except (ValueError, KeyError, TypeError, RecursionError):
                    if line.strip():
                        damaged.append(number)
        if damaged:
            logger.warning(
                f"{self.answers_file}: {len(damaged)} lines cannot be read (line {damaged[0]} first), as after a kill "
                "in the middle of a write. Their questions are asked again."
            )


def _read(line: bytes) -> tuple[str, Verdict | None]:
    row = json.loads(line)
    return row["key"], None if row["verdict"] is None else _verdict(row["verdict"])


def _beginning_of(line: bytes) -> tuple[str, None]:
    """Read the key of a line that is too long for a verdict."""
    found = re.match(rb'\{"key": "(\w+)"', line)
    if found is None:
        raise ValueError("no key")
    return found[1].decode(), None


def _verdict(found: Any) -> Verdict | None:
    try:
        text, score, analysis = found["text"], float(found["score"]), found.get("analysis")
        for words in (text, analysis or ""):
            check_words(words)
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return Verdict(text, score, analysis) if math.isfinite(score) else None
