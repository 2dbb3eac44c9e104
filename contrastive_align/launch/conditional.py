"""``run_conditional.py``: train on completions under the condition that their feedback gives them."""

from __future__ import annotations

import contextlib
import logging as std_logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers.trainer_utils import SaveStrategy

from contrastive_align import demo
from contrastive_align.conditions import resolve_condition
from contrastive_align.judge.judge import JudgeError
from contrastive_align.launch.arguments import Arguments, RunArguments, UsageError, parse
from contrastive_align.launch.ask import ask_best
from contrastive_align.launch.common import (
    Run,
    as_usage_error,
    check_eval_flags,
    check_model_flags,
    model_arguments,
    print_on_main,
)
from contrastive_align.launch.conditional_measure import Measurement, describe, draw_picture, last_terms, rounds_of
from contrastive_align.launch.datasets import from_rows, load_prompts, load_scored, take, with_feedback
from contrastive_align.launch.feedback_flags import (
    build_judge,
    build_sampler,
    check_models,
    check_reward,
    read_spec,
)
from contrastive_align.report import Summary
from contrastive_align.targets import resolve_feature
from contrastive_align.trainers import ConditionalConfig, ConditionalTrainer


DEMO_PROMPTS, DEMO_SCORED = "the bundled demo prompts", "the bundled demo data"
DEMO_REWARD = "contrastive_align.demo:reward"
DEMO_OUTPUT = "runs/conditional"
# Options for the bundled model and the bundled data that no flag or YAML file sets.
DEMO_MODEL = {"max_completion_length": 40, "learning_rate": 4e-3, "gradient_checkpointing": False}
DEMO_DATA = {
    "per_device_train_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "logging_steps": 20,
    "save_strategy": "no",
    "eval_prompts": 200,
}
DEMO_ROUNDS = {"prompts_per_round": 128, "draws_per_round": 5120}
JUDGED_PROMPTS = 16  # the default of eval_prompts with a judge, which is slow or costs money


@dataclass
class ConditionalArguments(RunArguments):
    """Name the prompts, the feedback on completions, and the condition that feedback becomes.

    Args:
        prompt: one prompt, instead of a dataset.
        condition: its kind, or a mapping with options: ``{kind: phrases, phrases: toxicity}``.
        reward: ``file.py:function``, a reward-model id or a mapping (see ``targets.features``), or a list of them,
            summed by ``reward_weights``.
        judge: a mapping of the arguments of :class:`~contrastive_align.judge.judge.Judge`; the key is in the
            environment.
        sampler: a mapping of the arguments of :class:`~contrastive_align.sampling.server.ServerSampler`: an
            OpenAI-compatible server that samples the completions with the LoRA adapter of each round.
        score_column, feedback_column: the columns of completions that are already scored; nothing is sampled.
        negate_score: lower scores are better (toxicity).
        eval_reward: a reward that measures the result of training on scored completions.
        eval_prompts: number of prompts on which rewards are measured before and after training, from the evaluation
            split if there is one, with ``num_generations`` completions under every condition. 0 measures nothing.
        best: a prompt; the trained model ``model_name_or_path`` is conditioned on its best label and sampled.
    """

    prompt: str | None = field(default=None, metadata={"help": "One prompt, instead of a dataset."})
    condition: dict | str | None = field(
        default=None, metadata={"help": "quantile_tokens, phrases, categories, text, attributes; or '{kind: ...}'."}
    )
    reward: list | str | dict | None = field(
        default=None, metadata={"help": "file.py:function, a reward-model id, or '{classifier: ..., label: ...}'."}
    )
    judge: dict | str | None = field(
        default=None, metadata={"help": "'{model: name, base_url: address, budget: 1000}'."}
    )
    sampler: dict | str | None = field(
        default=None, metadata={"help": "A server that samples, LoRA only: '{base_url: address, model: name}'."}
    )
    score_column: str | None = field(default=None, metadata={"help": "Scores that the completions have already."})
    negate_score: bool = field(default=False, metadata={"help": "Lower scores are better."})
    feedback_column: str | None = field(default=None, metadata={"help": "Words that the completions have already."})
    eval_reward: list | str | dict | None = field(
        default=None, metadata={"help": "Of scored completions: a reward to measure with."}
    )
    eval_prompts: int = field(default=100, metadata={"help": "Prompts measured before and after; 0: none."})
    best: str | None = field(default=None, metadata={"help": "A prompt to ask a trained model for its best with."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("condition", "reward", "judge", "sampler", "eval_reward"):
            setattr(self, name, read_spec(name, getattr(self, name)))
        columns = [name for name in ("score_column", "feedback_column", "negate_score") if getattr(self, name)]
        source = next((name for name in ("reward", "judge") if getattr(self, name) is not None), None)
        if self.reward is not None and self.judge is not None:
            raise ValueError("both reward and judge are given. Give one: what says how good a completion is.")
        if source and columns:
            raise ValueError(f"{columns[0]} is of completions that are there, and {source} judges new ones. Give one.")
        if source and self.eval_reward is not None:
            raise ValueError(f"eval_reward is for scored completions; with {source}, that is what is measured.")
        if self.eval_prompts < 0:
            raise ValueError(f"eval_prompts is {self.eval_prompts}, expected at least 0.")

    @property
    def own_data(self) -> bool:
        """Whether a prompt or a dataset is named."""
        return self.prompt is not None or self.dataset_name is not None

    @property
    def names_columns(self) -> bool:
        """Whether a flag speaks of completions that are already scored."""
        return bool(self.score_column or self.feedback_column or self.negate_score)


CLASSES = {"script": ConditionalArguments, "training": ConditionalConfig}


def main(argv: Sequence[str] | None = None) -> Summary | list[str]:
    """Train on conditions as the command line says (see ``README.md``); with ``--best``, return samples instead."""
    args = _parse(argv)
    if args.script.best is not None:
        with as_usage_error(JudgeError):
            return ask_best(args)
    return ConditionalRun(args).execute()


class ConditionalRun(Run):
    """The run of ``run_conditional.py``."""

    user_errors = (JudgeError,)

    def build_trainer(self, checkpoint: str | bool | None) -> ConditionalTrainer:
        """Load prompts or scored completions, build the trainer, and check the pool of an earlier run."""
        args, script = self.args, self.args.script
        self.train_rows, self.test_rows, self.data_name = _load_data(args)
        if script.dataset_name is not None or args.datasets.datasets:
            self.hub_dataset = self.data_name
        if _is_throwaway(args) and not checkpoint:
            _clear_pool(args)
        trainer = _build_trainer(args, self.train_rows, self.test_rows)
        _check_pool(args, trainer, checkpoint)
        return trainer

    def describe(self) -> Summary:
        """Name the condition, the feedback, the model and the data."""
        return describe(self.args, self.trainer, self.data_name, self.train_rows, self.test_rows)

    def before_training(self) -> None:
        """Measure the rewards, or the likelihoods, of the start."""
        self.measurement = Measurement(self.trainer, self.train_rows, self.test_rows, self.args.script.eval_prompts)

    def train(self, checkpoint: str | bool | None) -> None:
        """Train; Ctrl-C prints how to continue."""
        with _stopped_by_hand(self.trainer):
            super().train(checkpoint)

    def after_saving(self) -> None:
        """Add the rounds, and the command that asks for the best."""
        self.summary.training |= {**last_terms(self.trainer), "rounds": rounds_of(self.trainer)}
        folder = self.args.training.output_dir
        self.summary.saved["ask for the best"] = (
            f'python run_conditional.py --model_name_or_path={folder} --best="a prompt"'
        )

    def measure(self) -> None:
        """Measure the trained model given each condition, and draw the picture."""
        started = time.perf_counter()
        self.measurement.after(self.summary)
        self.summary.training["seconds_measuring"] = round(time.perf_counter() - started, 1)
        if self.trainer.judge is not None:
            self.summary.training["judge"] = self.trainer.judge.report()
        if self.trainer.args.should_save:
            draw_picture(self.trainer, self.summary)


@contextlib.contextmanager
def _stopped_by_hand(trainer: ConditionalTrainer) -> Iterator[None]:
    """On Ctrl-C, print how to continue and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        if std_logging.getLogger("transformers").isEnabledFor(std_logging.DEBUG):
            raise
        lost = "" if trainer.args.save_strategy != SaveStrategy.NO else " (no checkpoints: training begins anew)"
        kept = f"What was sampled is kept in {trainer.pool.folder}. " if trainer.online else ""
        print_on_main(
            f"stopped. {kept}The same command with --resume_from_checkpoint=true goes on from "
            f"{'there and from ' if kept else ''}the last checkpoint{lost}."
        )
        raise SystemExit(130) from None


def _parse(argv: Sequence[str] | None) -> Arguments:
    args = parse(argv, prog="run_conditional.py", **CLASSES)
    check_model_flags(args)
    script = args.script
    own_data = script.own_data or bool(args.datasets.datasets)
    own_model = args.model.model_name_or_path is not None
    defaults: dict[str, Any] = {}
    if script.best is not None:
        return args
    defaults["output_dir"] = DEMO_OUTPUT
    if not own_model:
        defaults |= {"model_name_or_path": demo.MODEL_PATH, **DEMO_MODEL}
    if not own_data:
        defaults |= DEMO_DATA
    offline = _is_offline(script) and (own_data or script.names_columns)
    if offline and not own_data:
        defaults["eval_reward"] = DEMO_REWARD
        if script.condition is None:  # two to six completions per prompt are too few for quantiles
            defaults["condition"] = {"kind": "quantile_tokens", "per_prompt": False}
    elif not own_data:
        defaults |= DEMO_ROUNDS
        if script.judge is None:
            defaults["reward"] = DEMO_REWARD
    if script.judge is not None:
        defaults["eval_prompts"] = JUDGED_PROMPTS
    only_prompts = script.prompt is not None or str(script.dataset_name).lower().endswith(".txt")
    if offline and only_prompts:
        raise UsageError(
            "nothing says how good a completion is. Give --reward=file.py:function (or a reward-model id), "
            "--judge='{model: ...}', or a dataset whose completions have scores or feedback."
        )
    for name in ("prompts_per_round", "drop_factor"):
        if offline and name in args.given:
            raise UsageError(f"--{name} belongs to sampling, and these completions are there already. Leave it out.")
    return parse(argv, prog="run_conditional.py", defaults=defaults, **CLASSES)


def _is_offline(script: ConditionalArguments) -> bool:
    return script.reward is None and script.judge is None


def _load_data(args: Arguments) -> tuple[Dataset, Dataset | None, str]:
    script, training = args.script, args.training
    condition = resolve_condition(script.condition or "quantile_tokens")
    columns = {name: getattr(script, name) for name in ("score_column", "negate_score", "feedback_column")}
    want_eval = training.eval_strategy != "no" or training.do_eval
    if not script.own_data and not args.datasets.datasets:
        splits = demo.load_reward_dataset()
        train, test = take(splits["train"], script.max_train_samples), take(splits["test"], script.max_eval_samples)
        if _is_offline(script):
            return with_feedback(train, condition, **columns), with_feedback(test, condition, **columns), DEMO_SCORED
        return from_rows(train, DEMO_PROMPTS), from_rows(test, DEMO_PROMPTS), DEMO_PROMPTS
    if _is_offline(script):
        train, test = load_scored(
            script, args.datasets, condition=condition, want_eval=want_eval, seed=training.seed, **columns
        )
        name = script.dataset_name or ", ".join(part.path for part in args.datasets.datasets)
    else:
        train, test, name = load_prompts(script, args.datasets, script.prompt, want_eval=want_eval, seed=training.seed)
    if test is None and training.eval_strategy != "no":
        raise UsageError(
            f"--eval_strategy={training.eval_strategy.value} is given, but there are no rows to evaluate on. Give a "
            "dataset with such a split (--dataset_test_split), or leave it out: --eval_prompts measures before and "
            "after training."
        )
    check_eval_flags(args, test)
    return train, test, name


def _is_throwaway(args: Arguments) -> bool:
    """Return whether the run has the bundled model, prompts and default folder, whose samples may be replaced."""
    mine = {"model_name_or_path", "dataset_name", "datasets", "prompt", "reward", "judge", "output_dir", "pool_dir"}
    return not mine & args.given


def _clear_pool(args: Arguments) -> None:
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(Path(args.training.output_dir) / "pool", ignore_errors=True)
    state.wait_for_everyone()


def _build_trainer(args: Arguments, train: Dataset, test: Dataset | None) -> ConditionalTrainer:
    script, training = args.script, args.training
    condition = resolve_condition(script.condition or "quantile_tokens")
    judge = None if script.judge is None else build_judge(script.judge, condition, training.output_dir)
    if judge is not None:
        judge.check()
    context = {"device": training.device, "trust_remote_code": training.trust_remote_code}
    rewards = None
    if script.reward is not None:
        check_reward(condition)
        specs = script.reward if isinstance(script.reward, list) else [script.reward]
        rewards = [resolve_feature(spec, **context) for spec in specs]
        check_models(specs)
    measured = script.eval_prompts and not (_is_offline(script) and script.eval_reward is None)
    if judge is not None and measured:
        args.notes.append(
            f"measuring on {script.eval_prompts} prompts asks the judge about {training.num_generations} completions "
            "of each under every condition, beside those of the rounds; --eval_prompts=0 leaves it out"
        )
    trainer = ConditionalTrainer(
        train_dataset=train,
        eval_dataset=test if training.eval_strategy != "no" else None,
        reward_funcs=rewards,
        judge=judge,
        condition=condition,
        sampler=None if script.sampler is None else build_sampler(script.sampler),
        **model_arguments(args),
    )
    if script.eval_reward is not None:
        trainer.feedback = trainer.feedback_by(
            resolve_feature(script.eval_reward, **context)
        )  # read by rewards_given alone
    return trainer


def _check_pool(args: Arguments, trainer: ConditionalTrainer, checkpoint: str | bool | None) -> None:
    """Refuse the pool of another run before anything is measured, as train() would later."""
    if trainer.online and trainer.pool.rounds and not checkpoint:
        raise UsageError(
            f"{trainer.pool.folder} has the samples of an earlier run (rounds {trainer.pool.rounds}). Go on with "
            "--resume_from_checkpoint=true, or start anew in another --output_dir or --pool_dir."
        )
    trainer.check_pool()
