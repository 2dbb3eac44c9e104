"""Files as they are: bytes -> rows, whose text is text.

A row of a text file (JSON, JSON lines, a table) is kept as JSON text until it is read, so that Arrow guesses no dates
in it, fills no None into it, and one odd row spoils no other. Parquet and Arrow files have types of their own, which
stay.
"""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets.exceptions import DatasetGenerationError

from contrastive_align.data import rows as rows_module
from contrastive_align.data.rows import DECIMAL_COMMA, FIX, RAW, ROW, UNREADABLE, check_text, parse_object


KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "table", ".tsv": "table", ".xlsx": "sheet",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "lines",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
# What a split's file or folder is called, as the hub reads it.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The first bytes of a file -> what it is, and the ending that says so.
MAGIC = {
    b"\x1f\x8b": ("a gzip file", ".gz"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", ".zst"),
    b"PAR1": ("a Parquet file", ".parquet"),
    b"PK\x03\x04": ("a spreadsheet or a zip file", ".xlsx"),
    b"ARROW1": ("an Arrow file", ".arrow"),
}
# Keys of an object of rows: of the list of rows, and of what stands beside it.
CONTAINERS = {"data", "rows", "examples", "items", "instances", "records", "train"}
BESIDE = {"version", "schema", "metadata", "info", "description", "name", "title", "license", "features", "num_rows"}
TYPED = ("parquet", "arrow")  # kinds whose columns have types
DELIMITERS = ",;\t|"
TYPED_AT_ONCE = 64  # rows of a table that are made Python objects together
_FILES = "_contrastive_align_files"  # what a stream of files remembers of them
SNIFFED = 1 << 16  # characters by which a table's delimiter is found
_DECODER = json.JSONDecoder()
_FEATURES = Features({ROW: Value("int64"), RAW: Value("string"), UNREADABLE: Value("string")})
SOURCE = hashlib.sha256(b"".join(Path(f).read_bytes() for f in (__file__, rows_module.__file__))).hexdigest()


Unread = Callable[[], dict[str, Any]]  # a row that is parsed when it is asked for
Reader = Callable[[Path, str | None], Iterator[Unread]]  # path, compression -> the rows


class FileProblem(ValueError):
    """A file that cannot be read at all, with its name, what was found and the way out."""


@dataclass(frozen=True)
class FileKind:
    """What a file's name says of it."""

    kind: str
    compression: str | None


def kind_of(path: Path) -> FileKind | None:
    """Return what a file's name says of it, or None for an ending that is not known.

    >>> kind_of(Path("groups.jsonl.gz"))
    FileKind(kind='json', compression='gzip')
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    suffix = (Path(path.stem) if compression else path).suffix.lower()
    return FileKind(KINDS[suffix], compression) if suffix in KINDS else None


def read_files(paths: list[Path], *, streaming: bool = False) -> Dataset | IterableDataset:
    """Read the rows of one split.

    Returns:
        Columns ``__row__``, ``__json__`` and ``__unreadable__`` (the error of a row that is no row); of Parquet and
        Arrow files, their own.

    Raises:
        FileProblem: a file that is no such file.
        BadRow: never; a row that cannot be read is kept with its error, and counted later.
    """
    kinds = {kind_of(path).kind if kind_of(path) else None for path in paths}
    typed = kinds & set(TYPED)
    if None in kinds or (typed and len(kinds) > 1):
        raise FileProblem(
            f"{', '.join(p.name for p in paths)}: files of one split, expected all of one kind. Give one of them, or "
            "convert the others."
        )
    if typed and any(kind_of(path).compression for path in paths):
        raise FileProblem(f"'{paths[0]}' is compressed twice. Uncompress it, as with gunzip or unzstd.")
    for path in paths:
        if not path.stat().st_size:
            raise FileProblem(f"'{path}' is empty, expected at least one row.")
    _check_same_columns(paths)
    if kinds == {"arrow"} and not streaming and len(paths) == 1 and not _unknown_types(_arrow_schema(paths[0])):
        return _open_arrow(paths[0])
    features = _features(paths) if typed else _FEATURES
    # The key of the cache: files that changed, and other code, are read again.
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    told = {"paths": [str(path) for path in paths], "stamps": [str(stamps)] * len(paths), "source": SOURCE}
    if streaming:
        stream = IterableDataset.from_generator(_rows_of, gen_kwargs=told, features=features)
        setattr(stream, _FILES, tuple(paths))
        return stream
    try:
        found = Dataset.from_generator(_rows_of, gen_kwargs=told, features=features)
        if not len(found):
            raise FileProblem(f"'{paths[0]}' has no rows, expected at least one.")
        return found
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise FileProblem(f"'{paths[0]}' has no rows, expected at least one.") from error
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, FileProblem):
            raise cause from None
        raise FileProblem(f"{paths[0]} cannot be read: {cause or error}") from error


def files_of(dataset: Any) -> tuple[Path, ...] | None:
    """Return the files of a stream that :func:`read_files` made; None of any other, also of one that was mapped."""
    return getattr(dataset, _FILES, None)


def unread_rows(path: Path, start: int = 0) -> Iterator[Unread]:
    """Yield the rows of a file from a number on; those that nobody asks for are passed over without being parsed.

    Raises:
        FileProblem: a file that is no such file, or that breaks off.
    """
    known: Any = kind_of(path)
    try:
        if known.kind == "parquet":
            yield from _read_parquet(path, known.compression, start)
        else:
            yield from itertools.islice(READERS[known.kind](path, known.compression), start, None)
    except FileProblem:
        raise
    except Exception as error:  # whatever the readers of compressed, typed and zipped files raise
        raise FileProblem(f"'{path}' cannot be read: {type(error).__name__}: {error}") from error


def count_rows(path: Path) -> int:
    """Count the rows of a file, bad ones included."""
    known: Any = kind_of(path)
    if known.kind == "parquet" and known.compression is None:
        return pq.ParquetFile(path).metadata.num_rows
    return sum(1 for _ in unread_rows(path))


def folder_files(folder: Path) -> dict[str, list[Path]]:
    """Return split -> the files of a folder, told by the names of files and of the folders around them."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        known = kind_of(path)
        if (
            path.is_file()
            and known
            and known.kind != "lines"
            and not any(p.startswith(".") for p in path.relative_to(folder).parts)
        ):
            words = set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()))
            split = next((split for split, names in SPLITS.items() if words & set(names)), "train")
            found.setdefault(split, []).append(path)
    return found


def read_folder(folder: Path, *, streaming: bool = False) -> DatasetDict | IterableDatasetDict | None:
    """Read a folder's splits; None where it has no file of a kind that is known."""
    splits = {split: read_files(paths, streaming=streaming) for split, paths in folder_files(folder).items()}
    return (IterableDatasetDict if streaming else DatasetDict)(splits) if splits else None


def prompts_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty: one prompt each."""
    with _text(path, kind_of(path).compression if kind_of(path) else None) as file:
        lines = file.read().split("\n")  # splitlines() would also split at line separators inside of a prompt
    return [line.rstrip("\r") for line in lines if line.strip()]


# ---------------------------------------------------------------------------------------------------------- the bytes


@contextmanager
def _bytes(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    if compression is None:
        with open(path, "rb") as file:
            yield file
        return
    with pa.input_stream(str(path), compression=compression) as stream:
        yield io.BufferedReader(stream)  # type: ignore[arg-type]


@contextmanager
def _text(path: Path, compression: str | None) -> Iterator[TextIO]:
    """Open a file as text: UTF-8, or what its byte order mark says."""
    with _bytes(path, compression) as file:
        try:
            head = file.peek(4)  # type: ignore[attr-defined]
        except OSError as error:
            raise FileProblem(
                f"{path} is no {compression} file: {error}. Name it by what it is, without '{path.suffix}'."
            ) from error
        for magic, (what, ending) in MAGIC.items():
            if head.startswith(magic):
                raise FileProblem(f"{path} is {what}, and no text. Give it a name that ends in {ending}.")
        encoding = next((name for mark, name in BOMS.items() if head.startswith(mark)), "utf-8")
        try:
            yield io.TextIOWrapper(file, encoding=encoding, newline="")
        except UnicodeDecodeError as error:
            found = f"{error.reason} (byte {error.object[error.start]:#04x}{_undecodable(path, compression, encoding)})"
            name = encoding.upper().removesuffix("-SIG")
            raise FileProblem(f"{path} is not {name} text: {found}. Save it as UTF-8.") from error
        except (OSError, EOFError) as error:
            raise FileProblem(f"{path} cannot be read to its end: {error}") from error


def _undecodable(path: Path, compression: str | None, encoding: str) -> str:
    """Say which line of a file is the first that is no such text."""
    if not encoding.startswith("utf-8"):
        return ""
    with _bytes(path, compression) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


def _rows_of(paths: list[str], stamps: list[str], source: str) -> Iterator[dict[str, Any]]:
    number = 0
    for path in map(Path, paths):
        typed = kind_of(path).kind in TYPED
        for read in unread_rows(path):
            yield read() if typed else {**read(), ROW: number}
            number += 1


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {RAW: json.dumps(values, ensure_ascii=False), UNREADABLE: None}


def _bad(path: Path, place: str, problem: Any) -> dict[str, Any]:
    return {RAW: None, UNREADABLE: f"{path.name}, {place}: {problem}"}


# --------------------------------------------------------------------------------------------------------------- JSON


def _read_json(path: Path, compression: str | None) -> Iterator[Unread]:
    with _text(path, compression) as file:
        head = file.read(SNIFFED)
        if _is_one_value(head):
            rest = _from_array(path, head, file)
        else:
            _check_no_columns(path, head)
            rest = _lines(head, file)
        for row, (line, text) in enumerate(rest):
            yield functools.partial(_json_row, path, row, line, text)


def _json_row(path: Path, row: int, line: int, text: str) -> dict[str, Any]:
    try:
        for name, value in parse_object(text).items():
            check_text([name, value], f"'{name.encode('utf-8', 'backslashreplace').decode()}'")
    except ValueError as error:
        return _bad(path, f"row {row} (line {line})", error)
    return {RAW: text, UNREADABLE: None}


def _is_one_value(head: str) -> bool:
    """Whether a JSON file is one list or object, and not a row a line."""
    start = head.lstrip()
    first, _, rest = start.partition("\n")
    if start[:1] not in ("[", "{"):
        return False
    try:
        json.loads(first)
    except ValueError:
        return start[0] == "[" or first.strip() in ("{", '{"data": [', '{"rows": [')
    except RecursionError:
        return False
    whole = not rest.strip()
    return whole and (start[0] == "[" or set(json.loads(first)) <= CONTAINERS | BESIDE)


def _check_no_columns(path: Path, head: str) -> None:
    """Refuse one object of columns, as pandas writes a table."""
    try:
        table = json.loads(head)
    except (ValueError, RecursionError):
        return
    columns = list(table.values()) if isinstance(table, dict) else []
    lists = [value for value in columns if isinstance(value, list) and not any(isinstance(x, dict) for x in value)]
    by_row = [value for value in columns if isinstance(value, dict) and value and all(map(str.isdigit, value))]
    alike = len({len(value) for value in columns if isinstance(value, list | dict)}) == 1
    prompt_ids = table.get("prompt_ids") if columns else None
    if isinstance(prompt_ids, list) and not any(isinstance(ids, list) for ids in prompt_ids):
        return  # a row of token ids
    if len(columns) > 1 and alike and len(columns) in (len(lists), len(by_row)):
        raise FileProblem(
            f"{path} is one object of columns, expected a list of rows, or an object a line. In pandas: "
            "df.to_json(path, orient='records', lines=True)."
        )


def _lines(head: str, file: TextIO) -> Iterator[tuple[int, str]]:
    number, left = 0, head
    while True:
        *lines, left = left.split("\n")  # splitlines() would also split at line separators inside of strings
        for line in lines:
            number += 1
            if line.strip():
                yield number, line.strip("\r ")
        more = file.read(SNIFFED)
        if not more:
            break
        left += more
    if left.strip():
        yield number + 1, left.strip("\r ")


def _from_array(path: Path, head: str, file: TextIO) -> Iterator[tuple[int, str]]:
    """Cut the rows out of a list, or of the one list that an object holds, as they are written."""
    text = head + file.read()
    at = _skip(text, 0)
    if text[at] == "{":
        items = list(_items(path, text, at))
        lists = {key: start for key, start, _ in items if re.match(r"\[\s*\{", text[start : start + 99])}
        if text[_skip(text, _skip(text, items[-1][2] if items else at + 1) + 1) :]:
            raise FileProblem(f"{path} goes on after the end of its object. Write an object a line, or a list of them.")
        keys = [key for key, _, _ in items]
        if not set(keys) & CONTAINERS:  # a row that is written over several lines
            yield 1, text[at : items[-1][2] if items else at + 1].rstrip() + "}"
            return
        if len(lists) != 1:
            raise FileProblem(
                f"{path} is one object with the keys {keys[:8]}, expected a list of rows, or an object a line."
            )
        yield from ((line, text[start:end]) for line, start, end in _elements(path, text, *lists.values()))
        return
    end = at
    for line, start, end in _elements(path, text, at):
        yield line, text[start:end]
    at = _skip(text, end) if end > at else at + 1
    if text[_skip(text, _skip(text, at) + 1) :]:
        raise FileProblem(f"{path} goes on after the end of its list (line {text.count(chr(10), 0, at) + 1}).")


def _elements(path: Path, text: str, at: int) -> Iterator[tuple[int, int, int]]:
    """Yield line, start and end of each element of the list that begins at a place."""
    at, first = at + 1, True
    while text[(at := _skip(text, at)) : at + 1] != "]":
        if not first:
            at = _skip(text, _expect(path, text, at, ","))
            if text[at : at + 1] == "]":
                line = text.count(chr(10), 0, at) + 1
                raise FileProblem(f"{path} is not JSON: a comma stands before the ']' in line {line}. Take it out.")
        end = _end_of_value(path, text, at)
        yield text.count("\n", 0, at) + 1, at, end
        at, first = end, False


def _items(path: Path, text: str, at: int) -> Iterator[tuple[str, int, int]]:
    """Yield key, start and end of each value of the object that begins at a place."""
    at, seen = at + 1, set()
    while text[(at := _skip(text, at)) : at + 1] != "}":
        if seen:
            at = _skip(text, _expect(path, text, at, ","))
        end = _end_of_value(path, text, at)
        key = text[at:end]
        if key in seen:
            raise FileProblem(f"{path} has the key {key} twice, expected each once.")
        seen.add(key)
        start = _skip(text, _expect(path, text, _skip(text, end), ":"))
        at = _end_of_value(path, text, start)
        yield key.strip('"'), start, at


def _expect(path: Path, text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise FileProblem(f"{path} is not JSON: expected '{mark}' in line {text.count(chr(10), 0, at) + 1}.")
    return at + 1


def _end_of_value(path: Path, text: str, at: int) -> int:
    try:
        return _DECODER.raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"{path} is not JSON: {error}. A list of rows ends with ']'.") from error


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


# ------------------------------------------------------------------------------------------------------------- tables


def _read_table(path: Path, compression: str | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with _text(path, compression) as file:
        head = file.read(SNIFFED)
        if re.match(r"\s*\[?\s*\{\s*\"", head):
            raise FileProblem(f"{path} is JSON, and no table. Give it a name that ends in .json or .jsonl.")
        delimiter = sniff_delimiter(head, tabs=".tsv" in [suffix.lower() for suffix in path.suffixes])
        if said := re.match(r"sep=(.)\r?\n", head):  # as Excel writes it
            delimiter, head = said[1], head[said.end() :]
        table = csv.reader(_chained(head, file), delimiter=delimiter, strict=True)
        try:
            cells = ((table.line_num, row) for row in table if row)
            fix = "A text that holds the delimiter stands in quotation marks."
            yield from _from_cells(path, cells, fix, decimal_comma=delimiter != ",")
        except csv.Error as error:
            fix = "End its lines with LF." if "new-line" in str(error) else "Close every quotation mark, or double it."
            raise FileProblem(f"{path}, line {table.line_num}: {error}. {fix}") from error


def _chained(head: str, file: TextIO) -> Iterator[str]:
    """Yield lines with their ends, as csv wants them."""
    left = head
    while True:
        *lines, left = left.split("\n")
        yield from (f"{line}\n" for line in lines)
        more = file.read(SNIFFED)
        if not more:
            break
        left += more
    if left:
        yield left


def sniff_delimiter(head: str, *, tabs: bool = False) -> str:
    r"""Return the delimiter under which the first rows have the most cells, as many in each.

    >>> sniff_delimiter("prompt;score\nHow, then?;4,5\n")
    ';'
    """

    def quality(delimiter: str) -> tuple[float, int]:
        lines = list(_chained(head, io.StringIO()))
        lines = lines[: max(1, len(lines) - 1)][:200]
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            return 0.0, 0
        if not widths or widths[0] < 2:
            return 0.0, 0
        return sum(width == widths[0] for width in widths) / len(widths), widths[0]

    if tabs and "\t" in head.split("\n", 1)[0]:
        return "\t"
    best = max(DELIMITERS, key=quality)
    return best if quality(best)[1] else ","


def _from_cells(
    path: Path, rows: Iterable[tuple[int, list[Any]]], fix: str, *, decimal_comma: bool = False
) -> Iterator[dict[str, Any]]:
    """Make rows of a table's cells, all text; an empty cell is None.

    A first column without a name is the index that pandas writes, which is part of no group. Further columns without
    one have to be empty.
    """
    rows = iter(rows)
    _, first = next(rows, (0, []))
    first = [str(name).strip() if name is not None else "" for name in first]
    while first and not first[-1]:
        first.pop()
    header = ["index without a name" if not first[0] else first[0], *first[1:]] if first else []
    nameless = [i for i, name in enumerate(header) if not name]
    twice = [name for i, name in enumerate(header) if name and name in header[:i]]
    if not header or twice:
        found = f"the name '{twice[0]}' twice" if twice else "no names"
        raise FileProblem(f"{path}: the first line has {found}, expected a name for each column.")
    for number, (line, cells) in enumerate(rows):
        place = f"row {number} (line {line})"
        if len(cells) < len(header) or any(cell not in (None, "") for cell in cells[len(header) :]):
            yield _bad(path, place, f"{len(cells)} cells for {len(header)} columns, expected one each. {fix}")
        elif [str(cell).strip() for cell in cells[: len(header)]] == first:
            yield _bad(path, place, f"the names of the columns stand here once more, expected a row. {FIX}")
        elif any(cells):
            if odd := [i for i in nameless if cells[i] not in (None, "")]:
                cell = str(cells[odd[0]])[:60]
                raise FileProblem(
                    f"{path}: the first line has no name for column {odd[0] + 1}, which is {cell!r} in line {line}, "
                    "expected a name for each column."
                )
            values = {name: cell or None for name, cell in zip(header, cells, strict=False) if name}
            yield _row(values | ({DECIMAL_COMMA: True} if decimal_comma else {}))


def _read_sheet(path: Path, compression: str | None) -> Iterator[dict[str, Any]]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise FileProblem(
            f"Reading {path.name} needs openpyxl: pip install 'contrastive-align[data]'. Or save the sheet as CSV."
        ) from error
    with _bytes(path, compression) as file:
        try:
            book = load_workbook(io.BytesIO(file.read()), read_only=True, data_only=True)
        except Exception as error:  # of zipfile, of XML, of its own
            raise FileProblem(f"{path} cannot be read as a spreadsheet: {error}. Save the sheet as CSV.") from error
    full = [
        sheet
        for sheet in book.worksheets
        if any(any(c is not None for c in row) for row in sheet.iter_rows(values_only=True))
    ]
    if len(full) != 1:
        names = [sheet.title for sheet in full]
        raise FileProblem(
            f"{path} has {len(full)} sheets with cells {names}, expected one. Save the one you mean as CSV."
        )
    cells = ([_cell(value) for value in row] for row in full[0].iter_rows(values_only=True))
    numbered = ((line, row) for line, row in enumerate(cells, start=1) if any(cell is not None for cell in row))
    yield from _from_cells(path, _filled(numbered), "The first row of the sheet names the columns.")


def _filled(rows: Iterable[tuple[int, list[Any]]]) -> Iterator[tuple[int, list[Any]]]:
    """Fill rows up to the width of the first: a sheet leaves out empty cells at the end."""
    width = 0
    for line, cells in rows:
        width = width or len(cells)
        yield line, cells + [None] * (width - len(cells))


def _cell(value: Any) -> str | None:
    """Return a spreadsheet's cell as text: 5, not 5.0; TRUE; 2021-01-11."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if hasattr(value, "isoformat"):
        return value.isoformat().removesuffix("T00:00:00")
    return repr(value) if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------- with types


def _arrow_schema(path: Path) -> pa.Schema:
    known = kind_of(path)
    with _bytes(path, known.compression if known else None) as file:
        try:
            schema = pq.ParquetFile(file).schema_arrow if known.kind == "parquet" else _arrow_reader(path).schema
        except (pa.ArrowException, OSError) as error:
            raise FileProblem(f"'{path}' cannot be read as {known.kind}: {error}") from error
    twice = [name for i, name in enumerate(schema.names) if name in schema.names[:i]]
    if twice:
        raise FileProblem(f"{path} has the column '{twice[0]}' twice, expected each once.")
    return schema


def _unknown_types(schema: pa.Schema) -> list[str]:
    """Return the columns whose types datasets does not know."""
    unknown = []
    for field in schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except (ValueError, TypeError, NotImplementedError):
            unknown.append(field.name)
    return unknown


def _features(paths: list[Path]) -> Features:
    """Return the types of the columns, which hold those of each file."""
    schemas = [_arrow_schema(path).remove_metadata() for path in paths]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(path.name for path in paths[:4])
        raise FileProblem(f"{names}: a column has other types in other files of a split: {error}") from error
    unknown = _unknown_types(schema)
    known = Features.from_arrow_schema(pa.schema([field for field in schema if field.name not in unknown]))
    return Features({name: known.get(name) or Value("string") for name in schema.names})


def _typed_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Unread]:
    """Yield rows; a value of a type that datasets does not know is its JSON text."""
    unknown: list[str] | None = None
    for batch in batches:
        unknown = _unknown_types(batch.schema) if unknown is None else unknown
        for piece in (batch.slice(at, TYPED_AT_ONCE) for at in range(0, batch.num_rows, TYPED_AT_ONCE)):
            rows = _TypedRows(piece, unknown)
            yield from (functools.partial(rows, i) for i in range(piece.num_rows))


class _TypedRows:
    """The rows of a piece of a table, which are made Python objects together, when the first is asked for."""

    def __init__(self, piece: pa.RecordBatch, unknown: list[str]) -> None:
        self.piece, self.unknown = piece, unknown

    def __call__(self, i: int) -> dict[str, Any]:
        return self._rows[i]

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [
            row | {name: json.dumps(row[name], default=str) for name in self.unknown if row[name] is not None}
            for row in self.piece.to_pylist()
        ]


def _read_parquet(path: Path, compression: str | None, start: int = 0) -> Iterator[Unread]:
    """Yield rows from a number on; row groups before it are not read."""
    with _bytes(path, compression) as file:
        table = pq.ParquetFile(file)
        groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        ends = list(itertools.accumulate(groups))
        first = next((i for i, end in enumerate(ends) if end > start), len(ends))
        start -= ends[first - 1] if first else 0
        batches = table.iter_batches(batch_size=TYPED_AT_ONCE, row_groups=list(range(first, len(ends))))
        yield from itertools.islice(_typed_rows(batches), start, None)


def _arrow_reader(path: Path) -> Any:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


def _read_arrow(path: Path, compression: str | None) -> Iterator[Unread]:
    reader = _arrow_reader(path)
    batches = reader if hasattr(reader, "__iter__") else (reader.get_batch(i) for i in range(reader.num_record_batches))
    yield from _typed_rows(batches)


def _open_arrow(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except (pa.ArrowException, OSError):
        try:
            return Dataset(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        except (pa.ArrowException, OSError) as error:
            raise FileProblem(f"{path} cannot be read as arrow: {error}") from error


def _read_prompts(path: Path, compression: str | None) -> Iterator[dict[str, Any]]:
    yield from (_row({"prompt": line}) for line in prompts_of(path))


def _at_once(reader: Callable[[Path, str | None], Iterator[dict[str, Any]]]) -> Reader:
    """Make a reader that parses its rows one of rows that are parsed already."""

    def read(path: Path, compression: str | None) -> Iterator[Unread]:
        return (functools.partial(dict, row) for row in reader(path, compression))

    return read


READERS: dict[str, Reader] = {
    "json": _read_json,
    "table": _at_once(_read_table),
    "sheet": _at_once(_read_sheet),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "lines": _at_once(_read_prompts),
}


def _check_same_columns(paths: list[Path]) -> None:
    """Refuse files of one split whose first rows have other columns."""
    if len(paths) < 2:
        return
    seen: tuple[Path, set[str]] | None = None
    for path in paths:
        known = kind_of(path)
        if known.kind in TYPED:
            columns = set(_arrow_schema(path).names)
        else:
            first = next((row for read in unread_rows(path) if (row := read())[RAW]), None)
            if first is None:
                continue
            columns = set(parse_object(first[RAW])) - {DECIMAL_COMMA}
        if seen is not None and columns != seen[1]:
            raise FileProblem(
                f"{seen[0].name} has the columns {sorted(seen[1])} and {path.name} {sorted(columns)}, expected the "
                "same in all files of a split. Give one, or name the files of other splits test.. or validation.. ."
            )
        seen = seen or (path, columns)
