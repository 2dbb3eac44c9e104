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
        first = [str(runs[1][1])] if runs else []
        done = subprocess.run(
            [sys.executable, *launch, str(WORKER), model, str(out), *first],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (out / "said").write_text(done.stderr)
        runs[processes] = (json.loads((out / "results.json").read_text()), out)
    return runs


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(outcomes, case):
    (one, out_one), (two, out_two) = outcomes[1], outcomes[2]
    a, b = torch.load(out_one / f"{case}.pt"), torch.load(out_two / f"{case}.pt")
    assert {n.removeprefix("module.") for n in b} == set(a)
    assert max((a[n.removeprefix("module.")] - p).abs().max().item() for n, p in b.items()) < 1e-6
    assert len(one[case]["log"]) == len(two[case]["log"]) == CASES[case].get("steps", 8)
    if "like" in CASES[case]:
        whole = torch.load(out_one / f"{CASES[case]['like']}.pt")
        assert max((whole[n] - p).abs().max().item() for n, p in a.items()) < 1e-6
    for name in METRICS:
        first, second = ([entry.get(name, 0.0) for entry in run[case]["log"]] for run in (one, two))
        assert second == pytest.approx(first, rel=1e-4, abs=5e-6), name
    # A float32 log-prob of -90 has steps of 8e-6, which beta = 0.1 leaves in the rewards.
    assert two[case]["eval"] == pytest.approx(one[case]["eval"], rel=1e-4, abs=5e-6)


def test_two_processes_say_a_thing_once(outcomes):
    one, two = ((outcomes[n][1] / "said").read_text().count("makes the labels one-hot") for n in (1, 2))
    assert one == two > 1


def test_every_process_has_the_same_auto_temperature(outcomes):
    (alone,), together = (outcomes[processes][0]["auto_temperature"]["temperatures"] for processes in (1, 2))
    assert together == [alone, alone] and 0.01 < alone < 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", ["tokens", "tokens_alone"])
def test_batches_by_tokens_train_on_every_group_once_a_pass(outcomes, case, processes):
    """What is repeated weighs nothing, and the loss of a step is the mean over its groups."""
    run = outcomes[processes][0][case]
    seen, steps = run["seen"], len(run["log"])
    groups = CASES[case].get("groups", 26)
    for steps_of_pass in (range(steps // 2), range(steps // 2, steps)):
        counted = [group for step, group, weight, _ in seen if step in steps_of_pass and weight]
        assert sorted(counted) == list(range(groups))
    assert {weight for *_, weight, _ in seen} == ({0.0, 1.0} if (case, processes) == ("tokens_alone", 2) else {1.0})
    for number, entry in enumerate(run["log"]):
        losses = [loss for step, _, weight, loss in seen if step == number and weight]
        assert entry["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
