"""Read and write the JSONL files of the steps, whole or in parts for the jobs of an array."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from contrastive_align.data.atomic import atomic_write
from contrastive_align.data.formats import BadRow
from contrastive_align.launch.datasets import is_prompt


Row = dict[str, Any]

_PART = re.compile(r"\.(\d+)-of-(\d+)\.")  # gen.0-of-4.jsonl
_NUMBER = int | float
# The columns that steps add: lists with one entry, or null, for each of K completions. Training reads typed entries.
_ENTRIES = {
    "generations": (object, ""),
    "finished": (bool, "true, false"),
    "rewards": (_NUMBER, "a number"),
    "analysis": (object, ""),
    "feedbacks": (str, "text"),
    "scores": (_NUMBER, "a number"),
}
LISTS = tuple(_ENTRIES)


def read_rows(path: str | Path, *, generations: bool) -> list[Row]:
    """Read the rows of a file; each must have ``prompt`` and, if ``generations`` is True, ``generations``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' (looked in {Path.cwd()}).")
    with path.open("rb") as file:  # as bytes: text mode would also split at a line separator within a string
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    rows = [_checked(line, f"{path}, line {number}", generations) for number, line in lines]
    if not rows:
        raise ValueError(f"{path} has no rows, expected one JSON object a line, each with 'prompt'.")
    return rows


def _checked(line: bytes, where: str, generations: bool) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        raise BadRow(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a JSON {type(row).__name__}, expected an object with 'prompt'.")
    if not is_prompt(row.get("prompt")):
        found = f"{where}: 'prompt' is {str(row.get('prompt'))[:80]!r}"
        raise BadRow(f"{found}, expected a text, or messages up to the user's. Its keys are {sorted(row)}.")
    if not generations:
        return row
    found = row.get("generations")
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise BadRow(f"{where}: 'generations' is {str(found)[:80]!r}, expected a list of texts (the step 'sample').")
    for name in filter(row.__contains__, LISTS):
        if not isinstance(row[name], list) or len(row[name]) != len(found):
            size = len(row[name]) if isinstance(row[name], list) else f"no list, {row[name]!r}: not"
            raise BadRow(f"{where}: '{name}' has {size} entries for {len(found)} generations.")
        kind, expected = _ENTRIES[name]
        for i, entry in enumerate(row[name]):
            if entry is not None and (not isinstance(entry, kind) or (kind is _NUMBER and isinstance(entry, bool))):
                raise BadRow(f"{where}: '{name}'[{i}] is {str(entry)[:80]!r}, expected {expected} or null.")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON, expected null where there is none")


def fingerprint(path: str | Path) -> str:
    """Hash the content of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_rows(path: Path, lines: Iterable[bytes]) -> None:
    """Write all lines or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(lines)


def to_line(row: Mapping[str, Any]) -> bytes:
    """Encode a row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the output exists and may not be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already. Give another --output, or --overwrite.")


class Output:
    """A file that is written in chunks and continued after an interruption.

    Finished rows are collected in ``<output>.partial``, whose first line holds the settings: the options that the rows
    depend on and may not differ when it is continued. The file itself appears when all rows are finished.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        check_free(self.path, overwrite)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{self.path.parent} cannot be made: {error.strerror}. Give another --output."
            raise OSError(error.errno, problem) from error
        head = to_line({"settings": dict(settings)})
        lines = [] if overwrite or not self.partial.exists() else self._whole_lines()
        if len(lines) > 1 and lines[0] != head:  # without a row nothing can be mixed
            begun = json.loads(lines[0]).get("settings", {})
            other = [f"{k}={begun.get(k)!r}, now {v!r}" for k, v in settings.items() if begun.get(k) != v]
            begun_as = f"{self.partial} was begun under other settings ({'; '.join(other)})"
            raise ValueError(f"{begun_as}. Use the same, or --overwrite to start anew.")
        self.begun = lines if len(lines) > 1 else [head]
        self.done = len(self.begun) - 1
        if not self.done:
            self.partial.unlink(missing_ok=True)

    def _whole_lines(self) -> list[bytes]:  # without a last line that an interruption cut
        return [line for line in self.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def fill(self, rows: list[Row], work: Callable[[list[Row]], list[Row]], *, at_once: int) -> list[Row]:
        """Append the results of ``work`` for the unfinished rows, ``at_once`` at a time; return all rows."""
        for start in range(self.done, len(rows), at_once):
            lines = [to_line(row) for row in work(rows[start : start + at_once])]
            if start == self.done:  # a run that fails at once leaves no file
                write_rows(self.partial, self.begun)
            with self.partial.open("ab") as file:
                file.write(b"".join(lines))
        lines = self._whole_lines()[1:] if self.partial.exists() else []  # a part may be empty
        found = [json.loads(line) for line in lines]
        if [row["prompt"] for row in found] != [row["prompt"] for row in rows]:
            problem = (
                f"{self.partial} has {len(found)} rows that are not those of the {len(rows)} prompts in their order"
            )
            raise ValueError(f"{problem}: two runs may have written it at once. Start anew with --overwrite.")
        write_rows(self.path, lines)
        self.partial.unlink(missing_ok=True)
        return found


def part_rows(split: int, total: int, rows: int) -> range:
    """Return the rows of part ``split`` (from 0) of ``total``: contiguous, of sizes that differ by at most one.

    >>> [list(part_rows(k, 3, 7)) for k in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    if not 0 <= split < total:
        raise ValueError(f"split_number is {split} of total_splits {total}, expected 0 to {total - 1}.")
    size, longer = divmod(rows, total)
    start = split * size + min(split, longer)
    return range(start, start + size + (split < longer))


def part_name(output: str | Path, split: int, total: int) -> Path:
    """Name the file of a part; a single part has the name of the output.

    >>> part_name("runs/gen.jsonl", 0, 4).as_posix(), part_name("runs/gen.jsonl", 0, 1).as_posix()
    ('runs/gen.0-of-4.jsonl', 'runs/gen.jsonl')
    """
    output = Path(output)
    return output if total == 1 else output.with_name(f"{output.stem}.{split}-of-{total}{output.suffix}")


def merge(pattern: str, output: str | Path, *, overwrite: bool) -> int:
    """Join the parts that match a pattern in the order of their numbers; return the number of rows."""
    output = Path(output)
    check_free(output, overwrite)
    found = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).resolve() != output.resolve()]
    if not found:
        raise FileNotFoundError(f"no file matches '{pattern}' (looked in {Path.cwd()}).")
    parts, totals = {}, {}  # by number and by division
    for path in found:
        match = _PART.search(path.name)
        if match is None:
            raise ValueError(f"{path} is no part: expected names such as gen.0-of-4.jsonl. Give a narrower pattern.")
        split, total = map(int, match.groups())
        if split in parts and total in totals:
            both = f"{parts[split]} and {path}"
            raise ValueError(f"part {split} of {total} is there twice: {both}. Give one pattern each.")
        totals[total], parts[split] = path, path
    if len(totals) > 1:
        examples = ", ".join(map(str, totals.values()))
        raise ValueError(f"parts of {sorted(totals)} are mixed, such as {examples}. Remove some.")
    (total,) = totals
    if missing := sorted(set(range(total)) - set(parts)):
        raise ValueError(f"of {total} parts, {missing} are missing. Sample these: --split_number={missing[0]} ...")
    if wrong := sorted(set(parts) - set(range(total))):
        raise ValueError(f"{parts[wrong[0]]}: part {wrong[0]} of {total}, which are numbered 0 to {total - 1}.")
    lines, sizes = [], []
    for path in (parts[split] for split in range(total)):
        rows = read_rows(path, generations=True) if path.stat().st_size else []
        sizes.append(len(rows))
        for row in rows:
            if (index := row.get("prompt_index")) != len(lines):
                problem = f"{path}: found prompt_index {index!r} where {len(lines)} follows"
                raise BadRow(f"{problem}. It is of other prompts or another division: sample it again.")
            lines.append(to_line(row))
    if sizes != (expected := [len(part_rows(split, total, len(lines))) for split in range(total)]):
        raise ValueError(f"the parts have {sizes} rows, expected {expected}: one is not whole. Sample it again.")
    write_rows(output, lines)
    return len(lines)
