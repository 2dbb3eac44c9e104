"""A judge at an endpoint where a fifth of all calls fail: what is answered, what a restart repeats, how long it takes.

python benchmarks/judge.py                     # 1,000 items, 16 calls in flight, 50 ms a reply
python benchmarks/judge.py --items 100 --share 0

Two times to compare with, from the calls that the server saw:

- ideal: calls * latency / concurrency, as if a fault were an answer like any other;
- with calls that hang at their timeout: those hold their place for the timeout, not the latency.

What stays above the second is CPU time and the end of the run, when the last items that failed, or failed several times
in a row, wait for their back-off and Retry-After and nothing else is left to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

from contrastive_align.judge.judge import Judge


SERVER = Path(__file__).parents[1] / "tests" / "judge_server.py"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.2, help="of calls that fail, in eight ways")
    parser.add_argument("--latency", type=float, default=0.05, help="of the server, seconds")
    parser.add_argument("--timeout", type=float, default=1.0, help="of a call, seconds")
    parser.add_argument("--retry-after", type=float, default=0.5, help="what the server asks for, seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    flags = ("share", "latency", "retry_after", "seed")
    command = [sys.executable, str(SERVER)]
    command += [part for name in flags for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(table(measure(args, server, folder)))
    finally:
        server.stdin.close()
        server.wait(10)


def measure(args: argparse.Namespace, server: subprocess.Popen, folder: str) -> dict[str, object]:
    url = server.stdout.readline().strip()
    options = {"model": "judge", "answers": "text", "cache": folder, "base_url": url, "timeout": args.timeout}
    prompts = [f"question {i}" for i in range(args.items)]
    completions = [f"answer {i}" for i in range(args.items)]
    import openai  # noqa: F401  its import is not what is measured

    judge = Judge("feedback", concurrency=args.concurrency, **options)
    start, cpu = time.perf_counter(), time.process_time()
    verdicts = judge(prompts, completions)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    seen, report = counts_of(server), judge.report()

    restarted = Judge("feedback", concurrency=args.concurrency, **options)
    start = time.perf_counter()
    again = restarted(prompts, completions)
    seconds_again = time.perf_counter() - start
    calls_again = sum(counts_of(server)["served"].values()) - sum(seen["served"].values())

    calls, hung = sum(seen["served"].values()), seen["served"].get("hang", 0)
    ideal = calls * args.latency / args.concurrency
    own_waits = ideal + hung * (args.timeout - args.latency) / args.concurrency
    lost = report["unparsable"] + report["failed"]
    return {
        "items": args.items,
        "answered": report["answered"],
        "unparsable twice, left out": report["unparsable"],
        "failed": report["failed"],
        "unaccounted": args.items - report["answered"] - lost,
        "calls counted / seen by the server": f"{report['calls']} / {calls}",
        "of them faults": ", ".join(f"{n} {kind}" for kind, n in sorted(seen["served"].items()) if kind != "good"),
        "seconds": round(seconds, 2),
        "ideal: calls * latency / concurrency": f"{ideal:.2f} s, ratio {seconds / ideal:.2f}",
        "with calls that hang at their timeout": f"{own_waits:.2f} s, ratio {seconds / own_waits:.2f}",
        "the judge's own CPU time": f"{cpu:.2f} s, {1000 * cpu / calls:.1f} ms a call",
        "calls after a restart": calls_again,
        "seconds after a restart": round(seconds_again, 2),
        "same verdicts after a restart": again == verdicts,
    }


def counts_of(server: subprocess.Popen) -> dict[str, dict[str, int]]:
    server.stdin.write("\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def table(rows: dict[str, object]) -> str:
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    main()
