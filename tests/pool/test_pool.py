"""The pool: what is kept and labelled, a function of the files; what survives a kill; what a damaged folder says."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from contrastive_align.pool import NEW, Pool, Sample, keep, quantiles
from contrastive_align.pool import files as rounds


def sample(round_=1, prompt_index=0, k=0, *, score=0.0, **changes):
    text = f"round {round_}, prompt {prompt_index}, completion {k} {{}} ü"
    ids = [round_, prompt_index, *range(k + 1)]
    fields = (f"prompt {prompt_index}", ids, text, score, None, True, prompt_index, k, round_, 100 * (round_ - 1))
    return dataclasses.replace(Sample(*fields), **changes)


def make(round_, n_prompts=3, k=4, **changes):
    rng = np.random.default_rng(round_)
    scores = rng.normal(size=(n_prompts, k)).round(1)
    return [sample(round_, p, j, score=float(scores[p, j]), **changes) for p in range(n_prompts) for j in range(k)]


def halves(table):
    return quantiles(table.score, n=2)


def filled(folder, n=3, **options):
    pool = Pool(folder, label=halves, **options)
    for number in range(1, n + 1):
        pool.add(make(number))
    return pool


def state(pool, through=None):
    table = pool.table(through)
    return [column.tolist() for column in (table.round, table.row, table.label)]


# ------------------------------------------------------------------------------------------------------- what it holds


def test_what_was_added_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "BATCH", 5)  # several batches a file
    chat = [{"role": "system", "content": "ü"}, {"role": "user", "content": "{x}"}]
    first = make(1)
    first[1] = sample(1, 0, 1, score=None, feedback="not helpful", finished=False, prompt=chat)
    first[2] = sample(1, 0, 2, score=-np.inf, completion_ids=[], completion="")
    pool = Pool(tmp_path, label=halves)
    pool.add(iter(first))
    pool.add(make(2))
    everything = first + make(2)
    assert len(pool) == 24 and [pool[i] for i in range(24)] == everything
    order = np.random.default_rng(0).integers(0, 24, 60)
    assert pool.read(order) == [everything[i] for i in order]
    assert pool.rounds == [1, 2] and pool.steps == {1: 0, 2: 100}
    table = pool.table()
    assert table.prompt_index.tolist() == [s.prompt_index for s in everything]
    assert table.length.tolist() == [len(s.completion_ids) for s in everything]
    assert table.finished.tolist() == [s.finished for s in everything]
    assert table.score.dtype == np.float64 and np.isnan(table.score[1]) and table.score[2] == -np.inf


def test_nan_is_no_score(tmp_path):
    pool = Pool(tmp_path, label=halves)
    pool.add([sample(score=float("nan")), sample(k=1), sample(k=2, score=1.0)])
    assert pool[0].score is None and pool.table().label.tolist() == [-1, 1, 0]


def test_feedback_is_coded(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "BATCH", 2)
    pool = Pool(tmp_path, label=lambda table: np.zeros(len(table), int), drop_factor=1)
    pool.add([sample(1, 0, k, feedback=f) for k, f in enumerate(["b", None, "a", "b", "c"])])
    assert pool.table().feedback_codes.tolist() == [0, -1, 1, 0, 2]
    pool.add([sample(2, 0, k, feedback=f) for k, f in enumerate(["d", "a"])])
    assert pool.table().feedback_codes.tolist() == [3, 1] and pool.table().feedback_values == ["b", "a", "c", "d"]


# ------------------------------------------------------------------------------------------------------- what is kept


def test_nothing_is_dropped_and_all_are_ranked_again(tmp_path):
    pool = filled(tmp_path)
    scores = [s.score for r in (1, 2, 3) for s in make(r)]
    assert pool.table().label.tolist() == quantiles(scores, n=2).tolist()
    assert pool.table(2).label.tolist() == quantiles(scores[:24], n=2).tolist()


def test_only_the_newest_round_is_kept(tmp_path):
    pool = filled(tmp_path, drop_factor=1)
    assert pool.table().round.tolist() == [3] * 12
    assert pool.table().label.tolist() == quantiles([s.score for s in make(3)], n=2).tolist()


def test_each_round_is_thinned_by_the_labels_of_the_round_before(tmp_path):
    pool = filled(tmp_path, drop_factor=0.5, seed=9)
    kept, labels = [], np.array([], dtype=int)
    for number in (1, 2, 3):  # by hand
        stays = keep(labels, drop_factor=0.5, rng_seed=(9, number))
        kept = [s for s, stay in zip(kept, stays, strict=True) if stay] + make(number)
        labels = quantiles([s.score for s in kept], n=2)
    assert pool.read(range(len(pool))) == kept and pool.table().label.tolist() == labels.tolist()
    assert sum(pool.counts()[3].values()) == 12 and 18 < len(kept) < 24
    assert state(filled(tmp_path / "other", drop_factor=0.5, seed=8)) != state(pool)


def test_the_label_function_sees_the_labels_of_the_round_before(tmp_path):
    seen = []

    def label(table):
        seen.append(table.label.tolist())
        return np.arange(len(table)) % 2

    pool = Pool(tmp_path, label=label, drop_factor=0.5)
    pool.add([sample(1, 0, k) for k in range(4)])
    pool.add([sample(2, 0, k) for k in range(2)])
    pool.table()
    assert seen[0] == [NEW] * 4 and sorted(seen[1]) == [NEW, NEW, 0, 1]


def test_counts_by_round_and_label(tmp_path):
    pool = Pool(tmp_path, label=lambda table: np.where(np.isnan(table.score), -1, table.row % 2))
    pool.add([sample(1, 0, k, score=None if k == 4 else 0.0) for k in range(5)])
    pool.add([sample(2, 0, 0)])
    assert pool.counts() == {1: {-1: 1, 0: 2, 1: 2}, 2: {0: 1}}
    assert pool.counts(through=1) == {1: {-1: 1, 0: 2, 1: 2}}


def test_draws_are_balanced(tmp_path):
    pool = filled(tmp_path)
    indices, labels = pool.draws(10, seed=(0, 1))
    assert labels.tolist() == [0, 1] * 5 and pool.table().label[indices].tolist() == labels.tolist()
    assert (pool.draws(10, seed=(0, 1))[0] == indices).all()
    assert max(pool.draws(50, 0, through=1)[0]) < 12


# --------------------------------------------------------------------------------------- a function of files and seed


@pytest.mark.parametrize("drop_factor", [0.0, 0.3, 1.0])
def test_the_state_is_that_of_the_files(tmp_path, drop_factor):
    pool = Pool(tmp_path, label=halves, drop_factor=drop_factor, seed=4)
    reader = Pool(tmp_path, label=halves, drop_factor=drop_factor, seed=4)
    states = []
    for number in (1, 2, 3, 4):
        pool.add(make(number))
        states.append(state(pool))
    for through in (3, 1, 4, 2):
        again = Pool(tmp_path, label=halves, drop_factor=drop_factor, seed=4)
        assert state(again, through) == state(pool, through) == states[through - 1]
    assert reader.rounds == [] and len(reader) == 0
    reader.reload()
    assert state(reader) == states[-1]


def test_reload_sees_a_round_that_was_written_anew(tmp_path):
    pool = filled(tmp_path, n=2)
    (tmp_path / "round-00002.arrow").unlink()
    other = Pool(tmp_path, label=halves)
    other.add([sample(2, 7, k, score=float(k)) for k in range(4)])
    pool.reload()
    assert state(pool) == state(other) and pool[12].prompt_index == 7


# -------------------------------------------------------------------------------------------------------------- kills


def test_a_kill_before_the_rename_loses_the_round_in_progress_only(tmp_path, monkeypatch):
    pool = filled(tmp_path, n=2)
    before = state(pool)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", killed)  # nothing cleans up after a kill
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            pool.add(make(3))
    left = list(tmp_path.glob("*.tmp"))
    assert len(left) == 1 and left[0].stat().st_size > 1000
    (tmp_path / "round-00003.arrow.77.tmp").write_bytes(left[0].read_bytes()[:500])

    pool = Pool(tmp_path, label=halves)
    assert pool.rounds == [1, 2] and state(pool) == before
    pool.add(make(3))
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"round-0000{r}.arrow" for r in (1, 2, 3)]
    assert state(pool) == state(filled(tmp_path / "never killed"))


def test_a_round_with_an_error_leaves_nothing_behind(tmp_path):
    pool = filled(tmp_path, n=1)
    with pytest.raises(ValueError, match="sample 12"):
        pool.add([*make(2), sample(3)])
    assert [x.name for x in tmp_path.iterdir()] == ["round-00001.arrow"] and pool.rounds == [1]
    pool.add(make(2))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's file that is always full")
@pytest.mark.parametrize("buffering", [0, -1])  # it is full when something is written, or when the file is closed
def test_a_full_disk_leaves_the_rounds_before_and_says_what_to_do(tmp_path, monkeypatch, buffering):
    pool = filled(tmp_path, n=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path, mode):
        path.touch()
        return open("/dev/full", mode, buffering=buffering)

    monkeypatch.setattr(Path, "open", full)
    how = r"round-00002\.arrow was not written: No space left on device\. Make room.* resume_from_checkpoint=True"
    with pytest.raises(OSError, match=how) as raised:
        pool.add(make(2))
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    pool.add(make(2))
    assert pool.rounds == [1, 2]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "pool"):
        with pytest.raises(OSError, match=r"cannot be made: .* Give another pool_dir or output_dir"):
            Pool(folder, label=halves)


def test_a_folder_that_takes_no_files(tmp_path):
    pool = Pool(tmp_path / "pool", label=halves)
    pool.check_writable()
    assert list(tmp_path.glob("pool/*")) == []
    (tmp_path / "pool").rmdir()
    with pytest.raises(OSError, match="pool takes no new round: No such file or directory"):
        pool.check_writable()


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    filled(tmp_path, n=1)
    assert calls == ["fsync", "replace", "fsync"]


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_missing_round_is_named(tmp_path):
    filled(tmp_path)
    (tmp_path / "round-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"round-00002\.arrow is missing, although round 3.*back to round 1 by"):
        Pool(tmp_path, label=halves)


@pytest.mark.parametrize("damage", ["empty", "truncated", "other", "zeros"])
def test_a_damaged_round_is_named(tmp_path, damage):
    filled(tmp_path)
    path = tmp_path / "round-00002.arrow"
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": whole[:-20], "other": b"{}" * 500, "zeros": whole[:200] + bytes(len(whole) - 200)}[
            damage
        ]
    )
    with pytest.raises(ValueError, match=r"round-00002\.arrow cannot be read: .*all later.*after round 1"):
        Pool(tmp_path, label=halves)


def test_a_file_with_other_columns(tmp_path):
    import pyarrow as pa

    table = pa.table({"prompt": ["a"]})
    with pa.ipc.new_file(str(tmp_path / "round-00001.arrow"), table.schema) as writer:
        writer.write(table)
    with pytest.raises(ValueError, match=r"columns are \['prompt'\], expected \['prompt', 'conv"):
        Pool(tmp_path, label=halves)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample(2), sample(3)], r"round 2, sample 1: 'round' is 3, expected 2"),
        ([sample(1)], r"sample 0: 'round' is 1, expected 2"),
        ([sample(2), sample(2, step=7)], r"sample 1: 'step' is 7, expected 100.*same weights"),
        ([], "Round 2 has no samples"),
        ([sample(2, prompt=3)], "'prompt' is 3, expected text or a list of messages"),
        ([sample(2), sample(2, feedback=3)], "round 2, sample 1: 'feedback' is 3, expected text or None"),
        ([sample(2, completion_ids=[1, 1.5])], r"'completion_ids' is \[1, 1.5\], expected ints"),
        ([sample(2, completion=None)], "'completion' is None, expected text"),
        ([sample(2, score="1")], "'score' is '1', expected a number or None"),
    ],
)
def test_samples_that_are_no_round(tmp_path, samples, message):
    pool = filled(tmp_path, n=1)
    with pytest.raises(ValueError, match=message):
        pool.add(samples)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_round_of_another_process_is_not_overwritten(tmp_path):
    pool, other = filled(tmp_path, n=1), Pool(tmp_path, label=halves)
    other.add(make(2))
    with pytest.raises(ValueError, match=r"already has round 2: call reload"):
        pool.add(make(2))


def test_rounds_that_are_not_there(tmp_path):
    pool = Pool(tmp_path / "new" / "folder", label=halves)
    with pytest.raises(ValueError, match=r"Round 0 is not in .* rounds \[\]"):
        pool.table()
    pool.add(make(1))
    for through in (0, 2):
        with pytest.raises(ValueError, match=rf"Round {through} is not in .* rounds \[1\]"):
            pool.table(through)
    with pytest.raises(IndexError):
        pool[12]


@pytest.mark.parametrize("label", [lambda t: t.score, lambda t: np.zeros(3, int), lambda t: np.full(len(t), -2)])
def test_labels_are_checked(tmp_path, label):
    pool = Pool(tmp_path, label=label)
    pool.add(make(1))
    with pytest.raises(ValueError, match=r"label function returned .* expected an integer for each of 12 samples"):
        pool.table()


def test_drop_factor_is_checked_at_once(tmp_path):
    with pytest.raises(ValueError, match="drop_factor is 2"):
        Pool(tmp_path, label=halves, drop_factor=2)
