"""JSONL in and out: rows that are checked, outputs that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.formats import BadRow


Row = dict[str, Any]

# What a step adds to a row: lists with an entry for each of K completions.
LISTS = ("generations", "finished", "rewards", "analysis", "feedbacks", "scores")
_NUMBER = int | float
# What training reads of them: the type of an entry, which may also be null.
_ENTRIES = {
    "finished": (bool, "true, false"),
    "rewards": (_NUMBER, "a number"),
    "feedbacks": (str, "text"),
    "scores": (_NUMBER, "a number"),
}


def read_rows(path: str | Path, *, generations: bool) -> list[Row]:
    """The rows of a file, each with ``prompt`` and, if asked for, ``generations``.

    Raises:
        BadRow: with file and line.
        FileNotFoundError: no such file.
        ValueError: it has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' (looked in {Path.cwd()}).")
    rows = [_checked(line, f"{path}, line {n}", generations) for n, line in _lines(path)]
    if not rows:
        raise ValueError(f"{path} has no rows, expected one JSON object a line, each with 'prompt'.")
    return rows


def _lines(path: Path) -> Iterable[tuple[int, bytes]]:
    with path.open("rb") as file:  # not as text: a line separator inside of a string would cut the line
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _checked(line: bytes, where: str, generations: bool) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        raise BadRow(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a JSON {type(row).__name__}, expected an object with 'prompt'.")
    prompt = row.get("prompt")
    messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") for m in prompt)
    if not isinstance(prompt, str) and (not messages or prompt[-1]["role"] == "assistant"):
        raise BadRow(
            f"{where}: 'prompt' is {str(prompt)[:80]!r}, expected a text, or messages up to the user's. Its keys are "
            f"{sorted(row)}."
        )
    if not generations:
        return row
    found = row.get("generations")
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise BadRow(f"{where}: 'generations' is {str(found)[:80]!r}, expected a list of texts (the step 'sample').")
    for name in LISTS:
        if name in row and (not isinstance(row[name], list) or len(row[name]) != len(found)):
            size = len(row[name]) if isinstance(row[name], list) else f"no list, {row[name]!r}: not"
            raise BadRow(f"{where}: '{name}' has {size} entries for {len(found)} generations.")
        kind, expected = _ENTRIES.get(name, (object, ""))
        for i, entry in enumerate(row.get(name, ())):
            if entry is not None and (not isinstance(entry, kind) or (kind is _NUMBER and isinstance(entry, bool))):
                raise BadRow(f"{where}: '{name}'[{i}] is {str(entry)[:80]!r}, expected {expected} or null.")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON, expected null where there is none")


def fingerprint(path: str | Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_rows(path: Path, lines: Iterable[bytes]) -> None:
    """All lines, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(lines)


def to_line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError where the output is there."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already. Give another --output, or --overwrite.")


class Output:
    """A file that is written chunk by chunk, and gone on with where a run was stopped.

    What is done is kept in ``<output>.partial``, whose first line says under which settings; the file itself is there
    when all is done.

    Args:
        path: of the output.
        settings: what its rows depend on. An unfinished output under other settings is refused.
        overwrite: replace what is there, finished or not.

    Raises:
        FileExistsError, ValueError: see above.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        check_free(self.path, overwrite)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path.parent} cannot be made: {error.strerror}. Give another --output."
            ) from error
        head = to_line({"settings": dict(settings)})
        lines = [] if overwrite or not self.partial.exists() else self._whole_lines()
        if len(lines) > 1 and lines[0] != head:  # without a row there is nothing that could be mixed
            begun = json.loads(lines[0]).get("settings", {})
            other = [f"{k}={begun.get(k)!r}, now {v!r}" for k, v in settings.items() if begun.get(k) != v]
            raise ValueError(
                f"{self.partial} was begun under other settings ({'; '.join(other)}). Use the same, or --overwrite to "
                "start anew."
            )
        self.begun = lines if len(lines) > 1 else [head]
        self.done = len(self.begun) - 1
        if not self.done:
            self.partial.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:
        """Without the one that a kill cut."""
        return [line for line in self.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def fill(self, rows: list[Row], work: Callable[[list[Row]], list[Row]], *, at_once: int) -> list[Row]:
        """Append ``work`` of the rows that are not done yet, some at a time; then give the file its name.

        Returns:
            all rows of the output.
        """
        for start in range(self.done, len(rows), at_once):
            lines = [to_line(row) for row in work(rows[start : start + at_once])]
            if start == self.done:  # not before there is something to keep: what fails at once leaves nothing behind
                write_rows(self.partial, self.begun)
            with self.partial.open("ab") as file:
                file.write(b"".join(lines))
        lines = self._whole_lines()[1:] if self.partial.exists() else []  # a part may have no rows
        found = [json.loads(line) for line in lines]
        if [row["prompt"] for row in found] != [row["prompt"] for row in rows]:
            raise ValueError(
                f"{self.partial} has {len(found)} rows that are not those of the {len(rows)} prompts in their order: "
                "two runs may have written it at once. Start anew with --overwrite."
            )
        write_rows(self.path, lines)
        self.partial.unlink(missing_ok=True)
        return found
