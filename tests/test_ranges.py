"""One table of ranges: every numeric option of every command is in it, and says what it expects in the same words."""

import math
import typing
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig

from contrastive_align.launch import cli
from contrastive_align.ranges import RANGES, Range, check_numbers
from contrastive_align.trainers import configs


REFUSED = {
    "reward": configs.NOT_SUPPORTED_CONTRASTIVE,
    "preference": configs.NOT_SUPPORTED_CONTRASTIVE,
    "reference": configs.NOT_SUPPORTED_CONTRASTIVE,
    "fdpg": configs.NOT_SUPPORTED_FDPG,
    "conditional": configs.NOT_SUPPORTED_CONDITIONAL,
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_numeric_option_has_a_range(command):
    run = cli._load(*cli.COMMANDS[command].run)
    without = set()
    for cls in (run.arguments_class, run.config_class, ModelConfig, DatasetMixtureConfig):
        hints = typing.get_type_hints(cls)
        numeric = {f.name for f in fields(cls) if "int" in str(hints[f.name]) or "float" in str(hints[f.name])}
        without |= numeric - RANGES.keys() - REFUSED[command].keys()
        defaults = {f.name: f.default for f in fields(cls) if f.name in numeric & RANGES.keys()}
        outside = {n for n, value in defaults.items() if value is not None and not RANGES[n].takes(value)}
        assert not outside
    assert not without


BELOW_1, ABOVE_0, COUNT = Range(0, 1, below=True), Range(0, above=True), Range(1, whole=True, also=(-1,))
TAKEN = [
    (BELOW_1, [0, 0.5, np.float32(0.25)], [1, -1e-9, math.nan, math.inf, "0.5", True, None, [0.5]]),
    (ABOVE_0, [1e-300, 1e300, np.int64(3)], [0, -1, math.inf, -math.inf]),
    (COUNT, [1, 10.0, -1, 10**30], [0, -2, 1.5, math.nan]),
    (RANGES["save_steps"], [0.1, 1, 500.0], [0, 1.5, -1]),
    (RANGES["pad_to_multiple_of"], ["auto", 8], ["automatic", 0]),
    (RANGES["max_grad_norm"], [None, 0, 1.0], [-1, math.nan]),
]


@pytest.mark.parametrize(
    ("found", "taken", "refused"), TAKEN, ids=lambda value: str(value) if isinstance(value, Range) else ""
)
def test_what_a_range_takes(found, taken, refused):
    assert [value for value in taken if not found.takes(value)] == []
    assert [value for value in refused if found.takes(value)] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": math.inf}, "learning_rate is inf, expected a finite number of 0 or more."),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0, expected a finite number of 0 or more, below 1."),
        ({"top_p": 0}, "top_p is 0, expected a finite number above 0, up to 1."),
        ({"max_steps": -7}, "max_steps is -7, expected a whole number of 1 or more, or -1."),
        ({"seed": 2**32}, "seed is 4294967296, expected a whole number of 0 or more, up to 4294967295."),
        ({"warmup_steps": 2.5}, "warmup_steps is 2.5, expected a finite number of 0 or more (below 1: a share of all "
         "steps)."),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, expected a whole number of 1 or more, or 'auto'."),
        ({"loss_weights": [1, math.nan]}, "loss_weights[1] is nan, expected a finite number of 0 or more."),
        ({"loss_weights": [0, 0.0]}, "loss_weights is [0, 0.0], expected at least one that is not 0."),
        ({"reward_weights": 1.0}, "reward_weights is 1.0, expected a list of numbers."),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0, expected a whole number of 1 or more."),
    ],
)  # fmt: skip
def test_what_is_said(options, said):
    with pytest.raises(ValueError) as error:
        check_numbers(SimpleNamespace(**options))
    assert str(error.value) == said


def test_none_is_for_options_that_may_be_left_out(tmp_path):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    check_numbers(args)
    args.save_total_limit, args.max_length, args.max_grad_norm = None, None, None
    check_numbers(args)
    args.learning_rate = None
    with pytest.raises(ValueError, match="learning_rate is None, expected a finite number of 0 or more"):
        check_numbers(args)
