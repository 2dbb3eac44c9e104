"""Nothing is said to have stood still, risen or fallen that the interval of its change does not show."""

import math

import pytest
import scipy.stats
from small_trainers import COLUMNS

from contrastive_align.launch.contrastive import _words
from contrastive_align.launch.measure import words_on
from contrastive_align.report import (
    Change,
    Number,
    Summary,
    TargetChange,
    distribution_rows,
    moved,
    warn_if_above_start,
)
from contrastive_align.report.words import interval


@pytest.mark.parametrize("n", [3, 4, 8, 30, 1000])
def test_the_interval_is_students(n):
    low, high = interval(Change(1.0, 1.5, se=0.2, n=n))
    assert (low + high) / 2 == pytest.approx(0.5)
    assert (high - low) / 0.4 == pytest.approx(scipy.stats.t.ppf(0.975, n - 1), rel=0.035 if n == 3 else 0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(-90.0, -89.0, se=0.7, n=8), "whether it moved cannot be told from n = 8"),
        (Change(-90.0, -89.0, se=0.4, n=8), "it rose by 1.0000"),
        (Change(-90.0, -91.0, se=0.4, n=8), "it fell by 1.0000"),
        (Change(-90.0, -90.01, se=0.01, n=8), "it did not move"),
        (Change(-90.0, -90.0, se=0.5, n=4000), "whether it moved cannot be told from n = 4000"),
        (Change(-90.0, -90.0, se=0.0, n=8), "it did not move"),
        (Change(-90.0, -80.0, se=math.nan, n=1), "whether it moved cannot be told from n = 1"),
    ],
)
def test_what_is_said_of_a_change(change, said):
    assert moved("it", change, scale=10.0).startswith(said)


def test_words_on_groups():
    """The others stand in them where they moved more than the best, and training groups are called that."""
    changes = {
        "loss": Change(1.386, 1.402, se=0.001, n=100),
        "logps/best": Change(-90.0, -91.0, se=0.1, n=100),
        "logps/rest": Change(-90.0, -95.0, se=0.1, n=100),
        "rewards/margins": Change(0.0, 0.4, se=0.01, n=100),
    }
    text = _words(changes, 0.1, held_out=True)
    assert text.startswith("In words, with 95% intervals: the best completion's likelihood fell by 1.0000 nats")
    assert "the other completions' likelihood fell by 5.0000 nats" in text and "margin between them rose" in text
    assert text.endswith("\nWARNING: the loss ended above its value before training: 1.4020, from 1.3860.")
    changes |= {"logps/rest": Change(-90.0, -90.5, se=0.1, n=100), "loss": Change(1.386, 1.3, se=0.001, n=100)}
    text = _words(changes, 0.1, held_out=False)
    assert text.startswith("In words, on training data alone, with") and "other completions" not in text
    assert "its margin over the others rose" in text and "WARNING" not in text


def test_words_on_a_target():
    near = {"before": 0.1, "se": 0.01, "n": 5000, "target": 0.5, "prompts": 100}
    metrics = {
        "moment/x": TargetChange(after=0.4, **near),
        "kl_target": TargetChange(after=0.2, **near | {"target": 0.0}),
        "js_target": TargetChange(after=0.05, **near | {"target": 0.0}),
    }
    words, *warnings = words_on(metrics, "js", held_out=True)
    assert "moment/x rose by 0.3000" in words and "under the target it is 0.5000; JS fell" in words and not warnings
    _, warning = words_on(metrics, "alpha:3", held_out=True)  # which is not measured
    assert warning == "WARNING: KL(p||pi) ended above its value before training: 0.2000, from 0.1000."


def test_a_doubtful_rise_of_the_loss_is_a_warning_with_its_doubt():
    assert warn_if_above_start("it", Change(1.0, 1.1, se=0.2, n=8))[0].endswith("(within what chance does).")
    assert warn_if_above_start("it", Change(1.0, 1.0 + 1e-9, se=0.0, n=8)) == []


def test_the_loss_at_step_0_is_that_of_an_evaluation_before_training(tmp_path):
    column = COLUMNS[0]
    changes = {"loss_type": ["nca", "sft", "dpo"], "loss_weights": [1.0, 0.5, 0.25], "learning_rate": 0.5}
    trainer = column.make(tmp_path, told={"eval_dataset": column.rows(6)}, max_steps=3, **changes)
    before = trainer.evaluate()
    assert before["eval_loss_delta"] == 0.0
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] - after["eval_loss_delta"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert abs(after["eval_loss_delta"]) > 1e-3


def test_tables_take_few_lines():
    """Short splits share a line, and a short sentence stands in the corner of its table."""
    data = {split: {"line": f"a.jsonl: {n} prompts", "notes": []} for split, n in (("train", 9), ("test", 3))}
    summary = Summary({"line": "nca"}, {"line": "a model"}, "a copy", data, metrics_on="the evaluation split")
    summary.metrics = {"loss": Change(1.4, 1.3, se=0.1, n=8)}
    assert "train data  a.jsonl: 9 prompts; test data: a.jsonl: 3 prompts" in summary.opening().splitlines()
    assert summary.closing().splitlines()[0].startswith("on the evaluation split  before ")
    summary.metrics_on = "the first 128 training groups, which are not held out"
    assert summary.closing().startswith(f"measured on {summary.metrics_on}\n")
    data["test"]["notes"] = ["a note " * 12]
    assert len(summary.opening().splitlines()) == 5


def test_the_table_of_distributions_says_once_what_is_the_same():
    own = {"moment/x": Number(0.5), "samples": Number(200)}
    rows = distribution_rows({"base": own, "tuned+QRS": {**own, "acceptance": Number(0.5), "beta": Number(2.0)}})
    assert [row[0] for row in rows] == ["", "moment/x", "acceptance, beta 2.0000"]
    other = {"base": own, "tuned": {**own, "samples": Number(150)}}
    assert distribution_rows(other)[-1] == ("samples", "200.00", "150.00")
