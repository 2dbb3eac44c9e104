"""``run_fdpg.py``: train towards a target on prompts, with samples of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig

from contrastive_align import demo
from contrastive_align.launch.arguments import Arguments, RunArguments, UsageError, load_yaml, parse
from contrastive_align.launch.common import (
    Run,
    check_eval_flags,
    check_model_flags,
    model_arguments,
    model_entry,
    model_name,
    picture_saved,
    reference_line,
    versions,
)
from contrastive_align.launch.datasets import ONE_PROMPT, from_rows, load_prompts, prompts_to_measure, repeat, take
from contrastive_align.launch.measure import SAMPLES_PER_PROMPT, measure, metrics_of, prompts_enough_for
from contrastive_align.report import Summary, TargetSummary, plot_steps
from contrastive_align.targets import InfeasibleMoment, Target, resolve_constraint, weighted_sum
from contrastive_align.trainers import FDPGConfig, FDPGTrainer


DEMO_NAME = "the bundled demo prompts"
DEMO_FEATURES = [{"contains": "please", "moment": 0.5}]
PICTURE = "moments_and_divergences.png"
# Options for the bundled model and the bundled data that no flag or YAML file sets.
DEMO_MODEL = {"max_completion_length": 48, "learning_rate": 3e-4, "gradient_checkpointing": False}
DEMO_DATA = {
    "max_steps": 60,
    "per_device_train_batch_size": 256,
    "num_generations": 16,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "fit_samples": 65536,
    "eval_samples": 15_000,
    "eval_prompts": 200,
}
FEW_PROMPTS = {"max_steps": 100}  # a pass over one prompt is one step


@dataclass
class FDPGArguments(RunArguments):
    """Name the prompts, the target, and the extent of the measurement.

    Args:
        prompt: one prompt, instead of a dataset.
        features: constraints, each a feature with its moment: ``[{contains: please, moment: 0.5}]``, a list in YAML,
            its text on the command line (see ``targets.features`` for the kinds).
        reward_funcs: ``file.py:function`` or reward-model ids: the target is base * exp(weighted sum / beta).
        eval_samples: number of samples of each distribution measured at the end, at least 50; 0 measures nothing.
        eval_prompts: number of prompts that these samples are spread over, from the evaluation split if there is one.
            It is lowered until each prompt has 50 samples.
        qrs_acceptance: acceptance rate of quasi-rejection sampling; 0 skips it.
    """

    prompt: str | None = field(default=None, metadata={"help": "One prompt, instead of a dataset."})
    features: list | str | None = field(
        default=None, metadata={"help": "Constraints: '[{contains: please, moment: 0.5}]'."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "file.py:function or reward-model ids: base * exp(reward / beta)."}
    )
    eval_samples: int = field(default=10_000, metadata={"help": "Samples measured of each distribution; 0: none."})
    eval_prompts: int = field(default=100, metadata={"help": "At most so many prompts they are spread over."})
    qrs_acceptance: float = field(default=0.5, metadata={"help": "Wished acceptance rate of QRS; 0: no QRS."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.features, str):
            self.features = load_yaml(self.features, f"features is {self.features!r}, which")
        if self.features is not None and not (isinstance(self.features, list) and self.features):
            raise ValueError(f"features is {self.features!r}, expected a list: [{{contains: please, moment: 0.5}}].")
        if self.features and self.reward_funcs:
            raise ValueError("both features and reward_funcs are given. Give one: constraints, or rewards to raise.")
        if self.eval_samples < 0 or self.eval_prompts < 1:
            raise ValueError(
                f"eval_samples is {self.eval_samples} and eval_prompts {self.eval_prompts}, expected at least 0 and 1."
            )
        if 0 < self.eval_samples < SAMPLES_PER_PROMPT:
            raise ValueError(
                f"eval_samples is {self.eval_samples}, expected at least {SAMPLES_PER_PROMPT}, or 0 for none. "
                "From so few samples of a prompt every divergence comes out too small, from one as 0."
            )
        if not 0 <= self.qrs_acceptance <= 1:
            raise ValueError(f"qrs_acceptance is {self.qrs_acceptance}, expected a rate between 0 and 1.")


CLASSES = {"script": FDPGArguments, "training": FDPGConfig}


def main(argv: Sequence[str] | None = None) -> Summary:
    """Train a model towards a target as the command line says (see ``README.md``)."""
    return FDPGRun(_parse(argv)).execute()


class FDPGRun(Run):
    """The run of ``run_fdpg.py``."""

    user_errors = (InfeasibleMoment,)

    def build_trainer(self, checkpoint: str | bool | None) -> FDPGTrainer:
        """Load the prompts, build the target and the trainer, and choose the rows to measure."""
        args = self.args
        self.train_rows, self.test_rows, self.data_name = _load_data(args)
        self.hub_dataset = None if self.data_name in (DEMO_NAME, ONE_PROMPT) else self.data_name
        trainer = _build_trainer(args, self.train_rows, self.test_rows, _build_target(args))
        self.measured_rows, self.measured_on = _rows_to_measure(args, self.train_rows, self.test_rows)
        return trainer

    def describe(self) -> TargetSummary:
        """Name the divergence, the target, the model and the prompts."""
        trainer, training, target = self.trainer, self.args.training, self.trainer.target
        name, source = model_name(self.args), self.data_name
        a_step = training.generation_batch_size // training.num_generations
        step = f"{a_step} prompts x {training.num_generations} samples a step"
        return TargetSummary(
            method={
                "line": f"f-DPG, {training.divergence}, towards {target}; {step}",
                "trainer": type(trainer).__name__,
                "divergence": training.divergence,
                "target": target.state_dict(),
                "baseline": training.baseline,
                "learning_rate": training.learning_rate,
                "num_generations": training.num_generations,
                "prompts_per_generation": a_step,
                "max_completion_length": training.max_completion_length,
                "seed": training.seed,
            },
            model=model_entry(self.args, trainer, name, start=name),
            reference=reference_line(trainer, name),
            data={
                split: {"line": f"{source}: {len(rows)} prompts", "notes": [], "name": source, "rows": len(rows)}
                for split, rows in {"train": self.train_rows, "test": self.test_rows}.items()
                if rows is not None
            },
            versions=versions(),
        )

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
        columns, remarks = measure(
            self.trainer,
            self.measured_rows,
            samples=script.eval_samples,
            acceptance=script.qrs_acceptance or None,
            seed=self.args.training.seed,
        )
        summary.training["seconds_measuring"] = round(time.perf_counter() - started, 1)
        summary.distributions = columns
        summary.metrics = metrics_of(columns, target.names, target.moments.tolist(), len(self.measured_rows))
        n = columns["tuned"]["samples"]
        summary.metrics_on = f"{self.measured_on}, {n} samples of each distribution; pi is the column"
        summary.state = "\n".join(f"note: {remark}" for remark in remarks)


def _parse(argv: Sequence[str] | None) -> Arguments:
    args = parse(argv, prog="run_fdpg.py", **CLASSES)
    check_model_flags(args)
    script = args.script
    own_data = script.prompt is not None or script.dataset_name is not None or bool(args.datasets.datasets)
    own_model = args.model.model_name_or_path is not None
    defaults: dict[str, Any] = {"output_dir": "runs/fdpg"}
    if not own_model:
        defaults |= {"model_name_or_path": demo.MODEL_PATH, **DEMO_MODEL}
    if not own_data:
        defaults |= DEMO_DATA
    elif script.prompt is not None or str(script.dataset_name).lower().endswith(".txt"):
        defaults |= FEW_PROMPTS
    if "num_train_epochs" in args.given or "max_steps" in args.given:
        defaults.pop("max_steps", None)
    if not script.features and not script.reward_funcs:
        if own_data or own_model:
            raise UsageError(
                "nothing to train towards. Give --features='[{contains: please, moment: 0.5}]' (or a list in a YAML), "
                "or --reward_funcs=file.py:function."
            )
        defaults["features"] = DEMO_FEATURES
    for name in ("beta", "reward_weights"):
        if name in args.given and not script.reward_funcs:
            raise UsageError(f"--{name} belongs to --reward_funcs, which is not given. Leave it out.")
    return parse(argv, prog="run_fdpg.py", defaults=defaults, **CLASSES)


def _load_data(args: Arguments) -> tuple[Dataset, Dataset | None, str]:
    script, training = args.script, args.training
    if script.prompt is None and script.dataset_name is None and not args.datasets.datasets:
        splits, name = demo.load_reward_dataset(), DEMO_NAME
        train = from_rows(take(splits["train"], script.max_train_samples), name)
        test = from_rows(take(splits["test"], script.max_eval_samples), name)
    else:
        want_eval = training.eval_strategy != "no" or training.do_eval
        train, test, name = load_prompts(script, args.datasets, script.prompt, want_eval=want_eval, seed=training.seed)
    check_eval_flags(args, test)
    return train, test, name


def _build_target(args: Arguments) -> Target:
    context = {"device": args.training.device, "trust_remote_code": args.training.trust_remote_code}
    if args.script.features:
        return Target([resolve_constraint(spec, **context) for spec in args.script.features])
    weights, args.training.reward_weights = args.training.reward_weights or None, None  # the target has them now
    reward = weighted_sum(args.script.reward_funcs, weights, name="reward", **context)
    return Target.from_reward(reward, args.training.beta)


def _build_trainer(args: Arguments, train: Dataset, test: Dataset | None, target: Target) -> FDPGTrainer:
    training = args.training
    a_step = training.generation_batch_size // training.num_generations
    if len(train) < a_step:
        args.notes.append(f"a step takes {a_step} prompts of {len(train)}: each is used more than once in it")
    model = model_arguments(args)
    if model["peft_config"] is not None and "lora_task_type" not in args.given and _is_encoder_decoder(args):
        model["peft_config"].task_type = "SEQ_2_SEQ_LM"  # AutoPeftModelForSeq2SeqLM requires it
    return FDPGTrainer(
        train_dataset=repeat(train, a_step),
        eval_dataset=test if training.eval_strategy != "no" else None,
        target=target,
        **model,
    )


def _is_encoder_decoder(args: Arguments) -> bool:
    model, trust = args.model, args.training.trust_remote_code
    config = AutoConfig.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust
    )
    return bool(config.is_encoder_decoder)


def _rows_to_measure(args: Arguments, train: Dataset, test: Dataset | None) -> tuple[list[dict[str, Any]], str]:
    samples, at_most = args.script.eval_samples, args.script.eval_prompts
    rows, where = prompts_to_measure(train, test, at_most)
    chosen = rows[: prompts_enough_for(samples, at_most)]
    if samples and len(chosen) < len(rows):
        args.notes.append(
            f"eval_samples={samples} is measured on {len(chosen)} of {len(rows)} prompts, {SAMPLES_PER_PROMPT} samples "
            f"each: from fewer the divergences come out too small. --eval_samples={SAMPLES_PER_PROMPT * len(rows)} is "
            "enough for all"
        )
    return chosen, f"{len(chosen)} {where}{'s' * (len(chosen) != 1)}"
