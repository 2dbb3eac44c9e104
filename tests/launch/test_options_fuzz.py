"""A twentieth of the faulty command lines of the benchmark: each is answered with a sentence that names the fault."""

import sys
from pathlib import Path

import pytest


SEED = 0
CASES = 15


@pytest.fixture
def options_fuzz(monkeypatch):
    """benchmarks/ is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import options_fuzz

    yield options_fuzz
    sys.modules.pop("options_fuzz")


def test_no_fault_passes_in_silence_or_ends_in_a_traceback(options_fuzz, tmp_path):
    found = options_fuzz.run_cases(SEED, range(CASES), tmp_path)
    assert len(found) == CASES and len({case.kind for case, _ in found.values()}) > 5
    assert not options_fuzz.faults(found)


def test_a_case_is_the_same_each_time(options_fuzz):
    assert options_fuzz.make_case(SEED, 7) == options_fuzz.make_case(SEED, 7)


@pytest.mark.parametrize(("stub", "kind"), [(lambda argv: None, "silent"), (lambda argv: 1 / 0, "crash")])
def test_silence_and_tracebacks_are_seen(options_fuzz, tmp_path, monkeypatch, stub, kind):
    monkeypatch.setattr(options_fuzz.cli, "main", stub)
    found = options_fuzz.run_cases(SEED, range(2), tmp_path)
    assert [outcome.kind for _, outcome in found.values()] == [kind, kind]
