"""Groups of own samples on school mathematics: a program as reward, and a format as reward, before and after.

    python benchmarks/online_gsm8k.py --model FOLDER --questions gsm8k.jsonl --reward format --seeds 1 2 3

The model continues ``Question: ...\\nAnswer:``, and the questions are rows of ``prompt`` and ``completion``, whose last
line is ``#### 18``. ``right``: 1 where the final line ``A: 18`` has it. ``format``: a half for a final line with a
number, and up to a half for being short (nothing at 100 words). Before and after are means over held-out questions of
4 samples each, with standard errors over questions. A few minutes of one processor for each seed.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time

import numpy as np
from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging

from contrastive_align import ContrastiveConfig, ContrastiveTrainer


FINAL = re.compile(r"\nA: (-?[\d.,]+)\s*$")


def right(completions: list[str], answer: list[str], **columns) -> list[float]:
    found = [FINAL.search(text) for text in completions]
    return [float(bool(m) and m[1].rstrip(".").replace(",", "") == a) for m, a in zip(found, answer, strict=True)]


def format(completions: list[str], **columns) -> list[float]:
    return [0.5 * bool(FINAL.search(t)) + 0.5 * max(0.0, 1 - len(t.split()) / 100) for t in completions]


REWARDS = {"right": right, "format": format}


def run(args: argparse.Namespace, seed: int) -> dict:
    """Train on some questions; return the rewards of others before and after, and the rounds."""
    rows = [json.loads(line) for line in open(args.questions, encoding="utf-8")]
    chosen = np.random.default_rng(0).permutation(len(rows))[: args.train + args.held_out]
    rows = [
        {
            "prompt": f"Question: {rows[i]['prompt']}\nAnswer:",
            "answer": rows[i]["completion"].split("####")[-1].strip().replace(",", ""),
        }
        for i in chosen
    ]
    train, held_out = Dataset.from_list(rows[: args.train]), Dataset.from_list(rows[args.train :])
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        options = ContrastiveConfig(
            folder, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", seed=seed,
            online=True, num_rounds=args.rounds, prompts_per_round=args.prompts, num_generations=8, reference="round",
            max_completion_length=args.longest, per_device_train_batch_size=8, learning_rate=args.learning_rate,
            beta=0.1, gradient_checkpointing=False, logging_steps=1000, resample=args.resample,
        )  # fmt: skip
        trainer = ContrastiveTrainer(args.model, args=options, train_dataset=train, reward_funcs=REWARDS[args.reward])
        trainer.args.num_generations = 4  # of the measurement
        before = trainer.rewards_of(held_out)
        trainer.args.num_generations = 8
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        trainer.args.num_generations = 4
        after = trainer.rewards_of(held_out)
    keys = ("mean_reward", "no_signal", "mean_length", "kl_start")
    rounds = [entry for entry in trainer.state.log_history if "round/number" in entry]
    gain = after - before
    return {
        "seed": seed, "reward": args.reward, "before": round(before.mean(), 4), "after": round(after.mean(), 4),
        "gain": round(gain.mean(), 4), "se": round(gain.std(ddof=1) / np.sqrt(len(gain)), 4), "seconds": round(seconds),
        "rounds": [{key: round(entry[f"round/{key}"], 3) for key in keys} for entry in rounds],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--reward", choices=REWARDS, default="format")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    for name, default in {
        "train": 400,
        "held_out": 64,
        "rounds": 2,
        "prompts": 64,
        "longest": 160,
        "resample": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    logging.set_verbosity_error()
    for seed in args.seeds:
        print(json.dumps(run(args, seed)), flush=True)


if __name__ == "__main__":
    main()
