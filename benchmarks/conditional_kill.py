"""Kill a conditional training run with SIGKILL at random moments and resume it each time: nothing may be lost.

    python benchmarks/conditional_kill.py [--kills 10] [--seed 0]

The run: the bundled model, four rounds of 24 prompts x 10 completions, a checkpoint every other step. One copy runs
undisturbed. Another is killed ``--kills`` times at random moments, on average spread over the run, and started again
with ``resume_from_checkpoint=True`` each time; then it runs to its end. Its pool must be that of the undisturbed run,
sample for sample, none there twice; so must its weights, to 1e-6.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory


ROUNDS, PROMPTS, COMPLETIONS = 4, 24, 10


def run(folder: str) -> None:
    """The run itself, in a process of its own."""
    from datasets import Dataset, disable_progress_bars

    from contrastive_align import ConditionalConfig, ConditionalTrainer
    from contrastive_align.demo import MODEL_PATH, reward
    from contrastive_align.demo.task import all_prompts

    disable_progress_bars()
    args = ConditionalConfig(
        folder,
        num_train_epochs=ROUNDS,
        prompts_per_round=PROMPTS,
        num_generations=COMPLETIONS,
        max_completion_length=24,
        per_device_train_batch_size=20,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": all_prompts()[::21]})
    trainer = ConditionalTrainer(MODEL_PATH, args, train_dataset=prompts, reward_funcs=reward)
    print("ready", flush=True)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(f"{folder}/final")


def start(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", str(folder)],
        stdout=subprocess.PIPE,
        stderr=(folder.parent / f"{folder.name}.log").open("a"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"},
    )
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    raise SystemExit(f"The run ended before it was ready: see {folder}.log.")


def rest(process: subprocess.Popen) -> int:
    """Its exit status; what it still prints is read, so that it does not wait for a reader."""
    process.stdout.read()
    return process.wait()


def compare(whole: Path, killed: Path) -> tuple[int, float]:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from contrastive_align.pool import Pool

    def samples(folder: Path) -> list:
        pool = Pool(folder / "pool", label=lambda table: np.zeros(len(table), dtype=np.int32))
        return pool.read(np.arange(len(pool)))

    a, b = samples(whole), samples(killed)
    assert a == b, "the pools differ"
    assert len({(s.round, s.prompt_index, s.sample_index) for s in b}) == len(b) == ROUNDS * PROMPTS * COMPLETIONS
    one, two = (load_file(folder / "final" / "model.safetensors") for folder in (whole, killed))
    gap = max((one[name] - two[name]).abs().max().item() for name in one)
    assert gap <= 1e-6 and not any(torch.isnan(p).any() for p in two.values()), f"weights differ by {gap}"
    return len(b), gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run)
        return
    moments = random.Random(args.seed)
    with TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        process = start(whole)
        began = time.perf_counter()
        assert rest(process) == 0, (Path(folder) / "whole.log").read_text()[-2000:]
        seconds = time.perf_counter() - began
        print(f"Undisturbed: {seconds:.1f} s after start-up.")
        done = 0
        while done < args.kills:
            process = start(killed)
            wait = moments.uniform(0, 2.5 * seconds / args.kills)
            try:
                process.wait(wait)
                break  # it came to its end before so many kills
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            done += 1
            rounds = len(list((killed / "pool").glob("round-*.arrow"))) if (killed / "pool").is_dir() else 0
            checkpoints = sorted(int(p.name.split("-")[1]) for p in killed.glob("checkpoint-*"))
            where = f"{rounds} rounds in the pool, checkpoints {checkpoints}"
            print(f"kill {done:2d}, {wait:.1f} s after start-up: {where}", flush=True)
        if process.returncode != 0:
            process = start(killed)
            assert rest(process) == 0, (Path(folder) / "killed.log").read_text()[-2000:]
        n, gap = compare(whole, killed)
        print(f"{done} kills: {n} samples, the same as undisturbed, none twice; weights differ by {gap:.1e} at most.")


if __name__ == "__main__":
    main()
