"""The former package `contrastive_align.feedback`: every name works for one version, with a warning."""

import subprocess
import sys

import pytest

from contrastive_align import conditions, feedback, pool
from contrastive_align.conditions import tokens


MOVED = {
    "CONDITIONS": conditions.CONDITIONS,
    "LEFT_OUT": pool.LEFT_OUT,
    "NEW": pool.NEW,
    "Attributes": conditions.AttributeCondition,
    "Categories": conditions.CategoryCondition,
    "Condition": conditions.Condition,
    "Phrases": conditions.Phrases,
    "Pool": pool.Pool,
    "QuantileTokens": conditions.QuantileTokens,
    "Sample": pool.Sample,
    "Table": pool.Table,
    "Text": conditions.TextCondition,
    "balanced_order": pool.balanced_order,
    "keep": pool.keep,
    "quantiles": pool.quantiles,
    "resolve_condition": conditions.resolve_condition,
}


@pytest.mark.parametrize("name", MOVED)
def test_a_name_of_the_package_warns_and_names_the_new_import(name):
    vars(feedback).pop(name, None)  # as in a fresh process
    found = {}
    with pytest.warns(FutureWarning) as seen:
        exec(f"from contrastive_align.feedback import {name}", found)
    assert found[name] is MOVED[name]
    (warning,) = seen
    room = "pool" if getattr(pool, name, None) is not None else "conditions"
    assert f"Use contrastive_align.{room}." in str(warning.message)


IMPORTS = {  # of former modules, where the name is now
    "conditions import FILE, Condition": "contrastive_align.conditions.conditions",
    "quantile_conditions import Phrases": "contrastive_align.conditions.conditions",
    "judged_conditions import TextCondition": "contrastive_align.conditions.judged",
    "tokens import load_with_condition_tokens": "contrastive_align.conditions.tokens",
    "offline import read_scored": "contrastive_align.conditions.scored_rows",
    "pool import Pool": "contrastive_align.pool.pool",
    "rounds import Sample": "contrastive_align.pool.files",
    "quantiles import keep": "contrastive_align.pool.draws",
    "judge import Judge, JudgeError, Verdict, resolve_judge": "contrastive_align.judge.judge",
}


def test_a_former_module_warns_when_it_is_imported():
    lines = ["import warnings"]
    for what in IMPORTS:
        lines += [
            "with warnings.catch_warnings(record=True) as seen:",
            "    warnings.simplefilter('always')",
            f"    from contrastive_align.feedback.{what}",
            "print([str(w.message) for w in seen if w.category is FutureWarning])",
        ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    for found, new in zip(map(eval, done.stdout.splitlines()), IMPORTS.values(), strict=True):
        (message,) = found
        assert f"Use {new}" in message


def test_other_names_are_missing_and_the_new_modules_are_untouched():
    with pytest.raises(AttributeError, match="has no attribute 'Mailbox'"):
        feedback.Mailbox  # noqa: B018
    with pytest.raises(ImportError):
        from contrastive_align.feedback.tokens import nothing  # noqa: F401
    assert tokens.__spec__.name == tokens.__name__ == "contrastive_align.conditions.tokens"
