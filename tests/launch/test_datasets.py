"""A name, a file, a folder or a mixture -> training and evaluation rows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.utils import DatasetConfig

from contrastive_align import demo
from contrastive_align.conditions import resolve_condition
from contrastive_align.data import BadRow, prepare_groups
from contrastive_align.data.rows import values_of
from contrastive_align.launch.arguments import Arguments, RunArguments, parse
from contrastive_align.launch.conditional import ConditionalArguments
from contrastive_align.launch.datasets import from_rows, load_scored, load_splits
from contrastive_align.launch.usage import UsageError
from contrastive_align.trainers import ConditionalConfig


def row(n: int) -> dict:
    return {"prompt": f"q{n}:", "completions": ["yes", f"no {n}"], "scores": [1.0, 0.0]}


ROWS = [row(n) for n in range(10)]
COLUMNS = {"columns": None, "score_column": None, "hard_pairs": False}


@pytest.fixture(autouse=True)
def own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(name: str, rows: list, *, encoding: str = "utf-8") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return name


def load(
    name: str | None = None, mixture: dict | None = None, *, want_eval=False, seed=0, on_bad_row="raise", **script
):
    training = SimpleNamespace(eval_strategy="epoch" if want_eval else "no", do_eval=False, seed=seed, **COLUMNS)
    mixture = DatasetMixtureConfig(**(mixture or {}))
    args = Arguments(RunArguments(dataset_name=name, **script), training, ModelConfig(), mixture, set(), [])
    return load_splits(args, on_bad_row=on_bad_row)


def prompts_in(rows) -> list[str]:
    return [values_of(row, "")["prompt"] for row in rows]


def refused(capsys, act, *parts: str) -> None:
    with pytest.raises(UsageError) as caught:
        act()
    assert capsys.readouterr().err.endswith(f"error: {caught.value.message}\n")  # after any progress bar
    for part in parts:
        assert part in caught.value.message, caught.value.message


# ----------------------------------------------------------------------------------------------------------- files


def save(kind: str) -> str:
    dataset = Dataset.from_list(ROWS)
    if kind == "json":
        Path("rows.json").write_text(json.dumps(ROWS))
    elif kind in ("jsonl", "JSONL"):
        write(f"rows.{kind}", ROWS)
    elif kind == "parquet":
        dataset.to_parquet("rows.parquet")
    elif kind == "csv":
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in ROWS]
        Dataset.from_list(cells).to_csv("rows.csv")
    elif kind == "folder":
        write("rows.folder/train.jsonl", ROWS)
    elif kind == "saved":
        dataset.save_to_disk("rows.saved")
    elif kind == "saved_splits":
        DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk("rows.saved_splits")
    return f"rows.{kind}"


KINDS = ["json", "jsonl", "JSONL", "parquet", "csv", "folder", "saved", "saved_splits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_every_kind_of_file_and_folder_is_a_dataset_name(kind, streaming):
    train, test = load(save(kind), dataset_streaming=streaming)
    assert isinstance(train, IterableDataset if streaming else Dataset)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    groups, report = prepare_groups(train, tokenizer, max_length=None, max_prompt_length=None, on_bad_row="raise")
    texts = [[tokenizer.decode(r["prompt_ids"] + c) for c in r["completion_ids"]] for r in groups]
    assert texts == [[r["prompt"] + c + "<eos>" for c in r["completions"]] for r in ROWS]
    assert report.spelling == "lists"
    assert (test is None) == (kind != "saved_splits")


def test_a_folder_with_files_for_each_split():
    write("two/train.jsonl", ROWS)
    write("two/test.jsonl", ROWS[:4])
    train, test = load("./two", want_eval=True)
    assert (len(train), len(test)) == (10, 4)


def test_first_rows_only():
    write("rows/train.jsonl", ROWS)
    write("rows/test.jsonl", ROWS)
    for streaming in (False, True):
        train, test = load("rows", dataset_streaming=streaming, max_train_samples=3, max_eval_samples=99)
        assert prompts_in(train) == ["q0:", "q1:", "q2:"] and len(list(test)) == 10


@pytest.mark.parametrize(
    "name, parts",
    [
        ("rows.json", ["no file 'rows.json' (looked in ", "Did you mean 'rows.jsonl'?"]),
        ("nowhere/rows.csv", ["no file 'nowhere/rows.csv'"]),
        ("./rows", ["no file or folder './rows'", ".parquet"]),
        ("/no/such/folder", ["no file or folder '/no/such/folder'"]),
        ("rows.jsnl", ["no file or folder 'rows.jsnl'", "Did you mean 'rows.jsonl'?"]),
        ("notes.doc", ["'notes.doc' ends in '.doc', expected one of .json, .jsonl", ", or a folder"]),
        ("empty.jsonl", ["'empty.jsonl' is empty"]),
        ("none.json", ["'none.json' has no rows"]),
        ("broken.parquet", ["'broken.parquet' cannot be read as parquet"]),
        ("org/model-2.5", ["'org/model-2.5' is no local file or folder, and the hub cannot be reached"]),
        ("org/name", ["'org/name' is no local file or folder, and the hub cannot be reached"]),
    ],
)
def test_a_name_that_leads_nowhere_is_a_clean_error(capsys, name, parts):
    write("rows.jsonl", ROWS)
    write("notes.doc", ["x"])
    write("broken.parquet", ["x"])
    Path("empty.jsonl").write_text("")
    Path("none.json").write_text("[]")
    refused(capsys, lambda: load(name), *parts)


def test_one_source_and_no_option_without_effect(capsys):
    write("rows.jsonl", ROWS)
    part = {"datasets": [DatasetConfig(path="rows.jsonl")]}
    refused(capsys, lambda: load("rows.jsonl", part), "both 'datasets' and 'dataset_name' are given")
    refused(capsys, lambda: load(), "neither 'datasets' nor 'dataset_name' is given")
    refused(capsys, lambda: load(mixture=part, dataset_streaming=True), "for 'datasets' set 'streaming'")
    refused(capsys, lambda: load("rows.jsonl", {"streaming": True}), "set 'dataset_streaming'")
    refused(capsys, lambda: load("rows.jsonl", dataset_config="en"), "'dataset_config' is 'en'", "Leave it out")


# ---------------------------------------------------------------------------------------------------------- splits


def test_a_missing_split_names_those_there_are(capsys):
    write("rows.jsonl", ROWS)
    refused(capsys, lambda: load("rows.jsonl", dataset_train_split="train_prefs"), "'train_prefs'", "['train']")
    refused(
        capsys,
        lambda: load("rows.jsonl", want_eval=True, dataset_test_split="test_prefs"),
        *("no split 'test_prefs'", "['train']", "--test_split_size=0.1", "--eval_strategy=no"),
    )


def test_named_splits():
    write("rows/train.jsonl", ROWS)
    write("rows/test.jsonl", ROWS[:4])
    train, test = load("rows", dataset_train_split="test", dataset_test_split="train")
    assert (len(train), len(test)) == (4, 10)


def test_rows_split_off_are_seeded_and_disjoint(capsys):
    write("rows.jsonl", ROWS)
    first, again = (load("rows.jsonl", {"test_split_size": 0.3}, want_eval=True, seed=7) for _ in range(2))
    assert [prompts_in(d) for d in first] == [prompts_in(d) for d in again]
    prompts = [set(prompts_in(d)) for d in first]
    assert (len(prompts[0]), len(prompts[1]), len(prompts[0] | prompts[1])) == (7, 3, 10)
    other, _ = load("rows.jsonl", {"test_split_size": 0.3}, seed=8)
    assert prompts_in(other) != prompts_in(first[0])
    refused(capsys, lambda: load("rows.jsonl", {"test_split_size": 0.3}, dataset_streaming=True), "found a stream")


# -------------------------------------------------------------------------------------------------------- mixtures


def test_local_files_mix():
    write("a.jsonl", ROWS[:4])
    write("b/train.jsonl", ROWS[4:])
    parts = [DatasetConfig(path="a.jsonl", split="train[:50%]"), DatasetConfig(path="b")]
    train, test = load(mixture={"datasets": parts})
    assert prompts_in(train) == [f"q{n}:" for n in (0, 1, 4, 5, 6, 7, 8, 9)] and test is None


def test_a_mixture_takes_each_parts_test_split():
    for name in "ab":
        write(f"{name}/train.jsonl", ROWS[:4])
        write(f"{name}/test.jsonl", ROWS[4:6])
    parts = [DatasetConfig(path=name, split="train[:50%]") for name in "ab"]
    train, test = load(mixture={"datasets": parts}, want_eval=True)
    assert prompts_in(train) == ["q0:", "q1:"] * 2 and prompts_in(test) == ["q4:", "q5:"] * 2


def test_a_mixture_is_split_with_the_seed():
    write("a.jsonl", ROWS)
    mixture = {"datasets": [DatasetConfig(path="a.jsonl")], "test_split_size": 3}
    runs = [load(mixture=dict(mixture), want_eval=True, seed=seed) for seed in (1, 1, 2)]
    assert [prompts_in(d) for d in runs[0]] == [prompts_in(d) for d in runs[1]]
    assert prompts_in(runs[0][0]) != prompts_in(runs[2][0])
    assert len(runs[0][0]) == 7 and len(runs[0][1]) == 3


def test_a_missing_part_is_a_clean_error(capsys):
    write("a.jsonl", ROWS)
    parts = [DatasetConfig(path="a.jsonl"), DatasetConfig(path="b.jsonl")]
    refused(capsys, lambda: load(mixture={"datasets": parts}), "no file 'b.jsonl'", "Did you mean 'a.jsonl'?")


# ---------------------------------------------------------------------------------------------------- broken files


BROKEN = [row(0), "{oops", row(2), '["a list"]', {**row(4), "scores": [1.0]}, row(5)]


def groups_of(train: Dataset, on_bad_row: str = "drop"):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    return prepare_groups(train, tokenizer, max_length=None, max_prompt_length=None, on_bad_row=on_bad_row)


def test_a_broken_line_is_named():
    train, _ = load(write("rows.jsonl", BROKEN))
    with pytest.raises(BadRow, match=r"^rows\.jsonl, row 1 \(line 2\): not JSON: "):
        groups_of(train, on_bad_row="raise")


def test_broken_lines_are_dropped_and_counted_under_their_own_numbers():
    train, _ = load(write("rows.jsonl", BROKEN), on_bad_row="drop")
    kept, report = groups_of(train)
    assert (len(kept), report.rows, report.dropped) == (3, 6, 3)
    assert list(report.dropped_because) == ["1", "3", "4"]
    assert report.dropped_because["1"].startswith("rows.jsonl, row 1 (line 2): not JSON: ")
    assert "row 3 (line 4): the row is ['a list'], expected an object with columns" in report.dropped_because["3"]
    assert "row 4: 'scores' has 1 numbers for 2 completions" in report.dropped_because["4"]


def test_a_broken_first_line_leaves_the_spelling_and_the_columns():
    tools = [{"type": "function", "function": {"name": "f"}}]
    pair = {
        "prompt": [{"role": "user", "content": "call f"}],
        "chosen": "a",
        "rejected": "b",
        "tools": json.dumps(tools),
    }
    train, _ = load(write("rows.jsonl", ["{oops", pair, pair]), on_bad_row="drop")
    kept, report = groups_of(train)
    assert (report.spelling, report.dropped, len(kept)) == ("pairs", 1, 2)


def test_line_separators_inside_of_strings_do_not_end_a_row():
    odd = {**row(0), "prompt": "one\u2028two\x85three\x0bfour"}
    train, _ = load(write("rows.jsonl", [odd, "{oops", row(2)]), on_bad_row="drop")
    assert prompts_in(train.select([0])) == [odd["prompt"]]
    assert groups_of(train)[1].dropped == 1


def test_a_file_without_a_single_good_row():
    with pytest.raises(BadRow, match=r"rows.jsonl, row 0 \(line 1\): not JSON"):
        load(write("rows.jsonl", ["{oops", "[1]"]), on_bad_row="drop")


@pytest.mark.parametrize("scores", [[1.0, float("nan")], [1.0, "x"], [1.0, None]])
def test_bad_scores_in_a_file_are_named_on_either_way(scores):
    """Whether the reader takes the file as a table or not, the row and the column are told."""
    rows = [row(0), {**row(1), "scores": scores}]
    with pytest.raises(BadRow, match=r"row 1: 'scores'\[1\] is "):
        train, _ = load(write("rows.jsonl", rows))
        tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
        prepare_groups(train, tokenizer, max_length=None, max_prompt_length=None, on_bad_row="raise")
    train, _ = load("rows.jsonl", on_bad_row="drop")
    assert list(groups_of(train)[1].dropped_because) == ["1"]


# ------------------------------------------------------------------------------------------ prompts, scored completions


def test_prompts_of_other_names_are_named(capsys):
    rows = [{"verse": "a", "chorus": "b"}]
    refused(capsys, lambda: from_rows(rows, "verses"), "verses, row 0: no 'prompt'", "--columns=prompt=NAME")
    assert from_rows(rows, "verses", "prompt=verse").to_list() == [{"prompt": "a", "chorus": "b"}]
    assert from_rows(rows, "verses", {"prompt": "verse+chorus"})["prompt"][:] == ["a\nb"]


def test_scored_completions_of_any_shape_become_canonical(tmp_path):
    pair = {"verse": "p", "chosen": "a", "rejected": "b", "chosen_rating": 5, "rejected_rating": 2, "note": "x"}
    pairs = [pair, {**pair, "chosen": None}]
    flags = [f"--dataset_name={write('pairs.jsonl', pairs)}", "--columns=prompt=verse", "--on_bad_row=drop"]
    args = parse(flags, prog="test", script=ConditionalArguments, training=ConditionalConfig)
    rows, held_out, name = load_scored(args, resolve_condition("phrases"))
    canonical = {"prompt": "p", "completions": ["a", "b"], "scores": [5, 2]}
    assert (rows.to_list(), held_out, name) == ([{**canonical, "note": "x", "__row__": 0}], None, "pairs.jsonl")
    assert args.notes[-2:] == [
        "train: columns not read: note",
        "train: 1 of 2 rows dropped. The first: row 1: 'chosen' is missing",
    ]
    assert args.training.columns is None  # the rows have the canonical ones
