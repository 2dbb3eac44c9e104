"""Two processes give what one gives: weights, losses and metrics, rows repeated to fill the last batch left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES


WORKER = Path(__file__).with_name("distributed_worker.py")
METRICS = ("loss", "rewards/rank_0", "rewards/rank_1", "rewards/margins", "logps/best", "entropy", "groups/no_signal")


@pytest.fixture(scope="module")
def outcomes(tiny_llama, tmp_path_factory):
    model, runs = tiny_llama(), {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"on_{processes}")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launch, str(WORKER), model, str(out)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        runs[processes] = (json.loads((out / "results.json").read_text()), out)
    return runs


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(outcomes, case):
    (one, out_one), (two, out_two) = outcomes[1], outcomes[2]
    a, b = torch.load(out_one / f"{case}.pt"), torch.load(out_two / f"{case}.pt")
    assert {n.removeprefix("module.") for n in b} == set(a)
    assert max((a[n.removeprefix("module.")] - p).abs().max().item() for n, p in b.items()) < 1e-6
    assert len(one[case]["log"]) == len(two[case]["log"]) == 8
    if case == "resumed":
        plain = torch.load(out_one / "plain.pt")
        assert max((plain[n] - p).abs().max().item() for n, p in a.items()) < 1e-6
    for name in METRICS:
        first, second = ([entry.get(name) for entry in run[case]["log"]] for run in (one, two))
        assert second == pytest.approx(first, rel=1e-4, abs=5e-6), name
    # A float32 log-prob of -90 has steps of 8e-6, which beta = 0.1 leaves in the rewards.
    assert two[case]["eval"] == pytest.approx(one[case]["eval"], rel=1e-4, abs=5e-6)
