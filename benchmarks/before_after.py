"""A training step of an older checkout and of this one: the ratio of their times, and of their peaks of memory.

    git worktree add ../older COMMIT
    CONTRASTIVE_ALIGN_DATA=path/to/data CONTRASTIVE_ALIGN_MODELS=path/to/models \
        python benchmarks/before_after.py --before ../older --workload synthetic qa --k 2 4 16 [--memory 5]

Each checkout is a process with its own copy of the package and of ``measure.py``, and the model and groups of
``speed.py``. They take turns step by step on the same groups, now one first, now the other, and wait for each other, so
that what else the machine does falls on both alike. A row is the median of the ratios after / before, with the 95%
interval that order statistics give for a median, whatever the distribution. ``--memory`` adds pairs of processes for
the peaks: into how many pieces the heap falls differs from one to the next by some percent, so one pair says little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path


HERE = Path(__file__).resolve().parents[1]
WORKLOADS = "synthetic, qa, gsm8k, or fixed:PROMPT:SHORTEST:LONGEST in tokens"


def worker(task: dict, *, memory: bool) -> None:
    """Do a step whenever a line is read, and print its seconds; or print the peak of memory."""
    sys.path.insert(0, f"{os.getcwd()}/benchmarks")
    import measure

    task = measure.Task(**task | {"rows": [tuple(row) for row in task["rows"]]})
    if memory:
        print(json.dumps(measure.peak_memory(task)), flush=True)
        return
    ((layout, k),) = task.rows
    with measure.trainers_of(task) as (trainers, steps, _):
        trainer = trainers[layout]
        batches = [measure.batch_of(trainer, layout, groups, k, task) for groups in steps]
        print("ready", flush=True)
        for batch in batches:
            sys.stdin.readline()
            print(measure.step(trainer, batch), flush=True)


def start(checkout: Path, task: dict, *more: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", json.dumps(task), *more]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.DEVNULL, **pipes)


def answer(process: subprocess.Popen) -> str:
    """Return the next line that a worker prints, without what the libraries print."""
    for line in process.stdout:
        if line.startswith(("ready", "{")) or line[0].isdigit():
            return line.strip()
    raise RuntimeError(f"a worker ended with {process.wait()}: run it by hand with {process.args}")


def seconds(checkouts: list[Path], task: dict) -> list[list[float]]:
    """Return the seconds of every counted step, of each checkout."""
    workers, found = [start(checkout, task) for checkout in checkouts], [[], []]
    for each in workers:
        answer(each)
    for i in range(task["steps"] + 2):
        for side in (0, 1) if i % 2 else (1, 0):
            workers[side].stdin.write("\n")
            workers[side].stdin.flush()
            found[side].append(float(answer(workers[side])))
    for each in workers:
        each.communicate()
    return [times[2:] for times in found]


def peak_pair(checkouts: list[Path], task: dict) -> list[int]:
    """Return the peak of each checkout, in a process of its own."""
    peaks = []
    for checkout in checkouts:
        measuring = start(checkout, task, "--memory", "1")
        peaks.append(json.loads(answer(measuring))["peak"])
        measuring.communicate()
    return peaks


def interval(values: list[float]) -> tuple[float, float]:
    """Return the narrowest order statistics that contain the median with at least 95%; the extremes of few values.

    >>> interval([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    (1.0, 6.0)
    >>> interval([*range(10)])
    (1, 8)
    """
    ordered, n = sorted(values), len(values)
    cut = 0
    while 2 * sum(math.comb(n, i) for i in range(cut + 2)) / 2**n <= 0.05:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the older checkout")
    parser.add_argument("--workload", nargs="+", default=["synthetic", "qa"], help=WORKLOADS)
    parser.add_argument("--k", nargs="+", type=int, choices=range(2, 17), default=[2, 4], metavar="2..16")
    parser.add_argument("--layout", default="shared", choices=["shared", "padded"])
    parser.add_argument("--steps", type=int, default=9, help="pairs that count, after two more")
    parser.add_argument("--groups", type=int, default=4, help="groups a step")
    parser.add_argument("--size", default="56m")
    parser.add_argument("--memory", type=int, default=0, metavar="PAIRS", help="the peaks too, of so many pairs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(json.loads(args.worker), memory=bool(args.memory))
        return
    if unknown := [w for w in args.workload if not re.fullmatch(r"synthetic|qa|gsm8k|fixed(:\d+){3}", w)]:
        parser.error(f"--workload: found {' and '.join(unknown)}, expected {WORKLOADS}")
    if args.before is None or not (args.before / "benchmarks" / "measure.py").is_file():
        parser.error(f"--before: {args.before} has no benchmarks/measure.py. Give the folder of a checkout.")
    sys.path.insert(0, str(Path(__file__).parent))
    from measure import Task
    from workloads import REAL, find_tokenizer

    checkouts = [args.before.resolve(), HERE]
    print("| workload | K | after / before | its 95% interval | seconds before, after | peak after / before (range) |")
    print("|---|---|---|---|---|---|", flush=True)
    for workload in args.workload:
        for k in args.k:
            task = Task(workload, rows=[(args.layout, k)], steps=args.steps, groups=args.groups, size=args.size)
            task = asdict(task) | ({"tokenizer": find_tokenizer()} if workload in REAL else {})
            before, after = seconds(checkouts, task)
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            low, high = interval(ratios)
            cells = [workload, str(k), f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"]
            cells.append(f"{statistics.median(before):.2f}, {statistics.median(after):.2f}")
            peaks = sorted(b / a for a, b in (peak_pair(checkouts, task) for _ in range(args.memory)))
            cells.append(f"{statistics.median(peaks):.3f} ({peaks[0]:.3f} to {peaks[-1]:.3f})" if peaks else "")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
