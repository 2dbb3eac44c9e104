"""Seconds a step: this package beside TRL's DPOTrainer, in one process setting and one run.

python benchmarks/speed.py [--steps 5] [--rows trl2 padded4 ...]          (some minutes on 2 cores)

A 56M Llama (hidden 512, 8 layers, 8 heads, 4 KV heads, intermediate 1408, vocabulary 32,000), fp32, full fine-tuning,
reference not cached, on synthetic lengths: prompts log-normal with median 160 (sigma 0.8, 16 to 480 tokens),
completions median 260 (sigma 0.6, 16 to 500), seed 0. The rows take turns step by step, on the same groups; medians of
the steps after the first two. The last column is the share of the machine's matrix-product rate (the best of
2048 x 2048 x 2048 products timed between the steps) that the step's floor reaches: 6 x parameters x unique tokens, the
head counted on completion tokens alone, and a third of that again for the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo


ROWS = {  # name -> (completions, layout or None for TRL)
    "trl2": (2, None),
    "padded2": (2, "padded"),
    "shared2": (2, "shared"),
    "padded4": (4, "padded"),
    "shared4": (4, "shared"),
}
GROUPS = 4


def log_normal(generator: torch.Generator, median: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, median * math.exp(sigma * torch.randn((), generator=generator).item()))))


def synthetic(n: int, k: int = 4) -> list[dict]:
    g = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 32000, (length,), generator=g).tolist()

    return [
        {
            "prompt_ids": ids(log_normal(g, 160, 0.8, 16, 480)),
            "completion_ids": [ids(log_normal(g, 260, 0.6, 16, 500)) for _ in range(k)],
            "scores": [float(k - i) for i in range(k)],
        }
        for _ in range(n)
    ]


def build(row: str, model: str, groups: list[dict]) -> tuple[object, list]:
    """A trainer and its batches, ready for training_step."""
    k, layout = ROWS[row]
    options = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_length": None,
        "per_device_train_batch_size": GROUPS,
    }
    if layout is None:
        rows = [
            {
                "prompt_ids": g["prompt_ids"],
                "chosen_ids": g["completion_ids"][0],
                "rejected_ids": g["completion_ids"][1],
            }
            for g in groups
        ]
        tiny = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(
            model, args=DPOConfig(loss_type=["nca_pair"], **options), train_dataset=tiny, processing_class=tokenizer()
        )
    else:
        rows = [{**g, "completion_ids": g["completion_ids"][:k], "scores": g["scores"][:k]} for g in groups]
        args = ContrastiveConfig(loss_type="nca", layout=layout, **options)
        trainer = ContrastiveTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    batches = [trainer.data_collator(rows[i : i + GROUPS]) for i in range(0, len(rows), GROUPS)]
    return trainer, batches


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.MODEL_PATH)


def step(trainer, batch: dict) -> float:
    started = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return time.perf_counter() - started


def floor_flop(groups: list[dict], k: int, body: int, head: int) -> float:
    completions = sum(len(c) for g in groups for c in g["completion_ids"][:k])
    unique = completions + sum(len(g["prompt_ids"]) for g in groups)
    return 6 * (body * unique + head * completions) * 4 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each row")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1408,
        vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tempfile.mkdtemp()
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head - model.model.embed_tokens.weight.numel()
    groups = synthetic(GROUPS * (args.steps + 2))
    trainers = {row: build(row, folder, groups) for row in args.rows}
    seconds: dict[str, list[float]] = {row: [] for row in args.rows}
    rate = 0.0
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    for i in range(args.steps + 2):
        for row, (trainer, batches) in trainers.items():
            seconds[row].append(step(trainer, batches[i]))
            for _ in range(3):
                started = time.perf_counter()
                torch.mm(a, b)
                rate = max(rate, 2 * 2048**3 / (time.perf_counter() - started))
    print(f"matrix product: {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads, {GROUPS} groups a step")
    print("| row | K | seconds a step | ratio to TRL, K=2 | share of the matrix-product rate |\n|---|---|---|---|---|")
    trl = statistics.median(seconds["trl2"][2:]) if "trl2" in seconds else float("nan")
    for row in args.rows:
        k, _ = ROWS[row]
        median = statistics.median(seconds[row][2:])
        shares = [
            floor_flop(groups[i * GROUPS : (i + 1) * GROUPS], k, body, head) / seconds[row][i] / rate
            for i in range(2, args.steps + 2)
        ]
        print(f"| {row} | {k} | {median:.2f} | {median / trl:.2f} | {statistics.median(shares):.2f} |")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
