"""A million samples in the pool of conditional training: memory, disk, time to reopen, time to draw.

python benchmarks/pool.py                       # 1,000,000 samples in 10 rounds, 8 of a prompt, about 50 tokens each
python benchmarks/pool.py --samples 100000

"anonymous" memory is what the process must hold. "mapped" pages are those of the files, which the system gives away
when it needs them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

import numpy as np

from contrastive_align.conditions import resolve_condition
from contrastive_align.pool import Pool, Sample


K = 8
PROMPTS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--drop-factor", type=float, default=0.0)
    args = parser.parse_args()

    condition = resolve_condition("phrases")
    options = {"label": condition.label, "drop_factor": args.drop_factor}
    with tempfile.TemporaryDirectory() as folder:
        start = memory()
        pool = Pool(folder, **options)
        report("before", start, 0)
        seconds = clock(lambda: [pool.add(samples(r, args.samples // args.rounds)) for r in range(1, args.rounds + 1)])
        report(f"{args.samples:,} samples written in {args.rounds} rounds", start, seconds)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"{size / 1e6:.0f} MB on disk, {size / args.samples:.0f} bytes a sample")
        del pool
        pool = Pool.__new__(Pool)
        report("reopened", start, clock(lambda: pool.__init__(folder, **options)))
        seconds = clock(pool.table)
        report(f"labelled, {len(pool):,} kept", start, seconds)
        drawn = []
        report(f"{args.draws:,} draws", start, clock(lambda: drawn.append(pool.draws(args.draws, seed=0)[0])))
        report("read, 256 at a time", start, clock(lambda: read(pool, drawn[0])))


def read(pool: Pool, indices: np.ndarray) -> None:
    for i in range(0, len(indices), 256):
        pool.read(indices[i : i + 256])


def samples(round_: int, n: int) -> Iterator[Sample]:
    rng = np.random.default_rng(round_)
    for i in range(n):
        ids = rng.integers(0, 32_000, rng.integers(36, 65)).tolist()
        prompt, k = i // K % PROMPTS, i % K
        text = "four " * len(ids)  # about five bytes a token
        yield Sample(f"A prompt of a hundred bytes or so, number {prompt}: " + "x" * 50, ids, text, rng.normal(), None,
                     len(ids) < 64, prompt, k, round_, 100 * round_)  # fmt: skip


def memory() -> dict[str, float]:
    """MB, by Linux's /proc."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile", "VmHWM")}


def report(what: str, start: dict[str, float], seconds: float) -> None:
    now = memory()
    grown = {name: now[name] - start[name] for name in now}
    print(
        f"{what:45s} {seconds:8.2f} s   anonymous +{grown['RssAnon']:6.0f} MB   mapped +{grown['RssFile']:6.0f} MB"
        f"   peak of both +{grown['VmHWM']:6.0f} MB",
        flush=True,
    )


def clock(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
