"""``run_fdpg.py``: parse -> prompts and target -> trainer -> fit -> train -> measure -> save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoConfig, set_seed

from contrastive_align import demo
from contrastive_align.data import distinct_prompts
from contrastive_align.launch.arguments import Arguments, RunArguments, UsageError, _StrictLoader, parse
from contrastive_align.launch.common import (
    as_usage_error,
    check_model_flags,
    checkpoint_of,
    ignore_bias_buffers,
    model_arguments,
    model_entry,
    print_on_main,
    save,
    versions,
)
from contrastive_align.launch.datasets import take
from contrastive_align.launch.measure import SAMPLES_PER_PROMPT, measure, metrics_of, prompts_enough_for
from contrastive_align.launch.prompts import from_rows, load_prompts, repeat
from contrastive_align.models.cpu.freed_memory import keep_freed_memory
from contrastive_align.report import TargetSummary, plot_steps
from contrastive_align.targets import InfeasibleMoment, Target, resolve_constraint, weighted_sum
from contrastive_align.trainers import FDPGConfig, FDPGTrainer


DEMO_NAME = "the bundled demo prompts"
DEMO_FEATURES = [{"contains": "please", "moment": 0.5}]
PICTURE = "moments_and_divergences.png"
# What the bundled model and the bundled prompts are trained with, where nothing else is said.
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
    """Where the prompts come from, what the target is, how it is measured.

    Args:
        prompt: one prompt, instead of a dataset.
        features: constraints, each a feature with its moment: ``[{contains: please, moment: 0.5}]``, a list in YAML,
            its text on the command line (see ``targets.features`` for the kinds).
        reward_funcs: ``file.py:function`` or reward-model ids: the target is base * exp(weighted sum / beta).
        eval_samples: samples of each distribution that is measured at the end, at least 50; 0 leaves that out.
        eval_prompts: the prompts these are spread over, of the evaluation split if there is one; fewer where a prompt
            would have less than 50 samples.
        qrs_acceptance: the wished acceptance rate of quasi-rejection sampling; 0 leaves it out.
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
            try:
                self.features = yaml.load(self.features, Loader=_StrictLoader)
            except yaml.YAMLError as error:
                raise ValueError(f"features is {self.features!r}, which is not YAML: {error}") from error
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


def main(argv: Sequence[str] | None = None) -> TargetSummary:
    """Train a model towards a target as the command line says; see ``README.md``."""
    args = _parse(argv)
    if args.training.device.type == "cpu":
        keep_freed_memory()
    with as_usage_error(InfeasibleMoment):
        set_seed(args.training.seed)
        train, test, data_name = _load_data(args)
        target = _build_target(args)
        trainer = _build_trainer(args, train, test, target)
        checkpoint = checkpoint_of(args)
    measured_rows, measured_on = _rows_to_measure(args, train, test)
    say = print_on_main
    summary = _describe(args, trainer, data_name, train, test)
    say(summary.opening())
    for note in args.notes:
        say(f"note: {note}")
    earlier = Path(args.training.output_dir) / "summary.json"
    if earlier.is_file() and not checkpoint:
        say(f"note: {args.training.output_dir} holds an earlier run, which this one replaces")
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        earlier.unlink(missing_ok=True)  # it speaks of other weights

    started = time.perf_counter()
    with as_usage_error(InfeasibleMoment):
        trainer.train(resume_from_checkpoint=checkpoint)
    summary.training = {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "target": trainer.target.state_dict(),
    }
    save(args, trainer, summary, None if data_name in (DEMO_NAME, "one prompt") else data_name)
    if trainer.args.should_save:
        trainer.target.save(Path(args.training.output_dir) / "target.json")
        _draw_picture(trainer, summary)
    if args.script.eval_samples:
        started = time.perf_counter()
        with as_usage_error(InfeasibleMoment):
            columns, remarks = measure(
                trainer,
                measured_rows,
                samples=args.script.eval_samples,
                acceptance=args.script.qrs_acceptance or None,
                seed=args.training.seed,
            )
        summary.training["seconds_measuring"] = round(time.perf_counter() - started, 1)
        summary.distributions = columns
        summary.metrics = metrics_of(columns, target.names, target.moments.tolist(), len(measured_rows))
        n = columns["tuned"]["samples"]
        summary.metrics_on = f"{measured_on}, {n} samples of each distribution; pi is the column"
        summary.state = "\n".join(f"note: {remark}" for remark in remarks)
    if trainer.args.should_save:
        summary.write(args.training.output_dir)
    say(summary.closing())
    if args.training.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return summary


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
    unused = sorted({"dataset_test_split", "max_eval_samples"} & args.given)
    if test is None and unused:
        raise UsageError(f"--{unused[0]} is given, but there is no evaluation split to take it from.")
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
        model["peft_config"].task_type = "SEQ_2_SEQ_LM"  # else AutoPeftModelForSeq2SeqLM refuses what is saved
    trainer = FDPGTrainer(
        train_dataset=repeat(train, a_step),
        eval_dataset=test if training.eval_strategy != "no" else None,
        target=target,
        **model,
    )
    if args.script.ignore_bias_buffers:
        ignore_bias_buffers(trainer)
    return trainer


def _is_encoder_decoder(args: Arguments) -> bool:
    model, trust = args.model, args.training.trust_remote_code
    config = AutoConfig.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust
    )
    return bool(config.is_encoder_decoder)


def _rows_to_measure(args: Arguments, train: Dataset, test: Dataset | None) -> tuple[list[dict[str, Any]], str]:
    samples, at_most = args.script.eval_samples, args.script.eval_prompts
    rows = distinct_prompts(train if test is None else test, at_most)
    kept = rows[: prompts_enough_for(samples, at_most)]
    if samples and len(kept) < len(rows):
        args.notes.append(
            f"eval_samples={samples} is measured on {len(kept)} of {len(rows)} prompts, {SAMPLES_PER_PROMPT} samples "
            f"each: from fewer the divergences come out too small. --eval_samples={SAMPLES_PER_PROMPT * len(rows)} is "
            "enough for all"
        )
    where = "training prompt" if test is None else "held-out prompt"
    return kept, f"{len(kept)} {where}{'s' * (len(kept) != 1)}"


# ----------------------------------------------------------------------------------------------------- what is told


def _describe(
    args: Arguments, trainer: FDPGTrainer, data_name: str, train: Dataset, test: Dataset | None
) -> TargetSummary:
    training, target = args.training, trainer.target
    is_demo = args.model.model_name_or_path == demo.MODEL_PATH
    name = "the bundled demo model" if is_demo else str(args.model.model_name_or_path)
    a_step = training.generation_batch_size // training.num_generations
    step = f"{a_step} prompts x {training.num_generations} samples a step"
    rows = {"train": train} if test is None else {"train": train, "test": test}
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
        model=model_entry(args, trainer, name, start=name),
        reference=f"{name}, with the adapter off" if is_peft_model(trainer.model) else f"{name}, a frozen copy",
        data={
            split: {"line": f"{data_name}: {len(part)} prompts", "notes": [], "name": data_name, "rows": len(part)}
            for split, part in rows.items()
        },
        versions=versions(),
    )


def _draw_picture(trainer: FDPGTrainer, summary: TargetSummary) -> None:
    target = trainer.target
    moments = [None if math.isnan(moment) else moment for moment in target.moments.tolist()]
    path = Path(trainer.args.output_dir) / PICTURE
    try:
        plot_steps(trainer.state.log_history, dict(zip(target.names, moments, strict=True)), path)
    except (ImportError, ValueError) as error:
        summary.saved["picture"] = f"none: {error}"
    else:
        summary.saved["picture"] = str(path)
