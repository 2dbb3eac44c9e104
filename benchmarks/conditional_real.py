"""Conditional training on real data: toxic and clean continuations, and answers that a judge reads.

    CONTRASTIVE_ALIGN_DATA=path/to/data CONTRASTIVE_ALIGN_MODELS=path/to/models python benchmarks/conditional_real.py

1. ``toxicity_continuations.jsonl``, offline: five pooled quantiles of toxicity (the least is the best), as tokens and
   as phrases; completions without a score are left out and counted. Of held-out continuations in the cleanest and the
   most toxic quantile: how much likelier they are under the best condition than under the worst, in nats per token,
   before and after training. A condition that says something makes clean ones likelier (above 0), toxic ones less so.
2. ``qa_feedback_groups.jsonl`` through the judge: questions, answers sampled from the model in two rounds, categories
   from a local server that speaks the OpenAI protocol and fails now and then.

Model: gsm8k-sft-5m. About five minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


os.environ.setdefault("CI", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from datasets import Dataset
from judge_server import JudgeServer
from transformers import AutoTokenizer

from contrastive_align import ConditionalConfig, ConditionalTrainer
from contrastive_align.conditions.judged import CATEGORIES
from contrastive_align.conditions.scored_rows import read_scored
from contrastive_align.judge.judge import Judge
from contrastive_align.pool import quantiles


HELD_OUT = 600
ROOM = 900  # tokens of a question: the model has 1,024
CONDITIONS = {
    "tokens": {"kind": "quantile_tokens", "per_prompt": False},
    "phrases": {"kind": "phrases", "phrases": "toxicity", "per_prompt": False},
}


def rows_of(name: str) -> list[dict]:
    path = Path(os.environ["CONTRASTIVE_ALIGN_DATA"]) / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config(folder: str, **options) -> ConditionalConfig:
    return ConditionalConfig(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=50,
        **options,
    )


def preference(trainer: ConditionalTrainer, samples: list, which: np.ndarray) -> tuple[float, float]:
    """Mean over completions, and its standard error, of [log p(y|best) - log p(y|worst)] / tokens."""
    texts = list(trainer.condition.askable().values())
    chosen = [samples[i] for i in which]
    best, worst = (trainer.nll_given(chosen, [text] * len(chosen)) for text in (texts[0], texts[-1]))
    values = (worst[0] - best[0]) / best[1]
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def toxicity(model: str, epochs: int, rate: float, kl_coef: float) -> None:
    rows = [
        {
            "prompt": r["prompt"],
            "completion": r["completion"],
            "score": None if r["toxicity"] is None else -r["toxicity"],
        }
        for r in rows_of("toxicity_continuations.jsonl")
        if r["prompt"] and r["completion"]
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    test, train = (Dataset.from_list([rows[i] for i in part]) for part in (order[:HELD_OUT], order[HELD_OUT:]))
    print("| condition | held-out | before, nats per token | after |\n| --- | --- | --- | --- |")
    for name, condition in CONDITIONS.items():
        with TemporaryDirectory() as folder:
            args = config(
                folder,
                num_train_epochs=epochs,
                learning_rate=rate,
                kl_coef=kl_coef,
                max_length=256,
                per_device_train_batch_size=32,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
            )
            trainer = ConditionalTrainer(model, args, train_dataset=train, condition=condition)
            samples, _ = read_scored(test, trainer.processing_class, max_length=256)
            label = quantiles([s.score for s in samples])
            ends = {"clean": np.flatnonzero(label == 0), "toxic": np.flatnonzero(label == 4)}
            before = {what: preference(trainer, samples, which) for what, which in ends.items()}
            trainer.train()
            for what, which in ends.items():
                mean, se = preference(trainer, samples, which)
                start, start_se = before[what]
                print(f"| {name} | {what} ({len(which)}) | {start:+.4f} +- {start_se:.4f} | {mean:+.4f} +- {se:.4f} |")
            report = trainer.data_report
    print(f"Training data: {report}")


def judged(model: str) -> None:
    categories = CATEGORIES["harmless_helpful"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    form = "Question: {}\nAnswer: "
    prompts = [form.format(r["prompt"]) for r in rows_of("qa_feedback_groups.jsonl")]
    short = [p for p in prompts if len(tokenizer(p)["input_ids"]) <= ROOM]

    def answer(text: str) -> str:
        return json.dumps({"analysis": "...", "category": categories[len(text) % len(categories)]})

    def behaviour(text: str, attempt: int) -> str:
        return ("500", "nonsense", "429", "cut json")[len(text) % 4] if attempt == 0 and len(text) % 5 == 0 else "good"

    with TemporaryDirectory() as folder, JudgeServer(answer, behaviour) as server:
        judge = Judge(
            "helpful_categories", model="local", answers=categories, base_url=server.url, cache=f"{folder}/cache"
        )
        args = config(
            f"{folder}/run",
            num_train_epochs=2,
            prompts_per_round=32,
            num_generations=4,
            max_completion_length=48,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
        )
        data = Dataset.from_dict({"prompt": short})
        trainer = ConditionalTrainer(model, args, train_dataset=data, judge=judge, condition="categories")
        trainer.train()
        table = trainer.pool.table()
        counts = {name: int((table.label == i).sum()) for i, name in enumerate(categories)}
        print(f"\nqa_feedback: {len(short)} of {len(prompts)} questions are short enough; judged: {judge.report()}")
        print(f"The pool after two rounds: {counts}; left out: {int((table.label < 0).sum())}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: gsm8k-sft-5m in CONTRASTIVE_ALIGN_MODELS)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--parts", nargs="+", choices=["toxicity", "judge"], default=["toxicity", "judge"])
    args = parser.parse_args()
    model = args.model or str(Path(os.environ["CONTRASTIVE_ALIGN_MODELS"]) / "gsm8k-sft-5m")
    if "toxicity" in args.parts:
        toxicity(model, args.epochs, args.learning_rate, args.kl_coef)
    if "judge" in args.parts:
        judged(model)


if __name__ == "__main__":
    main()
