"""benchmarks/stream.py on 3,000 groups: each once an epoch, on one process and then on two."""

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from contrastive_align.launch import cli


GROUPS, PER_STEP = 3000, 256
STEPS = -(-GROUPS // PER_STEP)


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    yield importlib.import_module("stream")
    sys.modules.pop("stream")


def test_each_group_once_an_epoch_through_a_stop_and_on_another_number_of_processes(stream, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    stream.write_shards(tmp_path / "data", GROUPS, 6)
    stream.write_model(tmp_path / "model")
    flags = [f"--{name}={str(value).lower()}" for name, value in stream.QUIET.items() if name != "optim"]
    told = ["--per_device_train_batch_size=256", f"--dataset_name={tmp_path / 'data'}", *flags]
    assert cli.main(["reference", f"--model_name_or_path={tmp_path / 'model'}", *told])["groups"] == GROUPS
    assert stream.live_gap(tmp_path, 200)[1] < 1e-6

    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}
    one = {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 2}
    stream.train(tmp_path, "first", max_steps=STEPS - 4, **one, **options)
    for checkpoint in (tmp_path / "run").glob(f"checkpoint-{STEPS - 4}"):
        shutil.rmtree(checkpoint)  # so that two processes make the last steps again
    status = stream.start(
        tmp_path, "second", 2, rows_per_step=PER_STEP, resume=True, dataloader_num_workers=2, **options
    )
    assert status == 0, (tmp_path / "second.err").read_text()[-3000:]
    runs = [stream.steps_of(tmp_path, name) for name in ("first", "second")]
    assert sorted(runs[1]) == list(range(5, 2 * STEPS))
    found = stream.check_ids(runs, GROUPS, 2, STEPS)
    assert found == {"missing": 0, "twice": 0, "steps again": STEPS - 4 - 5 - 1, "of them other": 0}
