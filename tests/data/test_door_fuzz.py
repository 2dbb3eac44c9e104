"""A few dozen mutated data sets through the door: each is read as it stands, or refused with a sentence of ours."""

import sys
from collections import Counter
from pathlib import Path

import pytest


SEED = 0
CASES = 35


@pytest.fixture
def door_fuzz(monkeypatch):
    """benchmarks/ is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import door_fuzz

    yield door_fuzz
    sys.modules.pop("door_fuzz")


def test_no_mutated_file_crashes_or_is_read_wrongly(door_fuzz, tmp_path):
    found = door_fuzz.run_cases(SEED, range(CASES), tmp_path)

    told = {door_fuzz.describe(SEED, number): outcome for number, outcome in door_fuzz.faults(found).items()}
    assert not told
    kinds = Counter(outcome.kind for outcome in found.values())
    assert sum(kinds.values()) == CASES
    assert kinds["groups"] > CASES // 3 and kinds["refused"] > CASES // 8


def test_a_case_is_the_same_each_time(door_fuzz):
    first, again = (door_fuzz.make_case(SEED, 7) for _ in range(2))
    assert (first.rows, first.mutations, first.format) == (again.rows, again.mutations, again.format)


@pytest.mark.parametrize("part", ["scores", "completion_ids"])
def test_a_group_that_differs_from_its_row_is_seen(door_fuzz, tmp_path, monkeypatch, part):
    through = door_fuzz.through_the_door

    def turned(*args):
        return {
            split: ([{**row, part: row[part][::-1]} for row in rows], lost)
            for split, (rows, lost) in through(*args).items()
        }

    monkeypatch.setattr(door_fuzz, "through_the_door", turned)
    [outcome] = door_fuzz.run_cases(SEED, [0], tmp_path).values()  # case 0 has no mutation
    assert outcome.kind == "wrong"
