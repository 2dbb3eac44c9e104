"""Seconds of an f-DPG step, beside TRL's RLOOTrainer on the same work and beside the least that the step takes.

    CONTRASTIVE_ALIGN_DATA=path/to/data CONTRASTIVE_ALIGN_MODELS=path/to/models python benchmarks/fdpg_step.py
    python benchmarks/fdpg_step.py --model a/folder --prompts 4 --k 32 --new-tokens 64 --json step.json

The work of a step: 8 prompts (GSM8K questions), 16 samples each of 32 new tokens, their log-probs under a frozen base,
one feature of their texts, one optimiser step. fp32, one process, the prompts of a step the same for all three; they
take turns step by step, and the first two steps of each are not counted.

- ``ours``: FDPGTrainer on base * exp(feature / beta).
- ``trl``: RLOOTrainer with the feature as its reward function and the same beta, which is the same objective under
  reverse KL; it samples by transformers' ``generate``. Both trainers have the same AdamW and no gradient checkpointing.
- ``floor``: no trainer. ``generate`` of all samples in one call; a forward pass without gradient; a forward and a
  backward pass. The passes are over unique tokens: ``completion_logps(layout="shared")``, where each prompt stands once
  for its 16 completions. No texts, no features, no optimiser.

No token ends a completion, on any side, so that all of them sample just as many; the mean lengths are in the table.

Columns: the median of the seconds; of their parts: sampling, scoring (log-probs of what was sampled, features,
metrics), gradient (forward, backward, optimiser); the tokens of a completion.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


os.environ.setdefault("CI", "1")  # no telemetry from a benchmark

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from contrastive_align import FDPGConfig, FDPGTrainer
from contrastive_align.data import GroupCollator
from contrastive_align.models import completion_logps
from contrastive_align.models.layout import set_layout


MODEL, PROMPTS = "gsm8k-sft-5m", "gsm8k_groups.jsonl"
FORM = "Question: {}\nAnswer: "
WARM_UP = 2
PARTS = ("sampling", "scoring", "gradient")
NO_EOS = [-1]  # no token has this id
BETA = 0.1


def dollars(completions: list[str], **columns: Any) -> list[float]:
    """The feature: whether a completion speaks of dollars."""
    return [float("$" in text) for text in completions]


class Contender:
    """Something that takes steps; ``seconds`` and ``tokens`` have an entry for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {part: [] for part in ("total", *PARTS)}
        self.tokens: list[float] = []
        self._inside: dict[str, float] = {}

    def step(self, prompts: list[str]) -> None:
        """Sample, score, and take an optimiser step; note how long each took."""
        self._inside = {"sampling": 0.0, "prepared": 0.0}
        started = time.perf_counter()
        self._take(prompts)
        total = time.perf_counter() - started
        sampling, prepared = self._inside["sampling"], self._inside["prepared"]
        for name, value in zip(self.seconds, (total, sampling, prepared - sampling, total - prepared), strict=True):
            self.seconds[name].append(value)

    def _take(self, prompts: list[str]) -> None:
        raise NotImplementedError

    def _timed(self, name: str, function: Callable) -> Callable:
        """The function, its seconds added to those of ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside[name] += time.perf_counter() - started

        return timed

    def row(self) -> dict[str, Any]:
        counted = {name: values[WARM_UP:] for name, values in self.seconds.items()}
        medians = {name: statistics.median(values) for name, values in counted.items()}
        return {"median": medians, "seconds": counted, "tokens": statistics.mean(self.tokens[WARM_UP:])}


class Trainer(Contender):
    """One of the two trainers, its ``training_step`` and its optimiser."""

    def __init__(self, cls: type, config: type, folder: str, args: argparse.Namespace, **options: Any) -> None:
        super().__init__()
        rows = args.prompts * args.k
        self.k = args.k
        self.trainer = cls(
            model=str(args.model),
            reward_funcs=dollars,
            args=config(
                output_dir=f"{folder}/{cls.__name__}", use_cpu=True, bf16=False, report_to="none", beta=BETA,
                model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False, disable_tqdm=True,
                per_device_train_batch_size=rows, num_generations=args.k, max_completion_length=args.new_tokens,
                learning_rate=1e-6, **options,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * args.prompts),  # ``step`` is given its prompts
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        trainer = self.trainer
        trainer.eos_token_ids = NO_EOS
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = None
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        sampling = "_draw" if cls is FDPGTrainer else "_generate"
        setattr(trainer, sampling, self._timed("sampling", getattr(trainer, sampling)))
        trainer._prepare_inputs = self._timed("prepared", trainer._prepare_inputs)

    def _take(self, prompts: list[str]) -> None:
        trainer = self.trainer
        rows = [{"prompt": p} for p in prompts for _ in range(self.k)]
        trainer.training_step(trainer.model, rows, None)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        self.tokens.append(trainer._metrics["train"]["completions/mean_length"][-1])


class Floor(Contender):
    """What no step can do without, by plain transformers and one pass over every token that is not a copy."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        self.sampled = self._load(args)  # its attention stays as it is
        self.policy, base = (self._load(args) for _ in range(2))
        self.base = base.requires_grad_(False)
        for model in (self.policy, self.base):
            add_fused_lm_head(model)
        set_layout([self.policy, self.base], "shared", obstacle=None)
        pad = self.tokenizer.pad_token_id
        self.generation = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new_tokens, pad_token_id=pad
        )
        self.sampled.generation_config = self.generation
        self.collate = GroupCollator(pad)
        self.k = args.k

    @staticmethod
    def _load(args: argparse.Namespace) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def _take(self, prompts: list[str]) -> None:
        batch = self._timed("prepared", self._prepared)(prompts)
        completion_logps(self.policy, batch, layout="shared", token_stats=False).logps.mean().backward()
        self.policy.zero_grad()

    @torch.no_grad()
    def _prepared(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        inputs = self.tokenizer([p for p in prompts for _ in range(self.k)], return_tensors="pt", padding=True)
        ids = self._timed("sampling", self.sampled.generate)(
            inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=self.generation
        )
        completions = ids[:, inputs.input_ids.size(1) :].view(len(prompts), self.k, -1)
        self.tokens.append(completions.size(2))
        rows = zip(self.tokenizer(prompts).input_ids, completions.tolist(), strict=True)
        batch = self.collate([{"prompt_ids": p, "completion_ids": c, "scores": [0.0] * self.k} for p, c in rows])
        completion_logps(self.base, batch, layout="shared", token_stats=False)
        return batch


def prompts_of(path: Path, steps: int, a_step: int) -> list[list[str]]:
    """The first questions of the file, ``a_step`` for each step."""
    with open(path, encoding="utf-8") as file:
        found = [FORM.format(json.loads(line)["prompt"]) for line, _ in zip(file, range(steps * a_step), strict=False)]
    if len(found) < steps * a_step:
        sys.exit(f"{path} has {len(found)} prompts, and {steps} steps of {a_step} need {steps * a_step}.")
    return [found[i : i + a_step] for i in range(0, len(found), a_step)]


def measured(args: argparse.Namespace) -> dict[str, dict]:
    """Contender -> its row, after ``args.steps`` counted steps of each in turns."""
    steps = prompts_of(args.data, WARM_UP + args.steps, args.prompts)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        torch.manual_seed(0)
        contenders = {
            "ours": Trainer(FDPGTrainer, FDPGConfig, folder, args, divergence="reverse_kl"),
            "trl": Trainer(RLOOTrainer, RLOOConfig, folder, args),
            "floor": Floor(args),
        }
        for i, prompts in enumerate(steps):
            for name, contender in contenders.items():
                contender.step(prompts)
                print(f"step {i}, {name}: {contender.seconds['total'][-1]:.3f} s", file=sys.stderr, flush=True)
        return {name: contender.row() for name, contender in contenders.items()}


def table(rows: dict[str, dict]) -> str:
    lines = [["", "seconds a step", "from", "to", *PARTS, "tokens a completion"], ["---"] * (5 + len(PARTS))]
    for name, row in rows.items():
        total = row["seconds"]["total"]
        seconds = [row["median"]["total"], min(total), max(total), *(row["median"][part] for part in PARTS)]
        lines.append([name, *(f"{s:.3f}" for s in seconds), f"{row['tokens']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    ours, trl, floor = (rows[name]["median"]["total"] for name in ("ours", "trl", "floor"))
    return {"trl_over_ours": trl / ours, "ours_over_floor": ours / floor}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each, after two more")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--k", type=int, default=16, help="samples of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--model", type=Path, help=f"a folder (default: {MODEL} in CONTRASTIVE_ALIGN_MODELS)")
    parser.add_argument("--data", type=Path, help=f"a .jsonl with prompts (default: CONTRASTIVE_ALIGN_DATA/{PROMPTS})")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured there")
    args = parser.parse_args(argv)
    for name, variable, file in (("model", "MODELS", MODEL), ("data", "DATA", PROMPTS)):
        folder = os.environ.get(f"CONTRASTIVE_ALIGN_{variable}")
        if getattr(args, name) is None and folder is None:
            parser.error(f"give --{name}, or set CONTRASTIVE_ALIGN_{variable} to the folder that holds {file}")
        setattr(args, name, getattr(args, name) or Path(folder) / file)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    rows = measured(args)
    found = ratios(rows)
    print(
        f"{args.model.name}: {args.prompts} prompts x {args.k} samples x {args.new_tokens} tokens, "
        f"{torch.get_num_threads()} threads, medians of {args.steps} steps"
    )
    print(table(rows))
    print(
        f"TRL takes {found['trl_over_ours']:.2f} times as long as ours; ours {found['ours_over_floor']:.2f} times the "
        "floor."
    )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **found, "threads": torch.get_num_threads()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
