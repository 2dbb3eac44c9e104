"""Parts of a file for the jobs of an array: which rows, under which name, and all of them together again."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from contrastive_align.data.formats import BadRow
from contrastive_align.launch.steps.files import check_free, read_rows, to_line, write_rows


_NAME = re.compile(r"\.(\d+)-of-(\d+)\.")


def rows_of(split: int, total: int, rows: int) -> range:
    """The rows of part ``split`` (from 0) of ``total``: contiguous, disjoint, sizes that differ by at most one.

    Raises:
        ValueError: there is no such part.

    >>> [list(rows_of(k, 3, 7)) for k in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    if not 0 <= split < total:
        raise ValueError(f"split_number is {split} of total_splits {total}, expected 0 to {total - 1}.")
    size, longer = divmod(rows, total)
    start = split * size + min(split, longer)
    return range(start, start + size + (split < longer))


def name_of(output: str | Path, split: int, total: int) -> Path:
    """Where a part is written: the output's own name where there is but one part.

    >>> name_of("runs/gen.jsonl", 0, 4).as_posix(), name_of("runs/gen.jsonl", 0, 1).as_posix()
    ('runs/gen.0-of-4.jsonl', 'runs/gen.jsonl')
    """
    output = Path(output)
    return output if total == 1 else output.with_name(f"{output.stem}.{split}-of-{total}{output.suffix}")


def merge(pattern: str, output: str | Path, *, overwrite: bool) -> int:
    """Put the parts that match a pattern together, in their order; the number of rows.

    Raises:
        ValueError: a file that is no part, a part that is missing or there twice, parts of different divisions, or rows
            that do not follow each other.
        FileNotFoundError, FileExistsError: nothing matches; the output is there.
    """
    output = Path(output)
    check_free(output, overwrite)
    found = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).resolve() != output.resolve()]
    if not found:
        raise FileNotFoundError(f"no file matches '{pattern}' (looked in {Path.cwd()}).")
    parts: dict[int, Path] = {}
    totals: dict[int, Path] = {}
    for path in found:
        match = _NAME.search(path.name)
        if match is None:
            raise ValueError(f"{path} is no part: expected names such as gen.0-of-4.jsonl. Give a narrower pattern.")
        split, total = map(int, match.groups())
        if split in parts and total in totals:
            raise ValueError(
                f"part {split} of {total} is there twice: {parts[split]} and {path}. Give one pattern each."
            )
        totals[total], parts[split] = path, path
    if len(totals) > 1:
        raise ValueError(
            f"parts of {sorted(totals)} are mixed, such as {', '.join(map(str, totals.values()))}. Remove some."
        )
    (total,) = totals
    if missing := sorted(set(range(total)) - set(parts)):
        raise ValueError(f"of {total} parts, {missing} are missing. Sample these: --split_number={missing[0]} ...")
    if wrong := sorted(set(parts) - set(range(total))):
        raise ValueError(f"{parts[wrong[0]]}: part {wrong[0]} of {total}, which are numbered 0 to {total - 1}.")
    lines, sizes = [], []
    for split in range(total):
        rows = read_rows(parts[split], generations=True) if parts[split].stat().st_size else []
        sizes.append(len(rows))
        for row in rows:
            if row.get("prompt_index") != len(lines):
                raise BadRow(
                    f"{parts[split]}: found prompt_index {row.get('prompt_index')!r} where {len(lines)} follows. A "
                    "part may come from other prompts or another division: sample it again."
                )
            lines.append(to_line(row))
    if sizes != (expected := [len(rows_of(split, total, len(lines))) for split in range(total)]):
        raise ValueError(
            f"the parts have {sizes} rows, expected {expected}: one of them is not whole. Sample it again."
        )
    write_rows(output, lines)
    return len(lines)
