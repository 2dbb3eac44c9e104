"""``contrastive-align reward`` and ``preference``: train on scored completions or on pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate.utils import is_peft_model
from datasets import Dataset

from contrastive_align import demo
from contrastive_align.data import DataReport, random_prompts, read_shape
from contrastive_align.data.columns import read_options
from contrastive_align.data.reading import TOKEN_COLUMNS
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch import preflight
from contrastive_align.launch.arguments import Arguments, FeedbackArguments, option
from contrastive_align.launch.ask import sample_trained
from contrastive_align.launch.common import Run, model_arguments, print_on_main
from contrastive_align.launch.conditional_measure import paired
from contrastive_align.launch.datasets import (
    DEMO_NAME,
    has_scores,
    load_demo,
    load_prompts,
    load_splits,
    only_prompts,
)
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
from contrastive_align.launch.record import HeldOut, MovedGroups, choose_rows
from contrastive_align.launch.usage import UsageError
from contrastive_align.losses import LOSSES
from contrastive_align.report import Change, Summary, in_words, moved, spread, warn_if_above_start
from contrastive_align.sampling.decode import seed_of
from contrastive_align.trainers import ContrastiveTrainer
from contrastive_align.trainers.configs import AUTO


DEMO_SAMPLES = {"per_prompt": 4, "max_new_tokens": 48}
MEASURED_TRAIN_GROUPS = 256
GIVE_REWARD = "Give --reward=file.py:function (or a reward-model id), or --judge='{model: ...}'"
NO_REWARD = (
    f"nothing says how good a completion is: what is the reward? {GIVE_REWARD}; or, to train on the scores of a "
    "dataset, leave --online out."
)
DEMO_LONGEST = 40  # tokens of an own sample of the bundled model
# Of the bundled run with --online.
DEMO_ONLINE = {"prompts_per_round": 160, "learning_rate": 1e-3, "eval_prompts": 200}


@dataclass
class GroupArguments(FeedbackArguments):
    """Name what scores own samples (``--online``), and scored groups that are trained on beside them."""

    scored_dataset: str | None = option(
        None, "With --online: a file or hub id of scored groups, which are trained on beside the own samples."
    )


class RewardRun(Run):
    """The run of ``contrastive-align reward``."""

    command = "reward"
    arguments_class = GroupArguments
    demo_model: ClassVar[dict[str, Any]] = {"max_length": 512, "learning_rate": 3e-4}
    demo_data: ClassVar[dict[str, Any]] = {
        **{"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32},
        **{"num_train_epochs": 1, "logging_steps": 10},
    }

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Sample own groups where a reward and prompts alone are given; refuse flags that do not fit together."""
        script, training, defaults = args.script, args.training, super().defaults(args)
        bare = args.bundled_data or only_prompts(script)
        online = training.online or script.judge is not None or (script.reward is not None and bare)
        if online and "online" in args.given and not training.online:
            raise UsageError("--online=false is given, and a reward with prompts alone. Leave one of them out.")
        if not online:
            if only_prompts(script):
                raise UsageError(
                    f"{args.dataset} has prompts alone: what is the reward? {GIVE_REWARD}; or give a dataset of "
                    "completions with scores, or of pairs."
                )
            of_own = {*training.of_own_samples(), "sampler", "scored_dataset", "eval_prompts"}
            if (given := sorted(of_own & args.given)) and script.reward is None:  # with one, the data decide
                raise UsageError(f"--{given[0]} belongs to own samples: add --online, or leave it out.")
            return defaults
        defaults |= {"online": True, "num_train_epochs": training.num_rounds}
        if args.model.model_name_or_path is None:
            defaults["max_completion_length"] = DEMO_LONGEST
        if args.bundled_data:
            defaults |= DEMO_ONLINE | ({} if script.has_feedback else {"reward": DEMO_REWARD})
        elif not script.has_feedback:
            raise UsageError(NO_REWARD)
        if script.dataset_streaming or args.datasets.streaming:
            raise UsageError(
                "the prompts are a stream, and a round takes prompts in an order of its own. Leave --dataset_streaming "
                "out: prompts are loaded whole."
            )
        if script.judge is not None:
            defaults["eval_prompts"] = JUDGED_PROMPTS
        return defaults

    def load_data(self) -> tuple[Any, Any, str]:
        """Load the groups, or the prompts of own samples."""
        args, name = self.args, self.args.dataset or DEMO_NAME
        if args.script.reward is not None and not args.training.online:
            if has_scores(args):
                raise UsageError(
                    f"{name} has scored completions, and --reward is given: which of the two? Add --online to sample "
                    "completions and score them by the reward, or leave --reward out to train on the scores."
                )
            args.training.go_online()
        if args.training.online:
            return load_prompts(args)
        if args.bundled_data:
            train, test = load_demo(args, preference=self.command == "preference")
        else:
            train, test = load_splits(args, on_bad_row=args.training.on_bad_row)
        return train, test, name

    def build_trainer(self, checkpoint: str | bool | None) -> ContrastiveTrainer:
        """Build the trainer of the groups."""
        args, script = self.args, self.args.script
        rows = {"train_dataset": self.train_rows, "eval_dataset": self.test_rows}
        if not args.training.online:
            return ContrastiveTrainer(**rows, **model_arguments(args))
        remove_bundled_pool(args, checkpoint)
        scored = None
        if script.scored_dataset is not None:
            named = dataclasses.replace(script, dataset_name=script.scored_dataset, scored_dataset=None)
            scored, _ = load_splits(dataclasses.replace(args, script=named), on_bad_row=args.training.on_bad_row)
        feedback = build_feedback(script, args.training, args.notes)
        trainer = ContrastiveTrainer(**rows, scored_dataset=scored, **feedback, **model_arguments(args))
        refuse_earlier_pool(trainer, checkpoint)
        trainer.check_pool()  # as train() would, after the measurement
        return trainer

    @property
    def rounds(self) -> int:
        """The number of rounds, of which ``max_steps`` may leave out the last."""
        steps = self.args.training.max_steps
        return self.args.training.num_rounds if steps <= 0 else math.ceil(steps / self.trainer.steps_per_round)

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Name the losses, their weights and their options, and what own samples are."""
        line, found = self._describe_loss()
        if not self.trainer.online:
            return line, found
        trainer, args = self.trainer, self.args
        names = (
            "num_generations",
            "reference",
            "keep",
            "resample",
            "max_completion_length",
            "temperature",
            "top_k",
            "top_p",
        )
        found |= {"online": True, "rounds": self.rounds, "prompts_per_round": trainer.prompts_per_round}
        found |= {**self.options(*names), "draws_per_round": trainer.rows.length}
        found |= {"reward": plain(args.script.reward), "judge": None if trainer.judge is None else trainer.judge.spec}
        feedback = "a judge" if trainer.judge else trainer.feedback.feature.name
        sampled = f"{trainer.prompts_per_round} prompts x {args.training.num_generations} samples"
        return f"{line}; {self.rounds} rounds of {sampled} by {feedback}, {trainer.rows.length} groups each", found

    def _describe_loss(self) -> tuple[str, dict[str, Any]]:
        training = self.args.training
        weights = training.loss_weights or [1.0] * len(training.loss_type)
        named = zip(training.loss_type, weights, strict=True)
        named = [(LOSSES.describe(loss), weight) for loss, weight in named]
        losses = " + ".join(f"{weight:g} {loss}" if len(weights) > 1 else loss for loss, weight in named)
        auto, shown = training.temperature_alpha == AUTO, f"{self.trainer.temperature_alpha:.4g}"
        if auto:
            shown = "auto" if self.trainer.online else f"{shown} (auto)"  # of own samples, each round has its own
        line = f"{losses}, beta={training.beta:g}, temperature_alpha={shown}"
        found = {"loss_type": training.loss_type, "loss_weights": weights}
        found |= {"temperature_alpha": self.trainer.temperature_alpha, **self.options("beta", "learning_rate", "seed")}
        sources = {name: LOSSES.describe(name) for name in training.loss_type if name in LOSSES.hashes}
        return line, found | ({"own_losses": sources} if sources else {})

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """Count groups and rows."""
        if self.trainer.online:
            found, report = super().describe_data(), self.trainer.data_report
            notes = [f"{report['too_long']} prompts are too long and left out"] if report["too_long"] else []
            found["train"] |= {"notes": notes, **report}
            reports = self.trainer.data_reports
            return found | {
                name: _data_entry(self.args.script.scored_dataset, report) for name, report in reports.items()
            }
        return {split: _data_entry(self.data_name, report) for split, report in self.trainer.data_reports.items()}

    def describe_reference(self) -> str:
        """Say where it moves, and where its log-probs are cached."""
        args = self.trainer.args
        if args.reference == "round" and self.trainer.online:
            return "the policy at the beginning of each round (reference=round)"
        if args.sync_ref_model:
            return f"{self.model_name} at the start, then following the policy (sync_ref_model)"
        if args.precompute_ref_log_probs and not is_peft_model(self.trainer.model):
            return f"{self.model_name}, its log-probs cached"
        return super().describe_reference()

    def before_training(self) -> None:
        """Sample prompts for their mean reward: the bundled ones, or those that own samples are measured on."""
        if self.trainer.online:
            self._measure_start()
        elif self.args.bundled_data:
            self.rewards_before = _demo_rewards(self.trainer, self.test_rows)

    def held_out(self, most: int) -> HeldOut:
        """Choose groups by their tokens, whatever shape the rows had."""
        trainer, dataset = self.trainer, self.trainer.eval_dataset
        if trainer.online:
            return super().held_out(most)
        dataset = trainer.train_dataset if dataset is None else dataset
        if not isinstance(dataset, Dataset):  # reading a tokenised stream would count its rows twice
            return super().held_out(most)
        ids = [row["prompt_ids"] for row in choose_rows(dataset, most, trainer.args.seed)]
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        return HeldOut(texts, ids, [{"prompt": text} for text in texts], self._where)

    def rewards_of(self) -> tuple[Any, str]:
        """Score samples of the bundled prompts; other scored data come without a function."""
        if self.trainer.online:
            return sample_rewards(self.trainer)
        return (_demo_scores, "reward") if self.args.bundled_data else (None, "")

    def longest_and_mean(self) -> tuple[int, int] | None:
        """Count the tokens of batches of groups."""
        if self.trainer.online:
            found = super().longest_and_mean()  # of one sample for each group
            return found and tuple(tokens * self.trainer.args.num_generations for tokens in found)
        sizes = preflight.group_sizes(self.trainer.train_dataset, self.trainer.layout)
        return preflight.largest_and_mean(sizes, self.trainer.args.per_device_train_batch_size)

    def facts(self) -> dict[str, Any]:
        """Read grades and lengths of the training groups."""
        if self.trainer.online:
            return super().facts()
        return {**super().facts(), **preflight.data_facts(self.trainer.train_dataset, self.trainer)}

    def train(self, checkpoint: str | bool | None) -> None:
        """Train; say what streams held, which is known once they are read."""
        super().train(checkpoint)
        self.summary.data = self.describe_data()
        if self.trainer.online:
            return
        for split, report in self.summary.data.items():
            if report["streamed"]:
                print_on_main("\n  ".join([f"{split} data: {report['line']}", *report["notes"]]))

    def after_saving(self) -> None:
        """Describe the method again: a resumed run has the temperature of its checkpoint. Record the prompts' form."""
        line, options = self.describe()
        self.summary.method |= {"line": line, **options}
        self.summary.data["train"]["conversational"] = self.trainer.is_conversational
        if self.trainer.online:
            self.summary.training["rounds"] = rounds_of(self.trainer)
            self.summary.training["tokens_per_second"] = speeds_of(self.trainer)

    def planned_steps(self) -> int | None:
        """Count the steps; online those of all rounds."""
        if not self.trainer.online:
            return super().planned_steps()
        steps = self.args.training.max_steps
        return steps if steps > 0 else self.trainer.steps_per_round * self.rounds

    def kept(self) -> str:
        """Name the rounds that are on the disk."""
        return kept_rounds(self.trainer)

    def _measure_start(self) -> None:
        """Score samples of the start."""
        most, trainer = self.args.script.eval_prompts, self.trainer
        rows = self.train_rows if self.test_rows is None else self.test_rows
        self.measured_rows = Dataset.from_list(random_prompts(rows, most, seed=trainer.args.seed)) if most else None
        if self.measured_rows is not None:
            self.rewards_before = trainer.rewards_of(self.measured_rows)

    def _measure_end(self) -> None:
        """Score samples of the trained model, of the same prompts."""
        rows, summary = self.measured_rows, self.summary
        if rows is None:
            return
        change = paired(self.rewards_before, self.trainer.rewards_of(rows))
        if change is None:
            summary.state = "Too few prompts have scores before and after: no rewards are compared."
            return
        summary.metrics = {"mean_reward": change}
        summary.metrics_on = f"{len(rows)} {self._where}, {self.trainer.args.num_generations} samples each"
        clauses = [moved("the mean reward of samples", change, scale=spread(change))]
        summary.state = in_words(clauses, held_out=self.test_rows is not None)

    def measure(self) -> None:
        """Compare log-probs, and on bundled data rewards, before and after; of own samples the rewards."""
        if self.trainer.online:
            self._measure_end()
            if self.trainer.judge is not None:
                self.summary.training["judge"] = self.trainer.judge.report()
            return
        self.trainer.on_evaluated = moved = MovedGroups()
        _measure(self.summary, self.trainer, self.test_rows)
        self.trainer.on_evaluated = None
        self.recorder.moved = moved.described(self.trainer.processing_class)
        if self.args.bundled_data:
            after = _demo_rewards(self.trainer, self.test_rows)
            self.summary.metrics = {"mean_reward": Change.paired(self.rewards_before, after), **self.summary.metrics}
        if "logps/best" in self.summary.metrics:
            held_out = self.test_rows is not None
            self.summary.state = _words(self.summary.metrics, self.args.training.beta, held_out=held_out)


class PreferenceRun(RewardRun):
    """The run of ``contrastive-align preference``."""

    command = "preference"

    @classmethod
    def defaults(cls, args: Arguments) -> dict[str, Any]:
        """Keep pairs hard, whatever ratings stand beside them; own samples are groups."""
        defaults = super().defaults(args)
        own = defaults.get("online") or args.script.reward is not None
        return defaults if own else {**defaults, "hard_pairs": True}

    def load_data(self) -> tuple[Any, Any, str]:
        """Load the groups, which must be pairs."""
        train, test, name = super().load_data()
        if self.args.training.online:
            return train, test, name
        training = self.args.training
        options = read_options(training.columns, training.score_column, training.hard_pairs)
        reading = read_shape(train, options, name)
        if reading is None or not reading.pairs:
            columns = reading.read_columns if reading else TOKEN_COLUMNS
            raise UsageError(
                f"{name} has scored completions (columns {sorted(columns)}), expected 'chosen' and 'rejected'. Use "
                "contrastive-align reward, which takes any number of them."
            )
        return train, test, name


def _data_entry(name: str, report: DataReport) -> dict[str, Any]:
    return {"line": f"{name}: {report.recognised()}", "notes": report.notes(), "name": name, **report.as_dict()}


def _measure(summary: Summary, trainer: ContrastiveTrainer, test: Any) -> None:
    """Compare the reference (before) and the policy (after) on the same groups, in one evaluation."""
    if test is not None:
        trainer.evaluate()
        summary.metrics_on = "the evaluation split"
    elif isinstance(trainer.train_dataset, Dataset):
        n = min(MEASURED_TRAIN_GROUPS, len(trainer.train_dataset))
        sample = trainer.get_eval_dataloader(trainer.train_dataset.select(range(n)))
        trainer.evaluation_loop(sample, "Measuring", metric_key_prefix="train_sample")
        summary.metrics_on = f"the first {n} training groups"
    else:
        return
    if trainer.args.sync_ref_model:
        summary.state = "The reference moved with the policy (sync_ref_model): there is no before to compare with."
        return
    means, changes = trainer.last_evaluation, summary.metrics
    for name in ("loss", "logps/best", "logps/rest"):
        value, delta = means[name], means[f"{name}_delta"]
        changes[name] = Change(value.mean - delta.mean, value.mean, delta.se, round(value.n))
    if (margin := means.get("rewards/margins")) is not None:  # before training policy and reference are equal
        changes["rewards/margins"] = Change(0.0, margin.mean, margin.se, round(margin.n))


def _words(changes: Mapping[str, Change], beta: float, *, held_out: bool) -> str:
    """Say what moved. The scale is the loss's own: it reads log-probs as implied rewards, beta times as large.

    An implied reward that moves by a twentieth moves a probability between two completions by one in eighty at most.
    """
    nats = {"scale": 1 / beta, "unit": "nats"}
    best, rest = changes["logps/best"], changes["logps/rest"]
    clauses = [moved("the best completion's likelihood", best, **nats)]
    others_too = abs(rest.after - rest.before) > abs(best.after - best.before)
    if others_too:
        clauses.append(moved("the other completions' likelihood", rest, **nats))
    if (margin := changes.get("rewards/margins")) is not None:
        named = "the margin between them" if others_too else "its margin over the others"
        clauses.append(moved(named, margin, scale=1.0))
    if (reward := changes.get("mean_reward")) is not None:
        clauses.append(moved("the mean reward of samples", reward, scale=spread(reward)))
    return "\n".join([in_words(clauses, held_out=held_out), *warn_if_above_start("the loss", changes["loss"])])


def _demo_scores(rows: list[dict[str, Any]], texts: list[list[str]]) -> list[list[float]]:
    return [demo.reward([row["prompt"]] * len(group), group) for row, group in zip(rows, texts, strict=True)]


def _demo_rewards(trainer: ContrastiveTrainer, test: Dataset) -> list[float]:
    """Return the mean reward of samples of each held-out prompt."""
    prompts, tokenizer = test["prompt"], trainer.processing_class
    seeds = [seed_of(trainer.args.seed, "demo", i) for i in range(len(prompts))]
    ids = [tokenise_prompt(prompt, tokenizer) for prompt in prompts]
    with trainer.sampling_from() as model:
        samples, _ = sample_trained(model, tokenizer, ids, [], seeds=seeds, **DEMO_SAMPLES)
    return [sum(demo.reward([p] * len(s), s)) / len(s) for p, s in zip(prompts, samples, strict=True)]
