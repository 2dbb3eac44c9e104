"""Runs killed with SIGKILL end as undisturbed ones: four of those that ``benchmarks/kill.py`` makes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill.py"


@pytest.fixture
def kill(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import kill

    yield kill
    sys.modules.pop("kill")


def test_four_killed_runs_end_with_the_weights_of_undisturbed_ones():
    """In a process of its own: it forks, which a process with threads should not."""
    flags = ["--one_each", "--command", "reward", "conditional", "online"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *flags], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same weights") == 4 and "4 kills, 0 that did not end" in done.stdout


def test_each_kind_of_moment_comes_often_enough(kill):
    moments = {command: {kind: [3, 4] for kind in kill.KINDS} for command in kill.COMMANDS}
    for command in ("reward", "preference", "fdpg"):
        moments[command]["round"] = []
    planned = list(kill.plan(50, moments, random.Random(0)))
    assert len(planned) == 50 and {command for command, *_ in planned} == set(kill.COMMANDS)
    assert all(sum(kind == found for _, found, _ in planned) >= 5 for kind in kill.KINDS)


def test_weights_that_differ_are_seen(kill, tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 1e-7)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    assert kill.same(tmp_path / "a", tmp_path / "b") == ""
    assert kill.same(tmp_path / "a", tmp_path / "c") == "1 of 1 weights differ, by 1.2e-07 at most"
