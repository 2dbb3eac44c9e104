"""The published likelihood pattern in small: NCA beside InfoNCA and DPO on real completions, several seeds.

    CONTRASTIVE_ALIGN_DATA=path/to/data python benchmarks/published_pattern.py --model=MODEL [--out=FOLDER]
    python benchmarks/published_pattern.py --table

The groups of gsm8k_groups.jsonl whose scores are not all equal, the best completion first. 200 of them, chosen once
with a fixed seed, are held out; as many of the others as the steps take are chosen by the seed of the run. Every run is
one trainer with beta 0.1, temperature_alpha 1e-4, learning rate 1e-4 (cosine) and batches of 4 groups. NCA and InfoNCA
run with and without the published first_score_bonus of 0.01, which decides every tie for the first completion.

Each finished run is a line of <out>/runs.jsonl and is not repeated. By default these are the rows behind the table of
docs/results.md, on one thread (OMP_NUM_THREADS=1): some two minutes for 80 steps, six for 300. All settings of a seed
are run before the next seed, so that the table of an unfinished benchmark compares equal seeds. ``--table`` prints the
tables of what is there. The second one is of differences between settings of equal seeds, which had the same groups in
the same order. The intervals are 95% intervals over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from scipy.stats import t as student

from contrastive_align import ContrastiveConfig, ContrastiveTrainer


HELD_OUT = 200
SETTINGS = {  # name -> options of ContrastiveConfig
    "NCA": {"loss_type": "nca"},
    "InfoNCA": {"loss_type": "info_nca"},
    "DPO": {"loss_type": "dpo"},
    "NCA, first_score_bonus=0.01": {"loss_type": "nca", "first_score_bonus": 0.01},
    "InfoNCA, first_score_bonus=0.01": {"loss_type": "info_nca", "first_score_bonus": 0.01},
}
PAIRS = (
    ("NCA", "InfoNCA"),
    ("NCA", "DPO"),
    ("NCA, first_score_bonus=0.01", "NCA"),
    ("InfoNCA, first_score_bonus=0.01", "InfoNCA"),
)
MEASURES = ("best", "rest", "accuracy")


def read_groups(file: Path) -> tuple[list[dict], list[dict]]:
    """Return the groups to train on and the held-out ones, each with its best completion first."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    groups = []
    for row in rows:
        if len(set(row["scores"])) > 1:
            order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
            groups.append(
                {
                    "prompt": f"Question: {row['prompt']}\nAnswer: ",
                    "completions": [row["completions"][i] for i in order],
                    "scores": [row["scores"][i] for i in order],
                }
            )
    random.Random(0).shuffle(groups)
    return groups[HELD_OUT:], groups[:HELD_OUT]


def run(model: str, options: dict, steps: int, seed: int, train: list[dict], held_out: list[dict]) -> dict[str, float]:
    """Train once; return the change of log-prob (nats) of the best and of the others, and the accuracy, on held-out."""
    batch = 4
    train = random.Random(seed).sample(train, min(len(train), batch * steps))
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveConfig(
            output_dir=folder,
            beta=0.1,
            temperature_alpha=1e-4,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=8,
            max_length=1024,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=50,
            use_cpu=True,
            bf16=False,
            seed=seed,
            **options,
        )
        trainer = ContrastiveTrainer(
            model, args=args, train_dataset=Dataset.from_list(train), eval_dataset=Dataset.from_list(held_out)
        )
        trainer.train()
        metrics = trainer.evaluate()
    return {
        "best": metrics["eval_logps/best_delta"],
        "rest": metrics["eval_logps/rest_delta"],
        "accuracy": metrics["eval_rewards/accuracies"],
    }


def interval(values: list[float]) -> str:
    """Show the mean and the half width of its 95% interval.

    >>> interval([1.0, 2.0, 3.0]), interval([1.0])
    ('+2.00 +- 2.48', '+1.00')
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} +- {half:.2f}"


def table(done: list[dict]) -> str:
    """Return the table of the runs that are there, with the number of seeds of each row."""
    lines = [
        "| steps | loss | seeds | best completion (nats) | the others (nats) | best less others | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for steps in sorted({row["steps"] for row in done}):
        for name in SETTINGS:
            rows = [row for row in done if (row["steps"], row["setting"]) == (steps, name)]
            if rows:
                gaps = [row["best"] - row["rest"] for row in rows]
                best, rest, accuracy = ([row[measure] for row in rows] for measure in MEASURES)
                cells = [interval(best), interval(rest), interval(gaps), interval(accuracy).lstrip("+")]
                lines.append(f"| {steps} | {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(done: list[dict]) -> str:
    """Return the table of pairs of settings: how far the first is above the second, seed by seed."""
    lines = [
        "| steps | settings | seeds | best completion | the others | best less others |",
        "|---|---|---|---|---|---|",
    ]
    for steps in sorted({row["steps"] for row in done}):
        of = {name: {r["seed"]: r for r in done if (r["steps"], r["setting"]) == (steps, name)} for name in SETTINGS}
        for one, other in PAIRS:
            seeds = sorted(of[one].keys() & of[other].keys())
            if seeds:
                best, rest = ([of[one][s][m] - of[other][s][m] for s in seeds] for m in ("best", "rest"))
                cells = [interval(best), interval(rest), interval([b - r for b, r in zip(best, rest, strict=True)])]
                lines.append(f"| {steps} | {one}, less {other} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or id; gsm8k-sft-5m for the documented table")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--steps", type=int, nargs="+", default=[80, 300])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are there, and stop")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "runs.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if not args.table:
        if "CONTRASTIVE_ALIGN_DATA" not in os.environ or not args.model:
            parser.error("set CONTRASTIVE_ALIGN_DATA to the folder with gsm8k_groups.jsonl, and give --model")
        train, held_out = read_groups(Path(os.environ["CONTRASTIVE_ALIGN_DATA"]) / "gsm8k_groups.jsonl")
        for steps in args.steps:
            for seed in args.seeds:
                for name in args.settings:
                    key = {"steps": steps, "seed": seed, "setting": name}
                    if any(key.items() <= row.items() for row in done):
                        continue
                    started = time.perf_counter()
                    row = key | run(args.model, SETTINGS[name], steps, seed, train, held_out)
                    done.append(row | {"seconds": round(time.perf_counter() - started, 1)})
                    with file.open("a") as lines:
                        lines.write(json.dumps(done[-1]) + "\n")
    print(f"{table(done)}\n\n{differences(done)}")


if __name__ == "__main__":
    main()
