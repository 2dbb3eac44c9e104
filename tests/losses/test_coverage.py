"""A part of benchmarks/coverage_of_errors.py: what is printed is unbiased, and its error is what it says."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def coverage(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    yield importlib.import_module("coverage_of_errors")
    sys.modules.pop("coverage_of_errors")


@pytest.mark.parametrize(("prompts", "samples"), [(100, 100), (200, 50)])
def test_two_standard_errors_cover_the_truth(coverage, prompts, samples):
    """Of 50 repeats: the mean error is known to 0.14 standard errors, the share that is covered to 0.03."""
    for name, (covered, mean) in coverage.coverage(prompts, samples, 50, seed=5).items():
        assert abs(mean) < 0.5, (name, mean)  # uncorrected: -0.7 to -1.9
        assert covered >= 0.82, (name, covered)
