"""The former package `contrastive_align.feedback`: every name works for one version, each use with one warning."""

import subprocess
import sys

import pytest

from contrastive_align import conditions, pool


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
def test_a_name_of_the_package_warns_once_and_names_the_new_import(name):
    for _ in range(2):
        found = {}
        with pytest.warns(FutureWarning) as seen:
            exec(f"from contrastive_align.feedback import {name}", found)
        assert found[name] is MOVED[name]
        (warning,) = seen
        room = "pool" if getattr(pool, name, None) is not None else "conditions"
        assert f"Use contrastive_align.{room}." in str(warning.message) and warning.filename == "<string>"


IMPORTS = {  # of each former module, where the name is now
    "atomic import atomic_write": "contrastive_align.data.atomic",
    "conditions import FILE, Condition": "contrastive_align.conditions.conditions",
    "forms import condition_prompt": "contrastive_align.conditions.conditions",
    "quantile_conditions import Phrases": "contrastive_align.conditions.conditions",
    "judged_conditions import Text": "contrastive_align.conditions.judged",
    "tokens import load_with_condition_tokens": "contrastive_align.conditions.tokens",
    "offline import read_scored": "contrastive_align.conditions.scored_rows",
    "pool import Pool": "contrastive_align.pool.pool",
    "rounds import Sample": "contrastive_align.pool.files",
    "quantiles import keep": "contrastive_align.pool.draws",
    "pool_prompts import fingerprint_of": "contrastive_align.pool.prompts",
    "judge import resolve_judge": "contrastive_align.judge.judge",
    "judge_answers import Verdict": "contrastive_align.judge.answers",
    "judge_cache import AnswerCache": "contrastive_align.judge.ledger",
    "judge_endpoint import JudgeError": "contrastive_align.judge.client",
}


def test_a_former_module_warns_once_for_each_import_in_a_fresh_process():
    lines = ["import warnings"]
    for what in IMPORTS:
        lines += [
            "with warnings.catch_warnings(record=True) as seen:",
            "    warnings.simplefilter('always')",
            f"    from contrastive_align.feedback.{what.split(',')[0]}",
            "print([str(w.message) for w in seen if w.category is FutureWarning])",
        ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    for found, new in zip(map(eval, done.stdout.splitlines()), IMPORTS.values(), strict=True):
        (message,) = found
        assert f"Use {new}" in message


def test_a_former_module_that_is_loaded_warns_at_each_use():
    import contrastive_align.feedback.judge  # its own warning is that of the first import in this process
    from contrastive_align.judge.judge import Judge, JudgeError, Verdict, resolve_judge

    new = {"Judge": Judge, "JudgeError": JudgeError, "Verdict": Verdict, "resolve_judge": resolve_judge}
    contrastive_align.feedback.judge._just_warned = False
    for name in [*new, *new]:
        with pytest.warns(FutureWarning, match=rf"Use contrastive_align\.judge\.judge\.{name} ") as seen:
            assert getattr(contrastive_align.feedback.judge, name) is new[name]
        assert len(seen) == 1


def test_renamed_names_are_served_under_their_old_name():
    from contrastive_align.conditions.judged import CategoryCondition
    from contrastive_align.feedback import judge_answers, judged_conditions
    from contrastive_align.judge.answers import CategoryAnswers, FeedbackAnswers

    assert judged_conditions.Categories is CategoryCondition
    assert judge_answers.Categories is CategoryAnswers and judge_answers.Feedback is FeedbackAnswers


def test_quantiles_is_the_function_also_when_the_module_is_imported():
    import contrastive_align.feedback.quantiles  # noqa: F401
    from contrastive_align.feedback import quantiles

    assert quantiles is pool.quantiles


def test_other_names_are_missing_and_the_new_modules_are_untouched():
    import contrastive_align.feedback as package
    from contrastive_align.conditions import tokens

    with pytest.raises(AttributeError, match="has no attribute 'Mailbox'"):
        package.Mailbox  # noqa: B018
    with pytest.raises(ImportError):
        from contrastive_align.feedback.tokens import nothing  # noqa: F401
    assert tokens.__spec__.name == tokens.__name__ == "contrastive_align.conditions.tokens"
