"""Memory and open files over a long run: neither grows.

    python benchmarks/growth.py [--command reward ...] [--steps 3000] [--rounds 30]

Each training command runs on the bundled model: conditional training for so many rounds, the others for so many steps,
with an evaluation and a checkpoint at every tenth of the run. After each step the process's own memory (RssAnon of
/proc/self/status: files that are mapped, such as the pool's, are not in it) and its open descriptors are read. Growth
is what the last tenth holds at most beyond the second one, the pool's columns taken off; it must be under 2%, and the
descriptors equal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


COMMANDS = ("reward", "preference", "fdpg", "conditional")
LIMIT = 0.02
QUIET = ["--use_cpu=true", "--bf16=false", "--gradient_checkpointing=false", "--report_to=none", "--disable_tqdm=true"]
SAVING = ["--save_strategy=steps", "--save_steps=0.1", "--save_total_limit=1", "--logging_steps=50"]


def flags_of(command: str, steps: int, rounds: int) -> list[str]:
    own = {
        "fdpg": ["--per_device_train_batch_size=8", "--num_generations=4", "--max_completion_length=8"],
        "conditional": [f"--num_train_epochs={rounds}", "--prompts_per_round=24", "--num_generations=5"],
    }
    evaluating = ["--eval_strategy=steps", "--eval_steps=0.1", "--max_eval_samples=16"]
    several = [*evaluating, "--per_device_train_batch_size=4"] if command in ("reward", "preference") else []
    length = [] if command == "conditional" else [f"--max_steps={steps}"]
    return [*own.get(command, []), *several, *length, *SAVING, *QUIET]


def run(command: str, folder: str, flags: list[str]) -> None:
    """The run itself, in a process of its own; prints what it held after each step."""
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    from contrastive_align.launch import cli
    from contrastive_align.pool import Pool

    held, pools = [], []
    make = Pool.__init__

    def remember(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        pools.append(self)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            own = int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
            columns = [pool._columns for pool in pools if pool._columns is not None]
            of_pool = sum(a.nbytes for c in columns for a in vars(c).values() if hasattr(a, "nbytes"))
            held.append((own - of_pool, len(os.listdir("/proc/self/fd"))))

    Pool.__init__ = remember
    DEFAULT_CALLBACKS.append(Watch)
    cli.main([command, *flags, f"--output_dir={folder}"])
    print(json.dumps(held))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run, flags_of(args.run[0], args.steps, args.rounds))
        return 0
    failures = 0
    for command in args.command:
        with TemporaryDirectory() as folder:
            flags = [f"--steps={args.steps}", f"--rounds={args.rounds}", "--run", command, f"{folder}/run"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/cache"}
            done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr[-2000:])
            return 1
        held = json.loads(done.stdout.splitlines()[-1])
        tenth = len(held) // 10
        early, late = held[tenth : 2 * tenth], held[-tenth:]
        growth = max(m for m, _ in late) / max(m for m, _ in early) - 1
        files = [max(n for _, n in part) for part in (early, late)]
        bad = growth > LIMIT or files[0] != files[1]
        failures += bad
        print(
            f"{command:<12} {len(held)} steps: {max(m for m, _ in early) / 1e6:.0f} MB after a tenth, at most "
            f"{max(m for m, _ in late) / 1e6:.0f} MB in the last ({growth:+.1%}); descriptors {files[0]} and {files[1]}"
            f"{'  ABOVE' if bad else ''}",
            flush=True,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
