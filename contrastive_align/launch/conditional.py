"""``contrastive-align conditional``: train on completions under the condition that their feedback gives them."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from contrastive_align.conditions import resolve_condition, with_ties
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch.arguments import Arguments, FeedbackArguments, option
from contrastive_align.launch.ask import ask_best
from contrastive_align.launch.common import Run, model_arguments
from contrastive_align.launch.conditional_measure import Measurement, draw_picture, last_terms
from contrastive_align.launch.datasets import load_prompts, load_scored, only_prompts
from contrastive_align.launch.feedback_flags import JUDGED_PROMPTS, build_feedback
from contrastive_align.launch.own_rounds import (
    DEMO_REWARD,
    kept_rounds,
    plain,
    refuse_earlier_pool,
    remove_bundled_pool,
    rounds_of,
    sample_rewards,
    speeds_of,
)
from contrastive_align.launch.record import HeldOut
from contrastive_align.launch.usage import UsageError
from contrastive_align.targets import resolve_feature
from contrastive_align.trainers import ConditionalConfig, ConditionalTrainer
from contrastive_align.trainers.configs import OF_SCORED


DEMO_ROUNDS = {"prompts_per_round": 128, "draws_per_round": 5120}
# Counts of a trainer's ``data_report`` -> what the user is told of them.
NOTES = {
    "too_long": "prompts are too long and left out",
    "dropped": "rows are dropped",
    "cut": "completions are cut and train no EOS",
    "left_out": "completions have no score or feedback, or all of a prompt score the same: left out",
}


@dataclass
class ConditionalArguments(FeedbackArguments):
    """Name the condition that feedback becomes, beside the prompts and the feedback.

    Rewards are measured under every condition.
    """

    ALIASES: ClassVar[dict[str, str]] = {"num_rounds": "num_train_epochs", "reward_funcs": "reward"}
    SPECS: ClassVar[tuple[str, ...]] = (*FeedbackArguments.SPECS, "condition", "eval_reward")

    condition: dict | str | None = option(
        None,
        "In front of the prompt: quantile_tokens (default), phrases, categories, text or attributes; or '{kind: ...}'.",
    )
    ties: str | None = option(None, "What quantiles do with equal rewards: share (one label, the default) or drop.")
    eval_reward: list | str | dict | None = option(
        None, "Training on scored completions: the reward that measures samples before and after."
    )
    best: str | None = option(
        None, "Train nothing: print a trained model's answers to this prompt under its best condition."
    )

    def __post_init__(self):
        super().__post_init__()
        source = next((name for name in ("reward", "judge") if getattr(self, name) is not None), None)
        if source and self.eval_reward is not None:
            raise ValueError(f"eval_reward is for scored completions; with {source}, that is what is measured.")

    @property
    def offline(self) -> bool:
        """Whether completions are already there, since nothing would judge new ones."""
        return not self.has_feedback


class ConditionalRun(Run):
    """The run of ``contrastive-align conditional``."""

    command = "conditional"
    arguments_class, config_class = ConditionalArguments, ConditionalConfig
    demo_model: ClassVar[dict[str, Any]] = {"max_completion_length": 40, "learning_rate": 4e-3}
    demo_data: ClassVar[dict[str, Any]] = {"per_device_train_batch_size": 64, "logging_steps": 20, "eval_prompts": 200}

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Return what the command line leaves out; refuse flags that do not fit together."""
        script = args.script
        defaults = super().defaults(args)
        if script.best is not None:
            return defaults
        offline = script.offline and (not args.bundled_data or any(getattr(args.training, n) for n in OF_SCORED))
        if offline and args.bundled_data:
            defaults["eval_reward"] = DEMO_REWARD
            if script.condition is None:  # two to six completions per prompt are too few for quantiles
                defaults["condition"] = {"kind": "quantile_tokens", "per_prompt": False}
        elif args.bundled_data:
            defaults |= DEMO_ROUNDS | ({"reward": DEMO_REWARD} if script.judge is None else {})
        if script.judge is not None:
            defaults["eval_prompts"] = JUDGED_PROMPTS
        if offline and only_prompts(script):
            raise UsageError(
                "nothing says how good a completion is. Give --reward=file.py:function (or a reward-model id), "
                "--judge='{model: ...}', or a dataset whose completions have scores or feedback."
            )
        for name in ("prompts_per_round", "drop_factor"):
            if offline and name in args.given:
                raise UsageError(
                    f"--{name} belongs to sampling, and these completions are there already. Leave it out."
                )
        return defaults

    def execute(self) -> Any:
        """Train and return the summary; with ``--best``, return samples instead."""
        if self.args.script.best is None:
            return super().execute()
        return ask_best(self.args, self.args.script.best)

    def load_data(self) -> tuple[Dataset, Dataset | None, str]:
        """Load prompts or, without a reward or judge, scored completions."""
        args, script, training = self.args, self.args.script, self.args.training
        self.condition = resolve_condition(script.condition or "quantile_tokens")
        if script.ties is not None:
            self.condition = with_ties(self.condition, script.ties)
        if script.offline:
            train, test, name = load_scored(args, self.condition)
        else:
            train, test, name = load_prompts(args)
        if test is None and training.eval_strategy != "no":
            raise UsageError(
                f"--eval_strategy={training.eval_strategy.value} is given, but there are no rows to evaluate on. Give "
                "a dataset with such a split (--dataset_test_split), or leave it out: --eval_prompts measures before "
                "and after training."
            )
        return train, test, name

    def build_trainer(self, checkpoint: str | bool | None) -> ConditionalTrainer:
        """Build the trainer, and refuse the samples of an earlier run, except those of the bundled run."""
        remove_bundled_pool(self.args, checkpoint)
        trainer = self._build_trainer()
        self.rows_are = "prompts" if trainer.online else "rows with scores or feedback"
        refuse_earlier_pool(trainer, checkpoint)
        trainer.check_pool()  # as train() would, after the measurement
        steps = self.args.training.max_steps
        self.rounds = self.args.training.num_train_epochs
        if steps > 0:
            self.rounds = math.ceil(steps / trainer.steps_per_round)
            self.args.notes.append(f"max_steps={steps} decides, not num_rounds: training ends in round {self.rounds}")
        return trainer

    def leave_nothing(self) -> None:
        """Remove the folder of a pool without a round."""
        with contextlib.suppress(OSError):  # it holds rounds, or another process has removed it
            self.trainer.pool.folder.rmdir()

    def _build_trainer(self) -> ConditionalTrainer:
        args, script, training, condition = self.args, self.args.script, self.args.training, self.condition
        trainer = ConditionalTrainer(
            train_dataset=self.train_rows,
            eval_dataset=self.test_rows if training.eval_strategy != "no" else None,
            condition=condition,
            **build_feedback(script, training, args.notes, condition),
            **model_arguments(args),
        )
        if script.eval_reward is not None:  # only rewards_given reads this feedback
            context = {"device": training.device, "trust_remote_code": training.trust_remote_code}
            trainer.feedback = trainer.feedback_by(resolve_feature(script.eval_reward, **context))
        return trainer

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Name the condition, the feedback, the loss's terms and the extent of a round."""
        trainer, training = self.trainer, self.args.training
        kind, draws, epochs = trainer.condition.kind, trainer.rows.length, f"{self.rounds:g}"
        feedback, rounds = "the data's feedback", f"{epochs} passes over {draws} draws"
        if trainer.online:
            feedback = "a judge" if trainer.judge else trainer.feedback.feature.name
            sampled = f"{trainer.prompts_per_round} prompts x {training.num_generations} samples"
            rounds = f"{epochs} rounds of {sampled}, {draws} draws each"
        terms = f"KL {training.kl_coef:g} ({training.kl_direction}), entropy {training.entropy_coef:g}"
        return f"conditional training, {kind} by {feedback}, {terms}; {rounds}", {
            "condition": trainer.condition.spec,
            "reward": plain(self.args.script.reward),
            "judge": None if trainer.judge is None else trainer.judge.spec,
            "online": trainer.online,
            **self.options("kl_coef", "kl_direction", "entropy_coef"),
            "rounds": self.rounds,
            "prompts_per_round": trainer.prompts_per_round if trainer.online else None,
            "num_generations": training.num_generations,
            "draws_per_round": draws,
            **self.options("drop_factor", "max_completion_length", "learning_rate", "seed"),
        }

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """Count the rows, and say what of the training data is left out."""
        found, report = super().describe_data(), self.trainer.data_report
        notes = [f"{report[key]} {text}" for key, text in NOTES.items() if report.get(key)]
        found["train"] |= {"notes": notes, **report}
        return found

    def describe_reference(self) -> str:
        """Say where there is none."""
        return super().describe_reference() if self.trainer.has_reference else "none (kl_coef=0)"

    def before_training(self) -> None:
        """Measure the rewards, or the likelihoods, of the start."""
        self.measurement = Measurement(self.trainer, self.train_rows, self.test_rows, self.args.script.eval_prompts)

    def rewards_of(self) -> tuple[Any, str]:
        """Score samples by the reward; a judge, who is slow or costs money, is not asked."""
        return sample_rewards(self.trainer)

    def planned_steps(self) -> int | None:
        """Count the steps of all rounds."""
        steps = self.args.training.max_steps
        return steps if steps > 0 else math.ceil(self.trainer.steps_per_round * self.rounds)

    def _look_before(self) -> None:
        super()._look_before()
        if self.trainer.best_condition().askable():
            self.recorder.best_ids = self._best_ids

    def _best_ids(self, held_out: HeldOut) -> list[list[int]]:
        best, tokenizer = self.trainer.best_condition(), self.trainer.processing_class
        return [tokenise_prompt(best.apply_best(row["prompt"]), tokenizer) for row in held_out.rows]

    def kept(self) -> str:
        """Name the rounds that are on the disk."""
        return kept_rounds(self.trainer)

    def after_saving(self) -> None:
        """Add the rounds, and the command that asks for the best."""
        self.summary.training |= {**last_terms(self.trainer), "rounds": rounds_of(self.trainer)}
        self.summary.training["tokens_per_second"] = speeds_of(self.trainer)
        command = f'contrastive-align ask --model_name_or_path={self.args.training.output_dir} --prompt="a prompt"'
        self.summary.saved["ask for the best"] = command

    def measure(self) -> None:
        """Measure the trained model given each condition, and draw the picture."""
        started = time.perf_counter()
        self.measurement.after(self.summary)
        self.summary.training["seconds_measuring"] = round(time.perf_counter() - started, 1)
        if self.trainer.judge is not None:
            self.summary.training["judge"] = self.trainer.judge.report()
        if self.trainer.args.should_save:
            draw_picture(self.trainer, self.summary)
