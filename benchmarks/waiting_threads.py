"""How long a command takes by how long its threads spin before they sleep, alone and beside busy processes.

    python benchmarks/waiting_threads.py [--counts unset 20000 2000 200 0] [--busy 0 2 6] [--rounds 3]

At the end of each operation the threads of OpenMP wait for each other, and spin ``GOMP_SPINCOUNT`` times before they
sleep (libgomp's own choice where it is unset). A row is the median of the seconds of ``contrastive-align reward
--max_steps=15``; the counts take turns. Some 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager


COMMAND = [sys.executable, "-m", "contrastive_align", "reward", "--max_steps=15"]
# All variables that say how threads wait, or how many there are, so that a run has those of its row alone.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep ``n`` processes busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds(count: str) -> float:
    """Run the command with a spin count, in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    # The command leaves an OMP_WAIT_POLICY that it finds as it is, an empty one says nothing to libgomp.
    environment |= {"OMP_WAIT_POLICY": ""} if count == "unset" else {"GOMP_SPINCOUNT": count}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(COMMAND, cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", default=["unset", "20000", "2000", "200", "0"])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2, 6], help="busy processes beside the command")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    print(f"| busy processes | {' | '.join(args.counts)} |")
    print(f"|---|{'---|' * len(args.counts)}", flush=True)
    for n in args.busy:
        with busy_processes(n):
            rounds = [[seconds(count) for count in args.counts] for _ in range(args.rounds)]
        medians = (f"{statistics.median(each):.1f}" for each in zip(*rounds, strict=True))
        print(f"| {n} | {' | '.join(medians)} |", flush=True)


if __name__ == "__main__":
    main()
