"""``contrastive-align reward`` and ``preference``: train on scored completions or on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from accelerate.utils import is_peft_model
from datasets import Dataset

from contrastive_align import demo
from contrastive_align.data import DataReport, read_shape
from contrastive_align.data.columns import read_options
from contrastive_align.data.reading import TOKEN_COLUMNS
from contrastive_align.data.tokenise import tokenise_prompt
from contrastive_align.launch import preflight
from contrastive_align.launch.arguments import Arguments
from contrastive_align.launch.ask import sample_trained
from contrastive_align.launch.common import Run, model_arguments, print_on_main
from contrastive_align.launch.datasets import DEMO_NAME, load_demo, load_splits
from contrastive_align.launch.record import HeldOut, MovedGroups, choose_rows
from contrastive_align.launch.usage import UsageError
from contrastive_align.losses import LOSSES
from contrastive_align.report import Change, Summary, in_words, moved, spread, warn_if_above_start
from contrastive_align.sampling.decode import seed_of
from contrastive_align.trainers import ContrastiveTrainer
from contrastive_align.trainers.configs import AUTO


DEMO_SAMPLES = {"per_prompt": 4, "max_new_tokens": 48}
MEASURED_TRAIN_GROUPS = 256


class RewardRun(Run):
    """The run of ``contrastive-align reward``."""

    command = "reward"
    demo_model: ClassVar[dict[str, Any]] = {"max_length": 512, "learning_rate": 3e-4}
    demo_data: ClassVar[dict[str, Any]] = {
        **{"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32},
        **{"num_train_epochs": 1, "logging_steps": 10},
    }

    def load_data(self) -> tuple[Any, Any, str]:
        """Load the groups."""
        args, name = self.args, self.args.dataset or DEMO_NAME
        if args.bundled_data:
            train, test = load_demo(args, preference=self.command == "preference")
        else:
            train, test = load_splits(args, on_bad_row=args.training.on_bad_row)
        return train, test, name

    def build_trainer(self, checkpoint: str | bool | None) -> ContrastiveTrainer:
        """Build the trainer of the groups."""
        rows = {"train_dataset": self.train_rows, "eval_dataset": self.test_rows}
        return ContrastiveTrainer(**rows, **model_arguments(self.args))

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Name the losses, their weights and their options."""
        training = self.args.training
        weights = training.loss_weights or [1.0] * len(training.loss_type)
        named = zip(training.loss_type, weights, strict=True)
        named = [(LOSSES.describe(loss), weight) for loss, weight in named]
        losses = " + ".join(f"{weight:g} {loss}" if len(weights) > 1 else loss for loss, weight in named)
        line = f"{losses}, beta={training.beta:g}, temperature_alpha={self.trainer.temperature_alpha:.4g}"
        line += " (auto)" if training.temperature_alpha == AUTO else ""
        found = {"loss_type": training.loss_type, "loss_weights": weights}
        found |= {"temperature_alpha": self.trainer.temperature_alpha, **self.options("beta", "learning_rate", "seed")}
        sources = {name: LOSSES.describe(name) for name in training.loss_type if name in LOSSES.hashes}
        return line, found | ({"own_losses": sources} if sources else {})

    def describe_data(self) -> dict[str, dict[str, Any]]:
        """Count groups and rows."""
        return {split: _data_entry(self.data_name, report) for split, report in self.trainer.data_reports.items()}

    def describe_reference(self) -> str:
        """Say where it moves, and where its log-probs are cached."""
        args = self.trainer.args
        if args.sync_ref_model:
            return f"{self.model_name} at the start, then following the policy (sync_ref_model)"
        if args.precompute_ref_log_probs and not is_peft_model(self.trainer.model):
            return f"{self.model_name}, its log-probs cached"
        return super().describe_reference()

    def before_training(self) -> None:
        """Sample the bundled prompts for their mean reward."""
        if self.args.bundled_data:
            self.rewards_before = _demo_rewards(self.trainer, self.test_rows)

    def held_out(self, most: int) -> HeldOut:
        """Choose groups by their tokens, whatever shape the rows had."""
        trainer, dataset = self.trainer, self.trainer.eval_dataset
        dataset = trainer.train_dataset if dataset is None else dataset
        if not isinstance(dataset, Dataset):  # reading a tokenised stream would count its rows twice
            return super().held_out(most)
        ids = [row["prompt_ids"] for row in choose_rows(dataset, most, trainer.args.seed)]
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        return HeldOut(texts, ids, [{"prompt": text} for text in texts], self._where)

    def rewards_of(self) -> tuple[Any, str]:
        """Score samples of the bundled prompts; other scored data come without a function."""
        return (_demo_scores, "reward") if self.args.bundled_data else (None, "")

    def longest_and_mean(self) -> tuple[int, int] | None:
        """Count the tokens of batches of groups."""
        sizes = preflight.group_sizes(self.trainer.train_dataset, self.trainer.layout)
        return preflight.largest_and_mean(sizes, self.trainer.args.per_device_train_batch_size)

    def facts(self) -> dict[str, Any]:
        """Read grades and lengths of the training groups."""
        return {**super().facts(), **preflight.data_facts(self.trainer.train_dataset, self.trainer)}

    def train(self, checkpoint: str | bool | None) -> None:
        """Train; say what streams held, which is known once they are read."""
        super().train(checkpoint)
        self.summary.data = self.describe_data()
        for split, report in self.summary.data.items():
            if report["streamed"]:
                print_on_main("\n  ".join([f"{split} data: {report['line']}", *report["notes"]]))

    def after_saving(self) -> None:
        """Describe the method again: a resumed run has the temperature of its checkpoint."""
        line, options = self.describe()
        self.summary.method |= {"line": line, **options}

    def measure(self) -> None:
        """Compare log-probs, and on bundled data rewards, before and after."""
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
        """Keep pairs hard, whatever ratings stand beside them."""
        return {**super().defaults(args), "hard_pairs": True}

    def load_data(self) -> tuple[Any, Any, str]:
        """Load the groups, which must be pairs."""
        train, test, name = super().load_data()
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
