"""Two processes of one run, disturbed: no process is left over, and the run goes on to the undisturbed weights.

    python benchmarks/ranks.py [--command reward ...] [--times 1] [--seed 0]
    python benchmarks/ranks.py --quiet [--times 20] [--tests]

Each training command runs on two processes (torchrun, gloo), with checkpoints on the way. In training the launcher
gets SIGTERM or SIGINT, or one process gets SIGTERM or SIGKILL; then the same command line runs with
``--resume_from_checkpoint=true``. With ``--quiet`` nothing is disturbed: each command, or with ``--tests`` each test of
two processes, runs so many times, to see whether one ever ends by a signal of its own, or never. Two busy processes run
beside, so that the order varies (``--busy 0`` where other work keeps the processors busy).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from kill import COMMANDS, QUIET, same, typed, write_data


STEPS = {
    "reward": ["--max_steps=60", "--save_steps=10"],
    "preference": ["--max_steps=60", "--save_steps=10"],
    "fdpg": ["--max_steps=30", "--save_steps=5", "--per_device_train_batch_size=8"],
    "conditional": [
        "--num_train_epochs=8",
        "--save_steps=5",
        "--per_device_train_batch_size=5",
        "--draws_per_round=60",
    ],
    "online": ["--num_rounds=8", "--prompts_per_round=12", "--save_steps=5"],
}
TESTS = (
    "tests/models/test_layout.py::test_weights_sharded_over_two_processes_give_the_same",
    "tests/trainers/test_conditional_trainer.py::test_two_processes_equal_one",
    "tests/trainers/test_conditional_vllm.py::test_two_processes_draw_what_one_does",
    "tests/trainers/test_distributed.py",
    "tests/trainers/test_fdpg_trainer.py::test_two_processes_equal_one",
    "tests/trainers/test_processes.py",
)
ROOT = Path(__file__).parents[1]
SAVING = ["--save_strategy=steps", "--save_total_limit=2", "--logging_steps=1", "--learning_rate=1e-3"]
TROUBLES = ("SIGTERM to the launcher", "SIGINT to the launcher", "SIGTERM to one process", "SIGKILL of one process")


def start(command: str, data: Path, folder: Path, *more: str) -> tuple[subprocess.Popen, Path]:
    log = folder.with_suffix(".log")
    own = [flag.replace("{data}", str(data)) for flag in COMMANDS[command]]
    flags = [*own, *STEPS[command], *SAVING, *QUIET, "--ddp_timeout=60", f"--output_dir={folder}", *more]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*launch, "-m", "contrastive_align", typed(command), *flags], stdout=out, stderr=out, env=environment
        )
    return process, log


def disturb(process: subprocess.Popen, log: Path, trouble: str, wait: float) -> str:
    """Make trouble once training has begun; return what is wrong, or ""."""
    while not re.search(r"^step \d", log.read_text(errors="replace"), re.MULTILINE):
        if process.poll() is not None:
            return f"ended before it trained: {log.read_text(errors='replace')[-600:]}"
        time.sleep(0.05)
    time.sleep(wait)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in family if p.ppid() == process.pid]
    if trouble.endswith("launcher"):
        process.send_signal(getattr(signal, trouble[:7].strip()))
    else:
        ranks[1].send_signal(getattr(signal, trouble[:7]))
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        process.kill()
        return "it did not end within 90 s"
    _, left = psutil.wait_procs(family, timeout=5)
    for orphan in left:
        orphan.kill()
    if left:
        return f"{len(left)} processes are left over"
    said = log.read_text(errors="replace")
    if process.returncode == 0:
        return "exit 0"
    if not trouble.startswith("SIGKILL") and said.count("Stopped by") != 1:
        return f"said 'Stopped by' {said.count('Stopped by')} times: {said[-600:]}"
    return ""


def trial(command: str, data: Path, trouble: str, rng: random.Random) -> str:
    folder = data / f"{command}-run"
    shutil.rmtree(folder, ignore_errors=True)
    problem = disturb(*start(command, data, folder), trouble, rng.uniform(0, 1.5))
    if problem:
        return problem
    checkpoints = len(list(folder.glob("checkpoint-*")))
    process, log = start(command, data, folder, "--resume_from_checkpoint=true")
    if process.wait(300) != 0:
        return f"resumed, exit {process.returncode}: {log.read_text(errors='replace')[-1200:]}"
    return same(data / f"{command}-whole", folder) or ("" if checkpoints else "the same weights, from the beginning")


def failed_tests(times: int) -> int:
    """Run each test of two processes so many times; return the number of runs that failed, or did not end."""
    failures = 0
    for test in TESTS:
        for _ in range(times):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / test)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
                problem = run.returncode and run.stdout[-1200:]
            except subprocess.TimeoutExpired:
                problem = "it did not end within 600 s"
            if problem:
                failures += 1
                print(f"{test}: {problem}", flush=True)
        print(f"{test}: {times} times", flush=True)
    return failures


def busy() -> None:
    while True:
        sum(range(10**6))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="disturb nothing")
    parser.add_argument("--tests", action="store_true", help="with --quiet: the tests of two processes instead")
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside")
    args = parser.parse_args(argv)
    rng, failures, trials = random.Random(args.seed), 0, 0
    load = [multiprocessing.get_context("fork").Process(target=busy, daemon=True) for _ in range(args.busy)]
    for process in load:
        process.start()
    with TemporaryDirectory() as name:
        data = Path(name)
        write_data(data)
        if args.quiet and args.tests:
            args.command, trials = [], len(TESTS) * (args.times or 20)
            failures = failed_tests(args.times or 20)
        for command in args.command:
            for _ in range((args.times or 20) if args.quiet else 1):
                folder = data / f"{command}-whole"
                shutil.rmtree(folder, ignore_errors=True)
                process, log = start(command, data, folder)
                status, trials = process.wait(300), trials + args.quiet
                if status or "SIGABRT" in log.read_text(errors="replace"):
                    failures += 1
                    print(f"{command:<12} undisturbed, exit {status}: {log.read_text(errors='replace')[-1200:]}")
            for trouble in [] if args.quiet else TROUBLES * (args.times or 1):
                problem, trials = trial(command, data, trouble, rng), trials + 1
                failures += bool(problem) and not problem.startswith("the same weights")
                print(f"{command:<12} {trouble:<24} {problem or 'the same weights'}", flush=True)
    for process in load:
        process.kill()
    print(f"{trials} runs on two processes, {failures} that ended wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
