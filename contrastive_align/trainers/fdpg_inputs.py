"""What FDPGTrainer is given, read before it trains: the target, the prompts and their order."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset, IterableDataset

from contrastive_align.targets import Target
from contrastive_align.trainers.fdpg_config import FDPGConfig
from contrastive_align.trl_seam import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order a function of seed and epoch, so that a run resumed in a later epoch continues it."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def target_of(target: Target | None, reward_funcs: Any, args: FDPGConfig) -> Target:
    """The target as given, or base * exp(weighted sum of rewards / beta)."""
    if target is not None:
        if not isinstance(target, Target):
            raise TypeError(f"target is a {type(target).__name__}, expected a contrastive_align.targets.Target.")
        if reward_funcs:
            raise ValueError("Both target and reward_funcs are given, expected one: put the rewards into the target.")
        if args.reward_weights is not None:
            raise ValueError("reward_weights weighs reward_funcs, and a target is given. Leave it out.")
        return target
    if not reward_funcs:
        raise ValueError(
            "Nothing to train towards. Give target=Target([...]), or reward_funcs for base * exp(reward / beta)."
        )
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(functions)} reward functions.")
    return Target.from_reward({"sum": [[w, f] for w, f in zip(weights, functions, strict=True)]}, args.beta)


def distinct_prompts(dataset: Dataset | IterableDataset, at_most: int) -> list[dict[str, Any]]:
    """A row for each prompt, the first ones."""
    rows: dict[str, dict[str, Any]] = {}
    for row in dataset:
        rows.setdefault(json.dumps(row["prompt"]), row)
        if len(rows) == at_most:
            break
    return list(rows.values())


def check_enough_prompts(dataset: Dataset | IterableDataset | None, args: FDPGConfig) -> None:
    """Refuse a dataset that does not fill one step: TRL's sampler leaves out what does not, and would train on nothing.

    Raises:
        ValueError: fewer rows than samples are drawn for at once, over all processes.
    """
    needed = args.generation_batch_size // args.num_generations
    if not isinstance(dataset, Dataset) or len(dataset) >= needed:
        return
    distinct = len(distinct_prompts(dataset, needed)) if "prompt" in dataset.column_names else 0
    raise ValueError(
        f"train_dataset has {len(dataset)} rows ({distinct} distinct prompts), and samples are drawn for {needed} at "
        f"once: generation_batch_size={args.generation_batch_size} samples over all processes, num_generations="
        f"{args.num_generations} for each. No step would be filled. Lower per_device_train_batch_size or "
        "steps_per_generation (gradient_accumulation_steps, where that is left out), raise num_generations, or repeat "
        f"the rows: concatenate_datasets([train_dataset] * {-(-needed // max(1, len(dataset)))})."
    )


def never_called(**columns: Any) -> list[float]:
    """TRL wants a reward function; features are read through the target."""
    raise AssertionError("TRL computed rewards by itself: FDPGTrainer's _prepare_inputs was not used.")
