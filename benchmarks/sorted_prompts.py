"""A target fitted on prompts in an order that means something: has it the wanted moment on all of them?

    python benchmarks/sorted_prompts.py                                # 40 repeats of each order
    python benchmarks/sorted_prompts.py --variants "by topic" --repeats 4
    python benchmarks/sorted_prompts.py --head --repeats 4             # what a fit on the head of the file gives

In every variant the prompts with a high base moment come first. A repeat makes an ``FDPGTrainer`` with a seed of its
own, whose ``fit_target`` finds the lambda of moment 0.5 from at most 2,048 samples (65,536, the default, for the rare
name), and measures the moment of this target on 200 prompts chosen at random, 16 fresh samples each. A repeat takes
some three seconds of a processor (half a minute for the rare name).

The error of a repeat is the moment less 0.5. Its standard error is the one behind a run's last words: the spread
between the prompts measured, which contains the noise of their samples, together with the error of the fit, which
contains the choice of its own prompts. Both choices differ in every repeat.

A name that a prompt does not ask for is in one of 250 completions: weighted samples of the base would underestimate its
moment. As many samples are then drawn for the same prompt with this name, and all are weighted by the mixture they come
from.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers.utils import logging

from contrastive_align import Constraint, FDPGConfig, FDPGTrainer, Target, demo
from contrastive_align.data.formats import random_prompts
from contrastive_align.demo.task import parse_prompt
from contrastive_align.losses import average_estimate, estimate_moments
from contrastive_align.sampling import PolicyProposal, Samples
from contrastive_align.sampling.decode import score
from contrastive_align.trainers import fdpg


WANTED, LONGEST = 0.5, 12
FIT_SAMPLES, MOST, MOST_IF_RARE = 1024, 2048, 65536
PROMPTS, PER_PROMPT = 200, 16
HOUSE = ("door", "window", "lamp", "table", "floor", "light", "gate", "fence", "car")


@dataclass(frozen=True)
class Variant:
    """Prompts in an order, and the feature by which they differ."""

    prompts: list[str]
    feature: Any
    most: int = MOST  # samples of the fit
    named: str | None = None  # a name that is the feature


def eight_words(completions: list[str], **columns: Any) -> list[float]:
    """1.0 for each completion of at least eight words."""
    return [float(len(text.split()) >= 8) for text in completions]


def variants() -> dict[str, Variant]:
    """Return the orders of the bundled training prompts, by name."""
    prompts = list(dict.fromkeys(demo.load_reward_dataset()["train"]["prompt"]))
    names, tasks = zip(*map(parse_prompt, prompts), strict=True)
    often = max(sorted(set(names)), key=names.count)
    early = [name for name in sorted(set(names)) if name < "K"]
    house = [task for task in sorted(set(tasks)) if task.split()[-1] in HOUSE]

    def ordered(key: Callable[[str], Any]) -> list[str]:
        return sorted(prompts, key=key)

    return {
        "one name first": Variant(
            ordered(lambda p: parse_prompt(p)[0] != often), {"words": [often]}, MOST_IF_RARE, often
        ),
        "by name": Variant(ordered(lambda p: parse_prompt(p)[0]), {"words": early}),
        "by length": Variant(ordered(lambda p: -len(p.split())), eight_words),
        "by topic": Variant(ordered(lambda p: parse_prompt(p)[1] not in house), {"words": [*HOUSE]}),
        "two sources": Variant([f"{p}Could you" for p in prompts[:300]] + prompts[300:], {"contains": "please"}),
    }


def fitted(variant: Variant, seed: int, *, head: bool = False, **options: Any) -> FDPGTrainer:
    """Return a trainer whose target is fitted as a run does it, or on the first prompts of the file."""
    rows = Dataset.from_dict({"prompt": variant.prompts})
    target = Target([Constraint(variant.feature, WANTED)])
    options = {"fit_samples": FIT_SAMPLES, "fit_max_samples": variant.most, "seed": seed, **options}
    options |= {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": LONGEST}
    options |= {"max_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        args = FDPGConfig(output_dir=folder, **options)
        trainer = FDPGTrainer(demo.MODEL_PATH, args=args, train_dataset=rows, target=target)
        first = patch.object(fdpg, "random_prompts", lambda rows, at_most, seed: list(rows.select(range(at_most))))
        with first if head else nullcontext():
            trainer.fit_target()
    return trainer


def measured(trainer: FDPGTrainer, variant: Variant, rows: list[str], n: int, seed: int) -> tuple[float, ...]:
    """Return the moment of the trainer's target on n samples of each of some prompts, and its standard error."""
    sources, target, tokenizer = [rows], trainer.target, trainer.processing_class
    if variant.named:
        sources.append([prompt.replace(str(parse_prompt(prompt)[0]), variant.named) for prompt in rows])
    with trainer.sampling_from(reference=True) as model:
        stops = {"max_new_tokens": LONGEST, "eos_token_ids": trainer.eos_token_ids}
        proposal = PolicyProposal(model, tokenizer, seed=seed, **stops)

        def logps(source: list[str], drawn: Samples) -> torch.Tensor:
            prompts = [ids for ids in trainer.prompt_ids_of(source) for _ in range(n)]
            return score(model, prompts, drawn.completion_ids, pad_token_id=tokenizer.pad_token_id).view(-1, n)

        parts = [proposal.sample(source, n) for source in sources]
        if len(sources) == 1:
            under = parts[0].logps.view(1, -1, n)
        else:
            under = torch.stack([torch.cat([logps(source, part) for part in parts], 1) for source in sources])
    given = [prompt for prompt in rows for _ in range(n)]
    each = [target.features(given, part.completions, completion_ids=part.completion_ids) for part in parts]
    phi = torch.cat([values.view(len(rows), n, -1) for values in each], 1)
    mixture = under.logsumexp(0) - math.log(len(sources))
    found = average_estimate(estimate_moments(phi, target.log_scores(under[0], phi), mixture))
    return found.value.item(), found.se.item()


def repeat(
    variant: Variant, seed: int, *, prompts: int = PROMPTS, per_prompt: int = PER_PROMPT, **options: Any
) -> dict[str, float]:
    """Fit and measure once: return the moment of the target, its standard error, and the base moment of the fit."""
    trainer = fitted(variant, seed, **options)
    rows = random_prompts([{"prompt": prompt} for prompt in variant.prompts], prompts, seed=1_000_000 + seed)
    moment, error = measured(trainer, variant, [row["prompt"] for row in rows], per_prompt, seed)
    fit = trainer.target.last_fit
    return {
        "moment": moment,
        "se": math.hypot(error, fit.moment_se.item()),
        "base": fit.base_moments.item(),
        "prompts": len(fit.log_z),
    }


def row_of(name: str, found: list[dict[str, float]]) -> str:
    """Return the line of the table for the repeats of a variant."""
    errors = [one["moment"] - WANTED for one in found]
    sizes = [abs(error) / one["se"] for error, one in zip(errors, found, strict=True)]
    base, moment, se = (statistics.fmean(one[key] for one in found) for key in ("base", "moment", "se"))
    error = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    covered, near = (sum(size <= limit for size in sizes) for limit in (2, 3))
    mean = f"{statistics.fmean(errors):+.4f} +- {error:.4f}"
    return f"| {name} | {base:.3f} | {moment:.3f} | {se:.3f} | {near} | {covered} of {len(found)} | {mean} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    orders = variants()
    parser.add_argument("--variants", nargs="+", choices=list(orders), default=list(orders))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--head", action="store_true", help="fit on the head of the file instead")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| order | base moment | moment of the target | its se | within 3 se | within 2 se | mean error |")
    print("|---|---|---|---|---|---|---|")
    for name in args.variants:
        found = []
        for seed in range(args.repeats):
            found.append(repeat(orders[name], seed, head=args.head))
            print(f"{name}, repeat {seed}: {found[-1]}", file=sys.stderr, flush=True)
        print(row_of(name, found), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
