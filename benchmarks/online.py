"""Groups of own samples beside conditional training, scored data, RLOO and GRPO: reward by samples and by time.

    python benchmarks/online.py                                    # every method, seeds 1, 2 and 3
    python benchmarks/online.py --methods online --seeds 11 --set beta=0.02 learning_rate=1e-3 reference=start
    python benchmarks/online.py --table                            # of what --out has already

The bundled model, prompts and reward. Every method draws 5,120 completions (offline NCA none: it reads the bundled
scores), and ends with the mean reward of 4 samples of each held-out prompt; conditional training is asked for the best.
Time is that of the processor, in seconds of this process without evaluation, which a busy machine does not change; one
thread (OMP_NUM_THREADS=1) makes it comparable. RLOO and GRPO (TRL) are measured twice: at 5,120 samples, and at the
time that ``online`` took with the same seed. Their learning rate and beta are set by ``--set``, too.

Each result is a line of --out, so that a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging

from contrastive_align import (
    ConditionalConfig,
    ConditionalTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
    demo,
)
from contrastive_align.sampling.decode import draw, seed_of


SAMPLES, ROUNDS, K, LONGEST = 5120, 4, 8, 40
PLAIN = {
    "use_cpu": not torch.cuda.is_available(), "bf16": False, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 20, "gradient_checkpointing": False, "lr_scheduler_type": "cosine",
}  # fmt: skip
METHODS = ("start", "offline", "conditional", "online", "rloo", "grpo")
ABOUT = {
    "start": "the start", "offline": "NCA on the bundled scores", "conditional": "conditional training, the best asked",
    "online": "NCA on own samples (--online)", "rloo": "TRL's RLOOTrainer", "grpo": "TRL's GRPOTrainer",
}  # fmt: skip


def held_out_reward(model: Any, tokenizer: Any, rows: Any) -> tuple[float, float]:
    """Mean reward of 4 samples of each prompt, and its standard error over prompts."""
    was_training = model.training
    prompts = rows["prompt"][:]
    with torch.no_grad():
        drawn = draw(
            model.eval(), [tokenizer(p)["input_ids"] for p in prompts], per_prompt=4, max_new_tokens=LONGEST,
            eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id,
            seeds=[seed_of(0, "online benchmark", i) for i in range(len(prompts))],
        )  # fmt: skip
    model.train(was_training)
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in drawn.completion_ids]
    means = [statistics.fmean(demo.reward([p] * 4, group)) for p, group in zip(prompts, texts, strict=True)]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


class Watch(TrainerCallback):
    """Measure at a number of samples and at a time, and stop when both are there. Times leave evaluation out."""

    def __init__(self, per_step: int, seconds: float, measure: Any) -> None:
        self.per_step, self.seconds, self.measure = per_step, seconds, measure
        self.found: dict[str, Any] = {}
        self.spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time() - self.began - self.spent
        reached = {"samples": state.global_step * self.per_step >= SAMPLES, "time": now >= self.seconds}
        for name, there in reached.items():
            if there and name not in self.found:
                before = time.process_time()
                self.found[name] = {"reward": self.measure()[0], "seconds": now}
                self.found[name]["samples"] = state.global_step * self.per_step
                self.spent += time.process_time() - before
        control.should_training_stop = all(reached.values())


def run(method: str, seed: int, changes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Train, and return reward, seconds and samples."""
    set_seed(seed)
    data, tokenizer = demo.load_reward_dataset(), AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    train, test = data["train"], data["test"]
    prompts = train.select_columns(["prompt"])
    given = {"model": demo.MODEL_PATH, "processing_class": tokenizer}
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "seed": seed, **PLAIN}
        if method == "start":
            model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
            return {"reward": held_out_reward(model, tokenizer, test)[0], "seconds": 0.0, "samples": 0}
        if method in ("rloo", "grpo"):
            import trl

            kind = method.upper()
            options |= {"per_device_train_batch_size": 64, "num_generations": K, "max_completion_length": LONGEST}
            options |= {"learning_rate": 1e-3, "beta": 0.0, "lr_scheduler_type": "constant", "max_steps": 400}
            args = getattr(trl, f"{kind}Config")(**{**options, **changes})
            trainer = getattr(trl, f"{kind}Trainer")(
                **given, args=args, train_dataset=prompts, reward_funcs=demo.reward
            )
            watch = Watch(64, seconds, lambda: held_out_reward(trainer.model, tokenizer, test))
            trainer.add_callback(watch)
            trainer.train()
            return {**watch.found["samples"], "same_time": watch.found["time"]}
        if method == "offline":
            args = ContrastiveConfig(
                **{
                    **options,
                    "learning_rate": 3e-4,
                    "per_device_train_batch_size": 16,
                    "num_train_epochs": 1,
                    **changes,
                }
            )
            trainer = ContrastiveTrainer(**given, args=args, train_dataset=train)
        elif method == "conditional":
            rounds = {"prompts_per_round": 128, "num_generations": 10, "draws_per_round": 5120, "num_train_epochs": 4}
            rounds |= {"max_completion_length": LONGEST, "learning_rate": 4e-3, "per_device_train_batch_size": 64}
            args = ConditionalConfig(**{**options, **rounds, **changes})
            trainer = ConditionalTrainer(**given, args=args, train_dataset=prompts, reward_funcs=demo.reward)
        else:
            args = ContrastiveConfig(**{**options, **ONLINE, **changes})
            trainer = ContrastiveTrainer(**given, args=args, train_dataset=prompts, reward_funcs=demo.reward)
        began = time.process_time()
        trainer.train()
        found: dict[str, Any] = {"seconds": time.process_time() - began}
        if method == "conditional":
            best = next(iter(trainer.condition.askable()))
            rewards = trainer.rewards_given(test, conditions=[best])[best]
            found["reward"] = float(rewards.mean())
        else:
            found["reward"] = held_out_reward(trainer.model, tokenizer, test)[0]
        rounds_logged = [row for row in trainer.state.log_history if "round/number" in row]
        found["samples"] = sum(row["round/samples"] for row in rounds_logged)
        found["rounds"] = [round(row["round/mean_reward"], 4) for row in rounds_logged]
        found["kl"] = [round(row["round/kl_start"], 2) for row in rounds_logged if "round/kl_start" in row]
        return found


# As ``contrastive-align reward --online`` on the bundled model has them.
ONLINE = {
    "online": True, "num_rounds": ROUNDS, "num_generations": K, "prompts_per_round": SAMPLES // ROUNDS // K,
    "max_completion_length": LONGEST, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "beta": 0.1,
    "max_length": 512,
}  # fmt: skip


def parsed(pair: str) -> tuple[str, Any]:
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def table(lines: list[dict[str, Any]]) -> str:
    """Return the means over seeds, with standard errors."""
    rows = ["| method | seeds | samples | reward | processor seconds | reward at online's time |", "|" + "---|" * 6]
    for method in METHODS:
        found = [line for line in lines if line["method"] == method and not line["changes"]]
        if not found:
            continue

        def cell(values: list[float], digits: int = 3) -> str:
            error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.{digits}f}{error}" if values else ""

        same = [line["same_time"]["reward"] for line in found if "same_time" in line]
        cells = [ABOUT[method], str(len(found)), f"{found[0]['samples']:,}", cell([line["reward"] for line in found])]
        rows.append(f"| {' | '.join([*cells, cell([line['seconds'] for line in found], 0), cell(same)])} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of the trainers")
    parser.add_argument("--seconds", type=float, help="of the second measurement, if online was not run")
    parser.add_argument("--out", type=Path, default=Path("runs/online_benchmark.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.touch()
    changes = dict(map(parsed, args.set))
    for seed in () if args.table else args.seeds:
        for method in args.methods:
            lines = [json.loads(line) for line in args.out.read_text().splitlines()]
            known = {line["method"]: line for line in lines if line["seed"] == seed and not line["changes"]}
            if any((x["method"], x["seed"], x["changes"]) == (method, seed, changes) for x in lines):
                continue
            seconds = args.seconds or known.get("online", {}).get("seconds", 0.0)
            found = {"method": method, "seed": seed, "changes": changes, **run(method, seed, changes, seconds)}
            print(json.dumps(found), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
