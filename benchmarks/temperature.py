"""temperature_alpha="auto" beside 1e-4: what the labels' temperature does to NCA and InfoNCA.

    CONTRASTIVE_ALIGN_DATA=path/to/data python benchmarks/temperature.py --model path/to/model --out runs/temperature

On the bundled data it is ``run_reward.py`` as it stands, and the measure is the mean reward of samples. On
wmt_ted_ende_groups and qa_feedback_groups (.jsonl in the data folder) a model is trained on some of the groups, and the
measure is Kendall's tau between scores and implied rewards of the others. Beside it stands the change of the best
completion's log-prob on held-out groups. The seed decides the split, the order and the samples, alike for both
temperatures: the differences are of the same seed, their mean is given with its standard error over the seeds.
A run that is already in the output folder is not repeated.
Without --model the bundled demo model is used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from real_data import ROOT, prepared

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo


DEMO = "demo"
DATA = (DEMO, "wmt_ted_ende_groups", "qa_feedback_groups")
LOSSES = ("NCA", "InfoNCA")
TEMPERATURES = ("1e-4", "auto")
HELD_OUT = 120
HEADER = (
    "data",
    "loss",
    "auto",
    "measure",
    "at 1e-4",
    "at auto",
    "auto - 1e-4",
    "best at 1e-4",
    "best at auto",
    "auto - 1e-4",
)


def run_demo(loss: str, temperature: str, seed: int, folder: Path) -> dict[str, float]:
    """Train on the bundled data by the command."""
    flags = {"loss_type": loss, "temperature_alpha": temperature, "seed": seed, "output_dir": folder}
    command = [sys.executable, str(ROOT / "run_reward.py"), *(f"--{k}={v}" for k, v in flags.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["metrics"]["logps/best"]
    reward = summary["metrics"]["mean_reward"]["after"]
    return {"measure": reward, "best": best["after"] - best["before"], "alpha": summary["method"]["temperature_alpha"]}


def run_real(file: Path, loss: str, temperature: str, seed: int, folder: Path, model: str, steps: int) -> dict:
    """Train on some groups of a file and evaluate on others."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["scores"] = [float(score) for score in row["scores"]]
    rows = Dataset.from_list(rows).shuffle(seed=seed)
    args = ContrastiveConfig(
        output_dir=str(folder),
        loss_type=loss,
        temperature_alpha=temperature,
        beta=0.1,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=8,
        max_length=384,
        max_prompt_length=192,
        on_bad_row="drop",
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    held_out, train = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, len(rows)))
    trainer = ContrastiveTrainer(model, args=args, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    found = trainer.evaluate()
    names = {"measure": "eval_rewards/kendall_tau", "best": "eval_logps/best_delta"}
    return {key: found[name] for key, name in names.items()} | {"alpha": trainer.temperature_alpha}


def mean_and_se(values: list[float]) -> str:
    """The mean over the seeds, with its standard error."""
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.3f} +- {se:.3f}"


def row(name: str, loss: str, found: dict[tuple[str, int], dict[str, float]], seeds: list[int]) -> tuple[str, ...]:
    """A row of the table: (temperature, seed) -> result."""
    cells = [name, loss, f"{statistics.mean(found['auto', seed]['alpha'] for seed in seeds):.3g}"]
    cells.append("mean reward" if name == DEMO else "tau")
    for key in ("measure", "best"):
        at = {t: [found[t, seed][key] for seed in seeds] for t in TEMPERATURES}
        cells += [f"{statistics.mean(values):.3f}" for values in at.values()]
        cells.append(mean_and_se([auto - hard for hard, auto in zip(*at.values(), strict=True)]))
    return tuple(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL_PATH, help="a model folder or id; default: the bundled model")
    parser.add_argument("--out", type=Path, default=Path("runs/temperature"))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of 8 groups, on all but the bundled data")
    args = parser.parse_args()
    if "CONTRASTIVE_ALIGN_DATA" not in os.environ and args.data != [DEMO]:
        parser.error("set CONTRASTIVE_ALIGN_DATA to the folder with the .jsonl files")
    args.out.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for name in args.data:
        for loss in LOSSES:
            found = {}
            for seed in args.seeds:
                for temperature in TEMPERATURES:
                    folder = args.out / f"{name}-{loss}-{temperature}-{seed}"
                    file = args.out / f"{folder.name}.json"
                    if not file.is_file():
                        told = (loss, temperature, seed, folder)
                        if name == DEMO:
                            result = run_demo(*told)
                        else:
                            data = prepared(name, Path(os.environ["CONTRASTIVE_ALIGN_DATA"]), args.out)
                            result = run_real(data, *told, args.model, args.steps)
                        file.write_text(json.dumps(result))
                    found[temperature, seed] = json.loads(file.read_text())
            print("| " + " | ".join(row(name, loss, found, args.seeds)) + " |", flush=True)


if __name__ == "__main__":
    main()
