"""Does the doctor name what is wrong? 16 diseases made with the bundled model, 3 seeds each, and 20 healthy runs.

    python benchmarks/doctor.py --out scratch/doctor            # about 20 minutes on two cores
    python benchmarks/doctor.py --out scratch/fresh --first_seed 100
    python benchmarks/doctor.py --out scratch/doctor --record tests/fixtures/doctor.json

Prints for each disease in how many seeds its rule spoke, and for the healthy runs every alarm. ``--record`` keeps the
numbers that the rules read, of the first seed of each disease and of a few healthy runs, for the test suite.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

from contrastive_align import demo
from contrastive_align.launch import cli
from contrastive_align.report.doctor import diagnose
from contrastive_align.report.page import RunView


SHORT = ["--max_eval_samples=60", "--logging_steps=5", "--warmup_steps=3", "--report_prompts=16"]
FDPG = ["--max_steps=15", "--per_device_train_batch_size=64", "--fit_samples=2048", "--logging_steps=1"]
FDPG += [
    "--eval_samples=500",
    "--eval_prompts=10",
    "--report_prompts=8",
    "--qrs_acceptance=0",
    "--max_completion_length=32",
]
ROUNDS = [
    "--num_train_epochs=3",
    "--prompts_per_round=64",
    "--draws_per_round=1280",
    "--eval_prompts=40",
    "--report_prompts=8",
]
RARE = "{contains: kindly, moment: 0.95}"


def rows_of(change):
    """Rows of the bundled groups, changed by a function of (number, prompt, completions, scores)."""
    rows = demo.load_reward_dataset()["train"]
    return [change(i, r["prompt"], list(r["completions"]), list(r["scores"])) for i, r in enumerate(rows)]


def write(folder, name, change):
    path = Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        rows = [{"prompt": p, "completions": c, "scores": s} for p, c, s in rows_of(change)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return f"--dataset_name={path}"


def by_length(i, prompt, completions, scores):
    thanks = " Thank you so much, that is very kind of you."
    longer = [f"{text}{thanks * (j % 3)}" for j, text in enumerate(completions)]
    return prompt, longer, [float(len(text.split())) for text in longer]


def mostly_equal(i, prompt, completions, scores):
    return prompt, completions, [1.0] * len(scores) if i % 10 < 7 else scores


def repeated(i, prompt, completions, scores):
    said = [" ".join([text] * (4 if j == 0 else 1)) for j, text in enumerate(completions)]
    return prompt, said, [1.0] + [0.0] * (len(said) - 1)


TEXTS = []


def rambling(i, prompt, completions, scores):
    if not TEXTS:
        TEXTS.extend(text for row in demo.load_reward_dataset()["train"] for text in row["completions"])
    more = [
        " ".join([text, *(TEXTS[(97 * i + 31 * j + n) % len(TEXTS)] for n in range(12))])
        for j, text in enumerate(completions)
    ]
    return prompt, more, scores


def negated(i, prompt, completions, scores):
    return prompt, completions, [-score for score in scores]


def digits(i, prompt, completions, scores):
    said = [" ".join(str((7 * i + 3 * j + n * n) % 10) for n in range(12)) for j in range(len(completions))]
    return prompt, said, scores


def diseases(folder):
    """Disease -> the command that makes it."""
    sft = ["--loss_type=sft", "--learning_rate=2e-3", "--max_steps=30", "--report_prompts=10", "--max_train_samples=96"]
    return {
        "diverged": ["reward", "--learning_rate=1000", "--max_grad_norm=0", "--max_steps=12", *SHORT],
        "likelihood_displacement": [
            "preference",
            "--loss_type=DPO",
            "--learning_rate=2e-3",
            "--beta=0.05",
            "--max_steps=60",
            *SHORT,
        ],
        "length": [
            "reward",
            write(folder, "length", by_length),
            "--loss_type=InfoNCA",
            "--beta=0.02",
            "--temperature_alpha=1",
            "--learning_rate=1e-3",
            "--max_steps=60",
            *MODEL,
        ],
        "no_signal": ["reward", write(folder, "equal", mostly_equal), "--max_steps=30", *MODEL],
        "one_hot_labels": ["reward", "--loss_type=InfoNCA", "--temperature_alpha=1e-4", "--max_steps=40", *SHORT],
        "temperature_high": ["reward", "--loss_type=InfoNCA", "--temperature_alpha=100", "--max_steps=40", *SHORT],
        "learning_rate_high": ["reward", "--learning_rate=3e-2", "--max_steps=50", *SHORT],
        "learning_rate_low": ["reward", "--learning_rate=1e-7", "--max_steps=40", *SHORT],
        "reference_moved": ["reward", "--sync_ref_model", "--ref_model_sync_steps=10", "--max_steps=40", *SHORT],
        "overfitting": [
            "reward",
            "--loss_type=DPO",
            "--beta=0.5",
            "--max_train_samples=24",
            "--max_eval_samples=200",
            "--max_steps=80",
            "--learning_rate=2e-3",
        ],
        "eos_lost": ["reward", write(folder, "rambling", rambling), *sft, *MODEL, "--max_length=56"],
        "repetition": ["reward", write(folder, "repeated", repeated), *sft, *MODEL],
        "kl_large": ["reward", write(folder, "digits", digits), *sft, *MODEL],
        "ess_low": ["fdpg", f"--features=[{RARE}]", "--learning_rate=1e-6", *FDPG],
        "proposal_stale": [
            "fdpg",
            f"--features=[{RARE}]",
            "--proposal=kept",
            "--proposal_window=1000",
            "--learning_rate=3e-3",
            *FDPG,
        ],
        "conditions_order": [
            "conditional",
            write(folder, "negated", negated),
            "--eval_reward=contrastive_align.demo:reward",
            "--condition={kind: quantile_tokens, per_prompt: false}",
            "--model_name_or_path=" + demo.MODEL_PATH,
            "--learning_rate=4e-3",
            "--per_device_train_batch_size=64",
            "--max_steps=100",
            "--max_completion_length=32",
            "--eval_prompts=25",
            "--report_prompts=8",
        ],
    }


MODEL = [
    f"--model_name_or_path={demo.MODEL_PATH}",
    "--max_length=256",
    "--per_device_train_batch_size=16",
    "--gradient_checkpointing=false",
    "--logging_steps=5",
    "--save_strategy=no",
    "--warmup_steps=3",
]


def healthy(first=0):
    """20 runs in which nothing is wrong; the seeds count from the first one."""
    reward = ["reward", "--max_steps=35", *SHORT]
    found = {
        **{f"nca {seed}": [*reward, "--loss_type=NCA", f"--seed={first + seed}"] for seed in range(3)},
        **{f"info_nca {seed}": [*reward, "--loss_type=InfoNCA", f"--seed={first + seed}"] for seed in range(2)},
        **{f"dpo {seed}": [*reward, "--loss_type=DPO", f"--seed={first + seed}"] for seed in range(2)},
        "plackett_luce": [*reward, "--loss_type=plackett_luce"],
        "sft": [*reward, "--loss_type=sft", "--learning_rate=1e-4"],
        "nca and sft": [*reward, "--loss_type", "NCA", "sft", "--loss_weights", "1", "0.1"],
        "lora": [*reward, "--use_peft", "--lora_r=8", "--lora_target_modules=all-linear", "--learning_rate=2e-3"],
        "with evaluations": [*reward, "--eval_strategy=steps", "--eval_steps=15"],
        "beta 0.5": [*reward, "--beta=0.5"],
        "linear": [*reward, "--lr_scheduler_type=linear", "--learning_rate=2e-4"],
        "two epochs": ["reward", "--max_train_samples=280", "--num_train_epochs=2", *SHORT],
        **{
            f"preference {seed}": ["preference", "--loss_type=NCA", "--max_steps=35", f"--seed={first + seed}", *SHORT]
            for seed in range(2)
        },
        "fdpg": ["fdpg", "--learning_rate=5e-4", *FDPG],
        "fdpg kl": ["fdpg", "--learning_rate=5e-4", "--divergence=kl", f"--seed={first + 1}", *FDPG],
        "conditional": ["conditional", *ROUNDS],
    }
    assert len(found) == 20, len(found)
    return {
        name: argv if any("--seed" in flag for flag in argv) else [*argv, f"--seed={first}"]
        for name, argv in found.items()
    }


def run(argv, folder):
    """Make a run quietly; return what the doctor found, and the seconds."""
    started, said = time.perf_counter(), io.StringIO()
    if not (folder / "summary.json").is_file():  # a benchmark that was stopped goes on
        _make(argv, folder, said)
    view = RunView.read(folder)  # a run that diverges leaves no summary.json
    return view.summary, view.history, diagnose(view.summary, view.history).findings, time.perf_counter() - started


def _make(argv, folder, said):
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main([*argv, f"--output_dir={folder}"])
        except SystemExit:
            if not folder.name.startswith("diverged"):
                raise


def recorded(summary, history):
    """The numbers that rules read, few enough for a fixture."""
    parts = ("facts", "metrics", "metrics_on", "samples")
    found = {part: summary.get(part, {}) for part in parts}
    method = ("temperature_alpha", "learning_rate", "num_generations", "prompts_per_generation")
    found["method"] = {name: summary["method"][name] for name in method if name in summary["method"]}
    train = summary["data"].get("train", {})
    found["data"] = {"train": {name: train[name] for name in ("groups", "no_signal") if name in train}}
    target = summary.get("distributions", {}).get("target", {})
    found["distributions"] = {"target": {k: v for k, v in target.items() if k.startswith("KL")}}
    read = (
        *(n for n in history.names("moment/") if n.endswith("/target")),
        "loss",
        "nll",
        "groups/no_mass",
        "log_z",
        "round/no_signal",
        "eval_loss",
        "completions/eos_rate",
        "round/finished",
        "moment/target/ess",
        "reverse_kl_target/ess",
        "eval_logps/best",
        "eval_logps/best_delta",
    )
    points = {n: [[p.step, float(f"{p.mean:.5g}")] for p in history[n].points] for n in read if n in history}
    return {"summary": found, "points": points}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept, named, alarms = {}, {}, {}
    first = args.first_seed
    sick, well = diseases(args.out), healthy(first)
    seeds = range(first, first + args.seeds)
    jobs = [(disease, seed, [*argv, f"--seed={seed}"]) for seed in seeds for disease, argv in sick.items()]
    jobs = [*jobs[: len(sick)], *(("healthy " + name, first, argv) for name, argv in well.items()), *jobs[len(sick) :]]
    for name, seed, argv in jobs:
        if args.only and args.only not in name:
            continue
        summary, history, found, seconds = run(argv, args.out / f"{name.replace(' ', '-')}-{seed}")
        rules = [finding.rule for finding in found]
        if seed == first:
            kept[name] = recorded(summary, history)
        if name in sick:
            named.setdefault(name, []).append(name in rules)
        else:
            alarms[name] = [finding.rule for finding in found if finding.level == "warning"]
        print(f"{name} {seed}: {rules} ({seconds:.0f} s)", flush=True)
        if args.record:
            args.record.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    print(f"diseases named in all seeds: {sum(map(all, named.values()))} of {len(named)}")
    print(f"healthy runs with an alarm: {sum(map(bool, alarms.values()))} of {len(alarms)}")


if __name__ == "__main__":
    main()
