"""What report.html costs: seconds, memory and size.

    python benchmarks/page.py                          # at the end of a run of 100,000 logged steps
    python benchmarks/page.py reward --online [...]    # of a command's run: samples, doctor and page, each time

The curves of the first are those that a run keeps while it logs; "rebuild" reads ``log.jsonl`` instead, as ``report
RUN`` does. CPU seconds are of the process, and with OMP_NUM_THREADS=1 of one core. Memory is what the process's peak
rose by: of a run above the peak of its training.
"""

import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from contrastive_align.launch import cli
from contrastive_align.launch.quiet import quiet_imports
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


def long_run():
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


def command_run(argv):
    """Make a run whose parts that serve the page are measured each time they are called."""
    quiet_imports()
    from contrastive_align.launch import common
    from contrastive_align.launch.record import Recorder

    spent = defaultdict(list)

    def measured(cls, name, label):
        inner = getattr(cls, name)

        def outer(self, *args, **kwargs):
            cpu, base = time.process_time(), peak()
            try:
                return inner(self, *args, **kwargs)
            finally:
                spent[label].append((time.process_time() - cpu, peak() - base))

        setattr(cls, name, outer)

    measured(Recorder, "sample", "samples")
    measured(common.Run, "_look_after", "samples after training, and the doctor")
    measured(Recorder, "write_page", "page")
    with tempfile.TemporaryDirectory() as folder:
        cli.main([*argv, f"--output_dir={folder}/run"])
        size = (Path(folder) / "run" / "report.html").stat().st_size / 1e6
    print()
    for label, found in spent.items():
        times = ", ".join(f"{cpu:.2f}" for cpu, _ in found)
        print(f"{label}: {times} s CPU; {', '.join(f'{more:.0f}' for _, more in found)} MB more")
    end = [spent["samples after training, and the doctor"][-1], spent["page"][-1]]
    print(f"end of a run: {sum(cpu for cpu, _ in end):.2f} s CPU, {sum(more for _, more in end):.0f} MB more, ", end="")
    print(
        f"page {size:.2f} MB; in the whole run {sum(cpu for f in ('samples', 'page') for cpu, _ in spent[f]):.2f} s CPU"
    )


if __name__ == "__main__":
    command_run(sys.argv[1:]) if sys.argv[1:] else long_run()
