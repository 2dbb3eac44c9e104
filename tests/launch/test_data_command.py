"""contrastive-align data: what training would see, without training."""

import json
import re
from pathlib import Path

import pytest

from contrastive_align import demo
from contrastive_align.launch import cli


ROWS = [
    {"prompt": f"Ask {name}.", "completions": ["Please, sit.", "Sit!", "Sit down."], "scores": [n, 0, 0.5], "note": "x"}
    for n, name in enumerate(("Anna", "Ben", "Carl"), start=1)
]


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def shown(capsys, *argv):
    cli.main(["data", *argv])
    return capsys.readouterr().out


def test_it_shows_what_was_recognised_scores_and_groups(capsys):
    out = shown(capsys, "rows.jsonl")
    assert "rows.jsonl: 3 groups (3 of K = 3) of 3 rows, read as lists (like RLHFlow, distilabel), from prompt, " in out
    assert "columns not read: note." in out and "scores: 5 levels: 3 (1), 2 (1), 1 (1), 0.5 (3), 0 (3)" in out
    assert "auto: " in out and "1e-4" in out and "'Please, sit.'" in out and "--model=NAME" in out


def test_with_a_model_it_shows_tokens_and_what_a_limit_cuts(capsys):
    out = shown(capsys, "rows.jsonl", f"--model={demo.MODEL_PATH}", "--max_length=8")
    assert "lengths under max_length=8" in out and "cut to fit max_length" in out and "|Please" in out
    assert "<eos>" in shown(capsys, "rows.jsonl", f"--model={demo.MODEL_PATH}")


def test_the_canonical_form_is_read_as_the_file_was(capsys):
    first = shown(capsys, "rows.jsonl", "--output=groups.jsonl")
    assert "3 groups written to groups.jsonl" in first
    again = shown(capsys, "groups.jsonl", "--output=again.jsonl")
    assert Path("again.jsonl").read_text() == Path("groups.jsonl").read_text()
    assert [{**row, "note": "x"} for row in map(json.loads, Path("groups.jsonl").open())] == ROWS
    assert again.split("scores:")[1].split("\n\n")[:3] == first.split("scores:")[1].split("\n\n")[:3]


@pytest.mark.parametrize(
    ("line", "flags", "said"),
    [
        ('{"prompt": "p", "completions": ["a"], "scores": [1]}', [], "1 completion, expected at least 2"),
        ('{"verse": "p"}', [], "No group"),
        ("{", [], "not JSON"),
    ],
)
def test_it_exits_with_1_where_training_would_refuse(capsys, line, flags, said):
    Path("bad.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "bad.jsonl", "--output=kept.jsonl", *flags])
    assert caught.value.code == 1 and said in "".join(capsys.readouterr())
    assert not Path("kept.jsonl").exists()


def test_pairs_and_named_columns(capsys):
    Path("odd.jsonl").write_text(json.dumps({"verse": "p", "one": "a", "two": "b"}) + "\n")
    out = shown(capsys, "odd.jsonl", "--columns", "prompt=verse,chosen=one,rejected=two", "--preference")
    assert "1 groups (1 of K = 2) of 1 rows, read as pairs" in out and "same labels at every temperature" in out


def test_a_stream_is_shown_as_the_file_is(capsys):
    Path("rows.jsonl").open("a").write(json.dumps({**ROWS[0], "completions": ["a", "", "b"]}) + "\n")
    whole, stream = (
        shown(capsys, "rows.jsonl", "--on_bad_row=drop", f"--dataset_streaming={streaming}", "--output=groups.jsonl")
        for streaming in ("false", "true")
    )
    assert "3 groups (3 of K = 3) of 4 rows" in whole and "1 of 4 rows dropped. The first: train, row 3: " in whole
    assert stream == whole.replace("of 4 rows, read", "of the first 4 rows of a stream, read")
    Path("long.jsonl").write_text('{"prompt": "p", "completion": "a", "label": true}\n' * 2)
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "long.jsonl", "--dataset_streaming=true"])
    assert caught.value.code == 1 and "so it cannot be a stream. Load it whole" in capsys.readouterr().out


def test_what_is_offered_is_typed_and_works(capsys):
    Path("odd.csv").write_text("Frage;Antwort 1;Note 1;Antwort 2;Note 2\nWas nun?;Nichts;1,5;Gehen;5,0\n")
    with pytest.raises(SystemExit):
        cli.main(["data", "odd.csv"])
    [flag] = re.findall(r"--columns='([^']*)'", capsys.readouterr().out)
    assert "1 groups (1 of K = 2)" in shown(capsys, "odd.csv", f"--columns={flag}")
