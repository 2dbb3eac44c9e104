"""``contrastive-align fdpg``: train towards a target on prompts, with samples of the model."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoConfig

from contrastive_align.data import random_prompts
from contrastive_align.launch.arguments import Arguments, RunArguments, load_yaml, option, read_spec
from contrastive_align.launch.common import Run, model_arguments, picture_saved
from contrastive_align.launch.datasets import only_prompts, repeat
from contrastive_align.launch.feedback_flags import check_models
from contrastive_align.launch.measure import (
    SAMPLES_PER_PROMPT,
    measure,
    metrics_of,
    missed_moments,
    prompts_enough_for,
    words_on,
)
from contrastive_align.launch.usage import UsageError
from contrastive_align.losses import DIVERGENCES
from contrastive_align.models.loading import adapter_config_path
from contrastive_align.ranges import Range
from contrastive_align.report import TargetSummary, plot_steps
from contrastive_align.targets import Target, resolve_constraint, reward_arguments, weighted_sum
from contrastive_align.trainers import FDPGConfig, FDPGTrainer


DEMO_FEATURES = [{"contains": "please", "moment": 0.5}]
PICTURE = "moments_and_divergences.png"
FEW_PROMPTS = {"max_steps": 100}  # a pass over one prompt is one step


@dataclass
class FDPGArguments(RunArguments):
    """Name the prompts, the target, and the extent of the measurement.

    ``features`` are constraints, each a feature (see ``targets.features``) with its moment: a list in YAML, its text on
    the command line. The prompts to measure are of the evaluation split if there is one, and so few that each has 50
    samples.
    """

    ALIASES: ClassVar[dict[str, str]] = {"reward_funcs": "reward"}
    RANGES: ClassVar[dict[str, Range]] = {"eval_prompts": Range(1, whole=True)}

    prompt: str | None = option(None, "A single prompt to sample from, instead of a dataset.")
    columns: dict | str | None = option(
        None, "Which column holds the prompt, where its name does not say so: prompt=question."
    )
    features: list | str | None = option(
        None, "The target's constraints, such as '[{contains: please, moment: 0.5}]': please in half of the samples."
    )
    reward: list[str] | None = option(
        None, "file.py:function or reward-model ids. The target is base * exp(reward / beta)."
    )
    eval_samples: int = option(
        10_000, "Number of samples of base, trained model and QRS that the result is measured on; 0 measures none."
    )
    eval_prompts: int = option(100, "Largest number of prompts that eval_samples are spread over.")
    qrs_acceptance: float = option(
        0.5, "Acceptance rate that QRS (quasi-rejection sampling) aims at after training; 0 runs no QRS."
    )

    def __post_init__(self):
        super().__post_init__()
        self.reward = self.reward and [read_spec("reward", spec) for spec in self.reward]
        if isinstance(self.features, str):
            self.features = load_yaml(self.features, f"features is {self.features!r}, which")
        if self.features is not None and not (isinstance(self.features, list) and self.features):
            raise ValueError(f"features is {self.features!r}, expected a list: [{{contains: please, moment: 0.5}}].")
        if self.features and self.reward:
            raise ValueError("both features and reward are given. Give one: constraints, or rewards to raise.")
        if 0 < self.eval_samples < SAMPLES_PER_PROMPT:
            raise ValueError(
                f"eval_samples is {self.eval_samples}, expected at least {SAMPLES_PER_PROMPT}, or 0 for none. "
                "From so few samples of a prompt every divergence comes out too small, from one as 0."
            )


class FDPGRun(Run):
    """The run of ``contrastive-align fdpg``."""

    command = "fdpg"
    arguments_class, config_class = FDPGArguments, FDPGConfig
    demo_model: ClassVar[dict[str, Any]] = {"max_completion_length": 48, "learning_rate": 3e-4}
    demo_data: ClassVar[dict[str, Any]] = {
        **{"max_steps": 60, "per_device_train_batch_size": 256, "num_generations": 16, "logging_steps": 1},
        **{"eval_samples": 15_000, "eval_prompts": 200},
    }
    summary_class = TargetSummary

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Return what the command line leaves out; refuse a run without a target."""
        script = args.script
        defaults = super().defaults(args)
        if only_prompts(script):
            defaults |= FEW_PROMPTS
        if "num_train_epochs" in args.given:
            defaults["max_steps"] = -1  # the epochs decide
        if not script.features and not script.reward:
            if not args.bundled_data or args.model.model_name_or_path is not None:
                raise UsageError(
                    "nothing to train towards. Give --features='[{contains: please, moment: 0.5}]' (or a list in a "
                    "YAML), or --reward=file.py:function."
                )
            defaults["features"] = DEMO_FEATURES
        for name in ("beta", "reward_weights"):
            if name in args.given and not script.reward:
                raise UsageError(f"--{name} belongs to --reward, which is not given. Leave it out.")
        return defaults

    def build_trainer(self, checkpoint: str | bool | None) -> FDPGTrainer:
        """Build the target and the trainer, and choose the rows to measure."""
        args, prompts, target = self.args, _prompts_per_step(self.args.training), _build_target(self.args)
        rows, model = self.train_rows, model_arguments(args)
        if len(rows) < prompts:
            args.notes.append(f"a step takes {prompts} prompts of {len(rows)}: each is used more than once in it")
        if model["peft_config"] is not None and "lora_task_type" not in args.given and _is_encoder_decoder(args):
            model["peft_config"].task_type = "SEQ_2_SEQ_LM"  # AutoPeftModelForSeq2SeqLM requires it
        evaluated = self.test_rows if args.training.eval_strategy != "no" else None
        trainer = FDPGTrainer(train_dataset=repeat(rows, prompts), eval_dataset=evaluated, target=target, **model)
        usable = trainer.train_dataset if self.test_rows is None else trainer.usable_rows(self.test_rows, "test")
        self.measured_rows, self.measured_on = _rows_to_measure(args, usable, held_out=self.test_rows is not None)
        return trainer

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Name the divergence, the target and the extent of a step."""
        training, target = self.args.training, self.trainer.target
        prompts = _prompts_per_step(training)
        step = f"{prompts} prompts x {training.num_generations} samples a step"
        return f"f-DPG, {DIVERGENCES.describe(training.divergence)}, towards {target}; {step}", {
            "divergence": training.divergence,
            "target": target.state_dict(),
            **self.options("baseline", "learning_rate", "num_generations"),
            "prompts_per_generation": prompts,
            **self.options("max_completion_length", "seed"),
        }

    def rewards_of(self) -> tuple[Any, str]:
        """Score samples by the first feature of the target."""
        target, tokenizer = self.trainer.target, self.trainer.processing_class

        def first_feature(rows: list[dict[str, Any]], texts: list[list[str]]) -> list[list[float]]:
            tokens = [tokenizer(group, add_special_tokens=False)["input_ids"] for group in texts]
            phi = target.features(**reward_arguments(rows, tokens, texts), trainer_state=self.trainer.state)
            return phi[:, 0].view(len(texts), -1).tolist()

        return first_feature, target.names[0]

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """Count the rows, and say how many prompts are too long and left out."""
        found, long = super().describe_data(), self.trainer.data_report.get("too_long", 0)
        notes = [f"{long} prompts are too long and left out"] if long else []
        found["train"] |= {"notes": notes, "too_long": long}
        return found

    def after_saving(self) -> None:
        """Write ``target.json`` and the picture."""
        target, folder = self.trainer.target, Path(self.args.training.output_dir)
        self.summary.training["target"] = target.state_dict()
        if self.trainer.args.should_save:
            target.save(folder / "target.json")
            moments = [None if math.isnan(moment) else moment for moment in target.moments.tolist()]
            wanted = dict(zip(target.names, moments, strict=True))
            with picture_saved(self.summary, folder / PICTURE):
                plot_steps(self.trainer.state.log_history, wanted, folder / PICTURE)

    def measure(self) -> None:
        """Measure base, target, tuned model and quasi-rejection sampling on the same prompts."""
        script, summary, target = self.args.script, self.summary, self.trainer.target
        if not script.eval_samples:
            return
        started = time.perf_counter()
        acceptance, seed = script.qrs_acceptance or None, self.args.training.seed
        columns, remarks, summary.tradeoff = measure(
            self.trainer, self.measured_rows, samples=script.eval_samples, acceptance=acceptance, seed=seed
        )
        summary.training["seconds_measuring"] = round(time.perf_counter() - started, 1)
        summary.distributions = columns
        summary.metrics = metrics_of(columns, target.names, target.moments.tolist(), len(self.measured_rows))
        summary.metrics_on = (
            f"{self.measured_on}, {columns['tuned']['samples']} samples of each distribution; pi is the column"
        )
        remarks += missed_moments(columns["target"], target) + target.unsure_moments()
        words = words_on(summary.metrics, self.args.training.divergence, held_out=self.test_rows is not None)
        summary.state = "\n".join([*words, *(f"note: {remark}" for remark in remarks)])


def _build_target(args: Arguments) -> Target:
    context = {"device": args.training.device, "trust_remote_code": args.training.trust_remote_code}
    if args.script.features:
        return Target([resolve_constraint(spec, **context) for spec in args.script.features])
    weights, args.training.reward_weights = args.training.reward_weights or None, None  # the target has them now
    reward = weighted_sum(args.script.reward, weights, name="reward", **context)
    check_models(args.script.reward)
    return Target.from_reward(reward, args.training.beta)


def _prompts_per_step(training: FDPGConfig) -> int:
    return training.generation_batch_size // training.num_generations


def _is_encoder_decoder(args: Arguments) -> bool:
    name, revision = args.model.model_name_or_path, args.model.model_revision
    if adapter := adapter_config_path(name, revision):
        return json.loads(Path(adapter).read_text())["task_type"] == "SEQ_2_SEQ_LM"
    trust = args.training.trust_remote_code
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust).is_encoder_decoder


def _rows_to_measure(args: Arguments, rows: Dataset, *, held_out: bool) -> tuple[list[Any], str]:
    samples, at_most = args.script.eval_samples, args.script.eval_prompts
    found = random_prompts(rows, at_most, seed=args.training.seed)
    chosen = found[: prompts_enough_for(samples, at_most)]
    if samples and len(chosen) < len(found):
        part = f"{len(chosen)} of {len(found)} prompts, {SAMPLES_PER_PROMPT} samples each"
        why = f"from fewer the divergences come out too small. --eval_samples={SAMPLES_PER_PROMPT * len(found)}"
        args.notes.append(f"eval_samples={samples} is measured on {part}: {why} is enough for all")
    where = "held-out" if held_out else "training"
    return chosen, f"{len(chosen)} {where} prompt{'s' * (len(chosen) != 1)}"
