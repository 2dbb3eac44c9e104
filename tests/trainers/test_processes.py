"""What processes of a run do when one ends."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from contrastive_align.trainers.processes import EndsWorkers


class LargeRows(torch.utils.data.Dataset):
    """Rows of which a pipe holds none."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return bytes(2**20)


def read_one(told):
    loader = torch.utils.data.DataLoader(LargeRows(), num_workers=1, prefetch_factor=32, collate_fn=list)
    EndsWorkers().on_train_begin(None, None, None, train_dataloader=loader)
    rows = iter(loader)
    next(rows)
    told.send(multiprocessing.active_children()[0].pid)
    time.sleep(60)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
def test_workers_end_with_a_process_that_is_killed():
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=read_one, args=(theirs,))
    process.start()
    theirs.close()
    worker = ours.recv()
    assert is_alive(worker)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    still_there = is_alive(worker)
    if still_there:
        os.kill(worker, signal.SIGKILL)
    assert not still_there
