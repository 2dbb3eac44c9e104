"""What report.html costs at the end of a run of 100,000 logged steps: seconds, memory and size.

    python benchmarks/page.py

The curves are those that a run keeps while it logs; "rebuild" reads ``log.jsonl`` instead, as ``report RUN`` does.
"""

import json
import resource
import tempfile
import time
from pathlib import Path

from contrastive_align.report.history import LOG_FILE, History, read_history
from contrastive_align.report.page import RunView, write_page


STEPS = 100_000
NAMES = ["loss", "grad_norm", "learning_rate", "entropy", "rewards/margins", "rewards/accuracies", "logps/best_delta"]
NAMES += [
    "rewards/pair_accuracies",
    "rewards/kendall_tau",
    "logps/rest_delta",
    *(f"rewards/rank_{k}" for k in range(8)),
]
NAMES += [f"unseen/{k}" for k in range(12)]


def entries():
    for step in range(STEPS):
        yield {"step": step} | {name: (step * (k + 7) % 1013) / 1013 for k, name in enumerate(NAMES)}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    stage = {"name": "before", "step": 0, "texts": ["a text " * 200] * 10, "rewards": [0.5] * 10, "lengths": [400] * 10}
    stage |= {"ended": [True] * 10}
    samples = {"about": "", "prompts": ["a prompt " * 60] * 10, "reward_name": "reward", "moved": {}}
    samples |= {"stages": [stage, {**stage, "texts": ["another text " * 200] * 10}]}
    history = History(entries())
    with tempfile.TemporaryDirectory() as folder:
        base, started, cpu = peak(), time.perf_counter(), time.process_time()
        path = write_page([RunView("run", {}, history, samples)], Path(folder) / "report.html")
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
        size = path.stat().st_size / 1e6
        print(f"end of a run: {seconds:.2f} s ({used:.2f} s CPU), {peak() - base:.0f} MB more, page {size:.2f} MB")
        with (Path(folder) / LOG_FILE).open("w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries())
        cpu, base = time.process_time(), peak()
        write_page([RunView("run", {}, read_history(folder), samples)], Path(folder) / "report.html")
        print(f"rebuild of {STEPS:,} logged steps: {time.process_time() - cpu:.1f} s CPU, {peak() - base:.0f} MB more")


if __name__ == "__main__":
    main()
