"""Where does the best completion's log-prob go? NCA beside InfoNCA and DPO on real data, at the same settings.

    CONTRASTIVE_ALIGN_DATA=path/to/data python benchmarks/real_data.py --model path/to/model --out runs/real

The data folder holds gsm8k_groups, wmt_ted_ende_groups, qa_feedback_groups and hh_harmless_pairs as .jsonl. Each run
is ``run_reward.py`` or ``run_preference.py`` with flags, in a process of its own; the table is made from their
summary.json. A run that is already there is not repeated.
Without --model the bundled demo model is used, with max_length 512 (its context).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
LOSSES = ("NCA", "InfoNCA", "DPO")
DATA = {
    "gsm8k_groups": {"script": "run_reward.py", "form": "Question: {}\nAnswer: "},
    "wmt_ted_ende_groups": {"script": "run_reward.py", "form": "{}\n"},
    "qa_feedback_groups": {"script": "run_reward.py", "form": "{}\nanswer: "},
    "hh_harmless_pairs": {"script": "run_preference.py", "form": None},
}
FLAGS = {
    "learning_rate": "1e-4",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.1",
    "beta": "0.1",
    "temperature_alpha": "1e-4",
    "per_device_train_batch_size": "2",
    "per_device_eval_batch_size": "4",
    "gradient_accumulation_steps": "4",
    "gradient_checkpointing": "false",
    "precompute_ref_log_probs": "true",
    "test_split_size": "0.1",
    "max_train_samples": "480",
    "max_eval_samples": "64",
    "logging_steps": "10",
    "save_strategy": "no",
    "seed": "0",
    "on_bad_row": "drop",
}


def prepared(name: str, folder: Path, out: Path) -> Path:
    """The file as it is, or with its prompts in the form the model was trained on."""
    form = DATA[name]["form"]
    if form is None:
        return folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{**{k: row[k] for k in ("completions", "scores")}, "prompt": form.format(row["prompt"])} for row in rows]
    file = out / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


def run(name: str, loss: str, file: Path, model: str | None, max_steps: int, out: Path) -> dict:
    output_dir = out / f"{name}-{loss}"
    flags = {**FLAGS, "dataset_name": str(file), "loss_type": loss, "max_steps": max_steps, "output_dir": output_dir}
    if model:
        flags |= {"model_name_or_path": model, "max_length": "1024", "max_prompt_length": "768"}
    else:
        flags |= {"max_length": "512", "max_prompt_length": "256"}
    command = [sys.executable, str(ROOT / DATA[name]["script"]), *(f"--{k}={v}" for k, v in flags.items())]
    if not (output_dir / "summary.json").is_file():
        with open(out / f"{name}-{loss}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads((output_dir / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or id; default: the bundled demo model")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()
    if "CONTRASTIVE_ALIGN_DATA" not in os.environ:
        parser.error("set CONTRASTIVE_ALIGN_DATA to the folder with the .jsonl files")
    folder = Path(os.environ["CONTRASTIVE_ALIGN_DATA"])
    args.out.mkdir(parents=True, exist_ok=True)
    print("| data | loss | dlogp best | +- se | dlogp rest | +- se | margin | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.data:
        file = prepared(name, folder, args.out)
        for loss in LOSSES:
            summary = run(name, loss, file, args.model, args.max_steps, args.out)
            m = summary["metrics"]
            cells = [f"{m[k]['after'] - m[k]['before']:+.2f} | {m[k]['se']:.2f}" for k in ("logps/best", "logps/rest")]
            margin = m["rewards/margins"]["after"]
            seconds = summary["training"]["seconds"]
            print(f"| {name} | {loss} | {' | '.join(cells)} | {margin:.3f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
