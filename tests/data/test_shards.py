"""Shards: one order for any number of readers, the rows of the whole data set, and log-probs that know their tokens."""

import gzip
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from contrastive_align import demo
from contrastive_align.data import BadRow, files, prepare_groups, shards
from contrastive_align.data.files import FileProblem, read_files, unread_rows
from contrastive_align.data.reference_shards import LogpsWriter, add_logps, read_logps
from contrastive_align.data.shards import ShardBatches, ShardedGroups, ShardOrder


TOKENIZER = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
TEXTS = ("Please sit.", "Sit!", "Sit down.", "Do sit.")


@pytest.fixture(autouse=True)
def own_folder_and_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def row(i: int) -> dict:
    k = 2 + i % 3
    return {"prompt": f"Ask {i}.", "completions": list(TEXTS[:k]), "scores": [float(i + j) for j in range(k)]}


def write(name: str, rows: list[dict]) -> Path:
    path = Path(name)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".jsonl"):
        path.write_text(lines)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    else:
        raise ValueError(name)
    return path


def prepared(paths: list[Path], *, streaming: bool = True, on_bad_row: str = "raise", **told):
    rows = read_files(paths, streaming=streaming)
    told = {"max_length": 64, "max_prompt_length": None, "on_bad_row": on_bad_row, **told}
    return prepare_groups(rows, TOKENIZER, **told)


def several(kind: str, sizes=(30, 1, 70)) -> list[Path]:
    numbers = iter(range(sum(sizes)))
    return [write(f"part-{i}{kind}", [row(next(numbers)) for _ in range(size)]) for i, size in enumerate(sizes)]


# -------------------------------------------------------------------------------------------------------------- order


def places(order: ShardOrder, epoch: int) -> list[tuple[int, int]]:
    return [place for window in order.windows(epoch) for place in zip(*map(np.ndarray.tolist, window[2:]), strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lengths", [[1], [0, 5, 0], [64, 128], [3000, 1, 0, 130], list(range(40))])
def test_an_epoch_has_each_row_once_and_is_a_function_of_seed_and_epoch(lengths, shuffle):
    order = ShardOrder(lengths, seed=3, shuffle=shuffle)
    every = [(file, row) for file, length in enumerate(lengths) for row in range(length)]
    first = places(order, 0)
    assert sorted(first) == every and places(ShardOrder(lengths, seed=3, shuffle=shuffle), 0) == first
    assert sorted(places(order, 1)) == every
    if not shuffle:
        assert first == every
    elif len(every) > 10:
        assert places(order, 1) != first != places(ShardOrder(lengths, seed=4), 0)


def test_every_position_is_found_from_anywhere():
    order = ShardOrder([500, 3, 4100, 64, *[70] * 30], seed=1)
    whole = places(order, 2)
    for position in np.random.RandomState(0).permutation(len(whole))[:200]:
        window = ShardOrder(order.lengths, seed=1).window_at(2, int(position))
        i = int(position) - window.start
        assert (window.files[i], window.rows[i]) == whole[position]


def test_rows_of_sorted_files_are_mixed():
    """In every window of 2,048 positions there are rows of most of the files that are read in turn."""
    order = ShardOrder([2000] * 16)
    assert min(len(set(window.files.tolist())) for window in order.windows(0)) >= 12


def joined(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [1, 47, 48, 50])
def test_batches_of_all_processes_are_the_positions_whatever_their_number(rows, drop_last):
    """8 rows a step, as 1 x 8, 2 x 4 and 4 x 1 x 2: each step has the same rows."""
    steps = []
    for ranks, size, accumulation in ((1, 8, 1), (2, 4, 1), (4, 1, 2)):
        dealt = [
            ShardBatches(rows, size=size, ranks=ranks, rank=rank, drop_last=drop_last and accumulation == 1)
            for rank in range(ranks)
        ]
        for batches in dealt:
            batches.set_epoch(2)
        at_once = list(zip(*dealt, strict=True))  # all have as many
        assert len(at_once) == len(dealt[0])
        flat = [joined(batches) for batches in at_once]
        steps.append([joined(flat[i : i + accumulation]) for i in range(0, len(flat), accumulation)])
    assert steps[0] == steps[1] and (steps[1] == steps[2] or drop_last)
    kept = rows // 8 * 8 if drop_last else rows
    assert joined(steps[0]) == list(range(2 * rows, 2 * rows + kept))


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow"])
def test_readers_give_the_rows_of_the_whole_dataset_once(kind):
    """Three readers of two processes each, a pickled copy for each, one of them joined in mid-epoch."""
    paths = several(kind)
    whole, _ = prepared(paths, streaming=False)
    stream, report = prepared(paths)
    assert isinstance(stream, ShardedGroups) and len(stream) == len(whole) == 101
    assert list(stream) == [{**group, "row": i} for i, group in enumerate(whole)]
    assert report.groups == report.rows == 101
    stream.order = ShardOrder(stream.lengths, seed=5)
    found = {}
    for reader, begin in ((0, 0), (1, 0), (2, 51)):
        copy = pickle.loads(pickle.dumps(stream))
        for positions in itertools.islice(ShardBatches(101, size=3, ranks=3, rank=reader), begin // 9, None):
            [batch] = copy.__getitems__(positions)
            found |= zip(positions, (group for row in batch.rows for group in row.groups), strict=True)
    seen = {position: group["row"] for position, group in found.items()}
    assert all(found[position] == {**whole[number], "row": number} for position, number in seen.items())
    expected = places(stream.order, 0)
    assert all(stream.starts[expected[p][0]] + expected[p][1] == number for p, number in seen.items())
    assert set(seen) >= set(range(51, 101)) and len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_that_nobody_asks_for_are_not_parsed(kind, monkeypatch):
    path = write(f"rows{kind}", [row(i) for i in range(200)])
    parsed = []
    monkeypatch.setattr(files, "parse_object", lambda text: parsed.append(text) or json.loads(text))
    assert sum(1 for _ in unread_rows(path, 150)) == 50 and not parsed
    assert next(unread_rows(path, 199))()


def test_dropped_rows_leave_their_place_and_are_counted_once():
    rows = [row(i) for i in range(20)]
    rows[3]["completions"] = ["same", "same", "same"]
    rows[15]["scores"] = [1]
    paths = [write("a.jsonl", rows[:10]), write("b.jsonl", rows[10:])]
    stream, report = prepared(paths, on_bad_row="drop")
    stream.order = ShardOrder(stream.lengths, shuffle=False)
    for _ in range(2):  # epochs
        for positions in ShardBatches(20, size=1):
            [batch] = stream.__getitems__(positions)
            assert [len(r.groups) for r in batch.rows] == [int(positions[0] not in (3, 15))]
            stream.take_note(batch)
    assert (report.rows, report.groups, report.dropped) == (20, 18, 2)
    assert "train, b.jsonl, row 5: 'scores' has 1 number" in report.dropped_because["15"]


def test_a_bad_row_is_raised_where_the_batch_is_used():
    stream, _ = prepared([write("a.jsonl", [row(0)]), write("b.jsonl", [row(1), {**row(2), "scores": []}])])
    [batch] = stream.__getitems__([2])
    with pytest.raises(BadRow, match=r"^train, b\.jsonl, row 1: "):
        stream.take_note(batch)


def test_a_file_that_changes_is_counted_anew_and_one_that_shrinks_is_said():
    path = write("a.jsonl", [row(i) for i in range(5)])
    assert shards.lengths_of([path]).tolist() == [5]
    write("a.jsonl", [row(i) for i in range(7)])
    stream, _ = prepared([path])
    assert len(stream) == 7
    write("a.jsonl", [row(i) for i in range(2)])
    [batch] = stream.__getitems__([6, 5, 4, 3])
    with pytest.raises(BadRow, match=r"a\.jsonl ends before its row 2, expected 7 rows"):
        stream.take_note(batch)


def test_a_broken_file_is_said_before_training():
    path = write("a.jsonl.gz", [row(i) for i in range(500)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileProblem, match=r"a\.jsonl\.gz"):
        prepared([path])


# ---------------------------------------------------------------------------------------------------------- log-probs


def test_log_probs_come_back_with_their_rows_and_know_their_tokens(tmp_path):
    stream, _ = prepared([write("a.jsonl", [row(i) for i in range(30)])])
    rows = [found for [found] in stream.rows_of(0)]
    logps = [[-1.0 - i, *[-2.5] * (len(r.groups[0]["scores"]) - 1)] for i, r in enumerate(rows)]
    file = tmp_path / "a.parquet"
    with file.open("wb") as out:
        writer = LogpsWriter(out, {"size": 1})
        for at in range(0, 30, 8):  # a row group each
            writer.write([[(r.groups[0], kept)] for r, kept in zip(rows[at : at + 8], logps[at : at + 8], strict=True)])
        writer.close()
    for start in (0, 5, 8, 29, 30):
        assert [kept for _, [kept] in read_logps(file, start)] == logps[start:]
    stream.references = [file]
    assert [group["ref_logps"] for group in stream] == logps
    [batch] = stream.__getitems__([7, 3])
    assert [r.groups[0]["ref_logps"] for r in batch.rows] == [logps[7], logps[3]]
    stream.references = None

    keys, kept = next(read_logps(file))
    with pytest.raises(BadRow, match=r"a\.jsonl, row 0: its tokens are not those .* Remove that file and run"):
        add_logps([{**rows[0].groups[0], "prompt_ids": [1]}], keys, kept, "a.jsonl, row 0", file)
    with pytest.raises(BadRow, match="its tokens are not those"):
        add_logps([], keys, kept, "a.jsonl, row 0", file)


def test_a_dataset_in_memory_is_no_stream_of_files():
    stream, _ = prepare_groups(
        Dataset.from_list([row(0)]).to_iterable_dataset(),
        TOKENIZER,
        max_length=None,
        max_prompt_length=None,
        on_bad_row="raise",
    )
    assert not isinstance(stream, ShardedGroups)
