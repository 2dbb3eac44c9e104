"""Bytes -> rows: text stays text, a path is a path, and what cannot be read is named with file and line."""

import codecs
import gzip
import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive_align.data import BadRow, Options
from contrastive_align.data.files import FileProblem, folder_files, prompts_of, read_files, read_folder
from contrastive_align.data.reading import groups_of
from contrastive_align.data.rows import UNREADABLE, values_of


GROUP = {"prompt": "Name a cup.", "completions": ["tea cup", "mug"], "scores": [1, 0]}
TABLE = [
    ["Question", "Answer 1", "Mark 1", "Answer 2", "Mark 2", "Answer 3", "Mark 3"],
    ["six times seven?", "42", "5", "forty-two, or so", "4.5", "NA", "1"],
    ["Is it true?", "True", "3", "null", "1", "", ""],
    ["The code?", "007", "2", "2021-01-11", "5", "1.50", "0"],
]
EXPECTED = [
    ("six times seven?", ["42", "forty-two, or so", "NA"], [5, 4.5, 1]),
    ("Is it true?", ["True", "null"], [3, 1]),
    ("The code?", ["007", "2021-01-11", "1.50"], [2, 5, 0]),
]


@pytest.fixture(autouse=True)
def own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(*names, streaming=False, on_bad_row="raise", **options):
    rows = read_files([Path(name) for name in names], streaming=streaming)
    found = groups_of(rows, options=Options(**options), on_bad_row=on_bad_row, name="train")
    return [(group.prompt, group.completions, group.scores) for group in found]


def write(name, *rows, encoding="utf-8", end="\n"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_bytes((end.join(lines) + end).encode(encoding))
    return name


def as_csv(delimiter=",", comma="."):
    def cell(text, j):
        text = text.replace(".", comma) if j and j % 2 == 0 else text
        return f'"{text}"' if delimiter in text else text

    return [delimiter.join(cell(c, j) if i else c for j, c in enumerate(row)) for i, row in enumerate(TABLE)]


# ------------------------------------------------------------------------------------------------------------- tables


def spreadsheet(name):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for i, row in enumerate(TABLE):
        number = [float(c) if i and j and (j % 2 == 0 or c == "42") and c else c or None for j, c in enumerate(row)]
        book.active.append(number)
    book.active["D4"] = date(2021, 1, 11)
    book.save(name)
    return name


WAYS = {
    "comma.csv": lambda name: write(name, *as_csv()),
    "semicolon.csv": lambda name: write(name, *as_csv(";", ",")),
    "tabs.tsv": lambda name: write(name, *as_csv("\t")),
    "tabs.csv": lambda name: write(name, *as_csv("\t")),
    "bars.csv": lambda name: write(name, *as_csv("|")),
    "bom.csv": lambda name: write(name, *as_csv(), encoding="utf-8-sig", end="\r\n"),
    "excel.csv": lambda name: write(name, *as_csv("\t", ","), encoding="utf-16", end="\r\n"),
    "rows.json": lambda name: (
        Path(name).write_text(json.dumps([dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]], indent=1))
        and name
    ),
    "one_object.json": lambda name: (
        Path(name).write_text(
            json.dumps({"version": 1, "data": [dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]]}, indent=1)
        )
        and name
    ),
    "rows.jsonl": lambda name: write(name, *[dict(zip(TABLE[0], row, strict=True)) for row in TABLE[1:]], end="\r\n"),
    "rows.jsonl.gz": lambda name: (
        Path(name).write_bytes(gzip.compress(Path(WAYS["rows.jsonl"]("r.jsonl")).read_bytes())) and name
    ),
    "rows.csv.zst": lambda name: (
        Path(name).write_bytes(pa.compress(Path(WAYS["comma.csv"]("c.csv")).read_bytes(), codec="zstd", asbytes=True))
        and name
    ),
    "sheet.xlsx": spreadsheet,
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_one_spreadsheet_in_every_way(name, streaming):
    """A prompt, three answers and three marks, whose answers look like numbers, dates and nothing."""
    assert read(WAYS[name](name), streaming=streaming) == EXPECTED


def test_only_an_empty_cell_is_empty():
    name = write("na.csv", "prompt,chosen,rejected", "Which?,None,nan", "Which one?,NULL,n/a")
    assert [texts for _, texts, _ in read(name)] == [["None", "nan"], ["NULL", "n/a"]]


def test_ranks_in_cells_count_down():
    name = write("ranks.csv", "prompt,answer,rank", "p,best,1", "p,worst,3", "p,second,2")
    assert read(name) == [("p", ["best", "worst", "second"], [-1, -3, -2])]
    name = write("wide.csv", "prompt,answer_1,rank_1,answer_2,rank_2", "p,worse,2,better,1")
    assert read(name) == [("p", ["worse", "better"], [-2, -1])]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["prompt,chosen,rejected", "a,b"], r"t.csv, row 0 \(line 2\): 2 cells for 3 columns"),
        (["prompt,chosen,rejected", "a,b,c,d"], r"row 0 \(line 2\): 4 cells for 3 columns.*quotation marks"),
    ],
)
def test_a_ragged_row_is_a_bad_row(lines, said):
    good = ["p,yes,no"]
    name = write("t.csv", *lines, *good)
    with pytest.raises(BadRow, match=said):
        read(name)
    assert read(name, on_bad_row="drop") == [("p", ["yes", "no"], [1, 0])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('prompt,chosen,rejected\na,"b,c\n', "line .*Close every quotation mark"),
        ("prompt,prompt,rejected\na,b,c\n", "'prompt' twice"),
        ("prompt,,rejected\na,b,c\n", "a name for each column"),
        ("prompt,chosen\n", "has no rows"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(text, said):
    Path("t.csv").write_text(text)
    with pytest.raises(FileProblem, match=said):
        read("t.csv")


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("null", "the row is null, expected an object"),
        ("[1, 2]", r"the row is \[1, 2\], expected an object"),
        ("{oops", "not JSON"),
        ('{"prompt": "a", "prompt": "b", "chosen": "x", "rejected": "y"}', "the key 'prompt' stands twice"),
        ('{"prompt": "\\ud83d", "chosen": "x", "rejected": "y"}', "half of a character"),
        ("[" * 100000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_line_is_named_and_droppable(line, said, first):
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    name = write("rows.jsonl", *([line, pair, pair] if first else [pair, line, pair]))
    row = 0 if first else 1
    with pytest.raises(BadRow, match=rf"rows.jsonl, row {row} \(line {row + 1}\): .*{said}"):
        read(name)
    assert len(read(name, on_bad_row="drop")) == 2


def test_texts_and_numbers_stay_as_they_are_written():
    row = '{"prompt": "p", "completions": ["2021-01-11T08:00:00", 1.50, 14, "007"], "scores": ["1.0", 0.5, 2, 3e0]}'
    assert read(write("rows.jsonl", row)) == [("p", ["2021-01-11T08:00:00", "1.50", "14", "007"], [1, 0.5, 2, 3])]


def test_one_odd_row_spoils_no_other():
    rows = [
        GROUP,
        {**GROUP, "completions": "text"},
        {**GROUP, "scores": [[1], 0], "extra": {"a": 1}},
        {**GROUP, "extra": 3},
    ]
    assert len(read(write("rows.jsonl", *rows), on_bad_row="drop")) == 2


def test_columns_of_other_rows_are_not_filled_in():
    tools = [[{"name": "f", "parameters": {"a": 1}}], [{"name": "g", "parameters": {"b": 2}}]]
    rows = read_files([Path(write("rows.jsonl", *[{"tools": t} for t in tools]))])
    assert [values_of(row, "")["tools"] for row in rows] == tools


@pytest.mark.parametrize("end", ['"completions": ["a"', "", "]]", "] trailing"])
def test_a_list_that_does_not_end_is_named(end):
    Path("rows.json").write_text(
        "[" + json.dumps(GROUP) + ("," if end.startswith('"') else "") + ("{" if end.startswith('"') else "") + end
    )
    with pytest.raises(FileProblem, match=r"rows.json (is not JSON|goes on after the end)"):
        read("rows.json")


# -------------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize(
    "name",
    [
        "brack[1].jsonl",
        "data[ab].jsonl",
        "star_*.jsonl",
        "what?.jsonl",
        "a b.jsonl",
        "%20+.jsonl",
        "#1.jsonl",
        "$HOME.jsonl",
        "x::y.jsonl",
        "{a,b}.jsonl",
    ],
)
def test_a_path_is_a_path(name):
    for other in ("dataa.jsonl", "star_a.jsonl", "whatx.jsonl", "brack1.jsonl"):
        write(other, {**GROUP, "prompt": "ANOTHER FILE"})
    assert [prompt for prompt, _, _ in read(write(name, GROUP))] == ["Name a cup."]
    with open(name.replace("jsonl", "parquet"), "wb") as file:
        pq.write_table(pa.Table.from_pylist([GROUP]), file)
    assert [prompt for prompt, _, _ in read(name.replace("jsonl", "parquet"))] == ["Name a cup."]


def test_a_file_that_changed_is_read_again():
    assert read(write("rows.jsonl", GROUP))[0][0] == "Name a cup."
    assert read(write("rows.jsonl", {**GROUP, "prompt": "Another."}))[0][0] == "Another."


def test_typed_files_and_their_types():
    table = pa.Table.from_pylist([GROUP, {**GROUP, "prompt": "Another."}])
    pq.write_table(table, "rows.parquet")
    with pa.OSFile("stream.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write(table)
    with pa.OSFile("file.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write(table)
    for name in ("rows.parquet", "stream.arrow", "file.arrow"):
        assert [g[0] for g in read(name)] == ["Name a cup.", "Another."] == [g[0] for g in read(name, streaming=True)]


def test_folders_have_splits_by_their_names():
    for name in (
        "f/train-00000.jsonl",
        "f/train-00001.jsonl",
        "f/test.jsonl",
        "f/nested/validation/x.jsonl",
        "f/.hidden.jsonl",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write(name, GROUP)
    assert {split: len(files) for split, files in folder_files(Path("f")).items()} == {
        "train": 2,
        "test": 1,
        "validation": 1,
    }
    assert {split: len(rows) for split, rows in read_folder(Path("f")).items()} == {
        "train": 2,
        "test": 1,
        "validation": 1,
    }
    write("f/train-00002.jsonl", {**GROUP, "note": "x"})
    with pytest.raises(FileProblem, match=r"train-00000.jsonl has the columns .* and train-00002.jsonl .*'note'"):
        read_folder(Path("f"))


def test_encodings():
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ):
        Path("p.txt").write_bytes(mark + "größer?\r\nzwei\u2028Zeilen\n\n".encode(encoding))
        assert prompts_of(Path("p.txt")) == ["größer?", "zwei\u2028Zeilen"]
    Path("rows.jsonl").write_bytes(json.dumps(GROUP).encode() + b"\n" + '{"prompt": "größer"}'.encode("latin-1"))
    with pytest.raises(FileProblem, match=r"is not UTF-8 text.*Save it as UTF-8"):
        read("rows.jsonl")
    for broken in ("rows.jsonl.gz", "rows.jsonl.zst"):
        Path(broken).write_bytes(b"no such bytes at all")
        with pytest.raises(FileProblem):
            read(broken)
    whole = gzip.compress(b"\n".join([json.dumps(GROUP).encode()] * 1000))
    Path("cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(FileProblem, match=r"cut\.jsonl\.gz"):
        read("cut.jsonl.gz")


def test_an_unreadable_row_keeps_its_number():
    rows = read_files([Path(write("rows.jsonl", GROUP, "{", GROUP))])
    assert [row[UNREADABLE] is None for row in rows] == [True, False, True] and rows["__row__"][:] == [0, 1, 2]


# --------------------------------------------------------------------------------------- what nobody thought of, nearly

PAIR = "prompt,chosen,rejected\n"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "a.jsonl",
            gzip.compress(b"{}\n", mtime=0),
            r"a.jsonl is a gzip file, and no text. Give it a name that ends in \.gz",
        ),
        ("a.csv", b"PAR1....", r"is a Parquet file.*ends in \.parquet"),
        ("a.csv", b"PK\x03\x04...", r"is a spreadsheet.*ends in \.xlsx"),
        ("a.csv", json.dumps(GROUP).encode(), r"is JSON, and no table.*ends in \.json or \.jsonl"),
        ("a.jsonl.gz", b"{}\n", r"is no gzip file: .*Name it by what it is, without '\.gz'"),
        ("a.csv", PAIR.encode() + b"a,b,c\ngr\xf6\xdfer,b,c\n", r"not UTF-8 text: .*in line 3\)\. Save it as UTF-8"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": "b"},\n]', r"a comma stands before the '\]' in line 3. Take it out"),
        (
            "a.json",
            b'{"prompt": ["a", "b"], "chosen": ["c", "d"]}',
            r"one object of columns.*orient='records', lines=True",
        ),
        (
            "a.json",
            b'{"prompt_ids": [[5, 6], [7]], "chosen_ids": [[8], [9]]}',
            r"one object of columns.*orient='records', lines=True",
        ),
        (
            "a.json",
            b'{"prompt": {"0": "a"}, "chosen": {"0": "b"}}',
            r"one object of columns.*orient='records', lines=True",
        ),
        ("a.csv", b"prompt,,chosen\na,b,c\n", r"no name for column 2, which is 'b' in line 2"),
    ],
)
def test_a_file_of_another_kind_is_named(name, data, said):
    Path(name).write_bytes(data)
    with pytest.raises(FileProblem, match=said):
        read(name)


def test_a_single_row_of_token_ids_is_no_object_of_columns():
    row = {"prompt_ids": [5, 6], "completion_ids": [[7, 8], [9]], "scores": [1, 0]}
    rows = read_files([Path(write("rows.jsonl", row))])
    assert [values_of(each, "row 0") for each in rows] == [row]


def test_tables_as_programs_write_them():
    expected = [("Ask him.", ["please go", "go now"], [1, 0])]
    for text in (
        ",prompt,chosen,rejected\n0,Ask him.,please go,go now\n",  # pandas, with its index
        "prompt,,chosen,rejected,\nAsk him.,,please go,go now,\n",  # a sheet with empty columns
        "sep=;\nprompt;chosen;rejected\nAsk him.;please go;go now\n",  # Excel
    ):
        Path("rows.csv").write_text(text)
        assert read("rows.csv") == expected
    Path("rows.csv").write_text(f"{PAIR}Ask him.,please go,go now\n{PAIR}Ask her.,please go,go now\n")
    with pytest.raises(BadRow, match=r"rows.csv, row 1 \(line 3\): the names of the columns stand here once more"):
        read("rows.csv")
    assert len(read("rows.csv", on_bad_row="drop")) == 2


def test_one_row_over_several_lines():
    Path("rows.json").write_text(json.dumps(GROUP, indent=2))
    assert read("rows.json") == [("Name a cup.", ["tea cup", "mug"], [1, 0])]
    Path("rows.json").write_text(json.dumps({"schema": {}, "data": [GROUP]}, indent=2))
    assert read("rows.json") == [("Name a cup.", ["tea cup", "mug"], [1, 0])]


def test_columns_of_types_that_are_text_and_of_types_that_are_not_known():
    day = pa.array([date(2021, 1, 11)])
    table = pa.table(
        {
            "prompt": pa.array([b"When?"]),
            "chosen": day,
            "rejected": pa.array(["never"]).dictionary_encode(),
            "when": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(table, "rows.parquet")
    with pa.OSFile("rows.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write(table)
    for name in ("rows.parquet", "rows.arrow"):
        assert read(name) == [("When?", ["2021-01-11", "never"], [1, 0])]
    marks = pa.array([Decimal("4.5")])
    pq.write_table(
        pa.table({"prompt": ["p"], "answer_1": ["a"], "score_1": marks, "answer_2": ["b"], "score_2": marks}),
        "rows.parquet",
    )
    assert read("rows.parquet") == [("p", ["a", "b"], [4.5, 4.5])]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, "rows.parquet")
    with pytest.raises(FileProblem, match="has the column 'prompt' twice"):
        read("rows.parquet")


def test_lists_as_python_prints_them_are_named():
    Path("rows.csv").write_text("prompt,completions,scores\na,\"['x', 'y']\",\"[1, 0]\"\n")
    with pytest.raises(BadRow, match=r"not a JSON list.*as Python prints it: write it by json\.dumps"):
        read("rows.csv")


def test_typed_files_of_one_split_have_columns_that_hold_both():
    for n, score in enumerate((1, 0.25)):
        pq.write_table(pa.table({"prompt": ["p"], "completions": [["a", "b"]], "scores": [[score, 3]]}), f"{n}.parquet")
    assert [scores for _, _, scores in read("0.parquet", "1.parquet")] == [[1, 3], [0.25, 3]]
    pq.write_table(pa.table({"prompt": [7], "completions": [["a", "b"]], "scores": [[1, 3]]}), "2.parquet")
    with pytest.raises(FileProblem, match=r"0\.parquet, 2\.parquet: a column has other types in other files"):
        read("0.parquet", "2.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "answers": [["a", "b"]], "scores": [[1, 3]]}), "3.parquet")
    with pytest.raises(FileProblem, match=r"3\.parquet \['answers', .*expected the same in all files of a split"):
        read("0.parquet", "3.parquet")
