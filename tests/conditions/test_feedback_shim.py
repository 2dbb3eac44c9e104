"""The former package `contrastive_align.feedback`: every name works for one version, with a warning."""

import importlib
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
    (warning,) = [w for w in seen if w.category is FutureWarning]  # the libraries warn at import too
    room = "pool" if getattr(pool, name, None) is not None else "conditions"
    assert f"Use contrastive_align.{room}." in str(warning.message)


FORMER = {  # public names of each former module -> where they are now (None: nowhere), and their name there
    "atomic": {"data.atomic": "atomic_write leftovers"},
    "conditions": {
        "conditions.conditions": "FILE CONDITIONS Condition resolve_condition ladder=texts_or_preset texts=check_texts"
    },
    "forms": {"conditions.conditions": "check_form fill_form condition_prompt", "data.formats": "Prompt=Text"},
    "judge": {"judge.judge": "COUNTS Judge JudgeError JudgeReward Verdict resolve_judge"},
    "judge_answers": {
        "judge.answers": "PROMPTS FOLDER BEST_SCORE Unparsable=Unreadable Verdict answers_from read_template render "
        "Categories=CategoryAnswers Feedback=FeedbackAnswers"
    },
    "judge_cache": {"judge.ledger": "content_key AnswerCache"},
    "judge_endpoint": {"judge.client": "JudgeError Reply", None: "JudgeEndpoint"},
    "judged_conditions": {
        "conditions.judged": "CATEGORIES TOP_SCORE "
        "Attributes=AttributeCondition Categories=CategoryCondition Text=TextCondition"
    },
    "offline": {"conditions.scored_rows": "SINGLE LISTS read_scored SURELY_SHORT=TEMPLATE_ALLOWANCE"},
    "pool": {"pool.pool": "NEW Table Pool"},
    "pool_prompts": {"pool.prompts": "FILE fingerprint_of remember_prompts check_prompts"},
    "quantile_conditions": {"conditions.conditions": "PHRASES QuantileTokens Phrases"},
    "quantiles": {"pool.draws": "LEFT_OUT quantiles keep balanced_order"},
    # write_round and Round take the path of the file now, not its folder.
    "rounds": {"pool.files": "BATCH Sample", "pool.pool": "round_path rounds_in", None: "write_round Round"},
    "tokens": {"conditions.tokens": "add_condition_tokens with_trainable_rows load_with_condition_tokens"},
}


@pytest.mark.parametrize(
    "former, new, name",
    [(f, n, x) for f, places in FORMER.items() for n, names in places.items() for x in names.split()],
)
def test_a_name_of_a_former_module(former, new, name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"contrastive_align.feedback.{former}", raising=False)  # as in a fresh process
    old, _, present = name.partition("=")
    found = {}
    with pytest.warns(FutureWarning, match=f"contrastive_align.feedback.{former} has moved") as seen:
        if new is None:
            with pytest.raises(ImportError, match=f"cannot import name '{old}'"):
                exec(f"from contrastive_align.feedback.{former} import {old}", found)
            return
        exec(f"from contrastive_align.feedback.{former} import {old}", found)
    assert found[old] is getattr(importlib.import_module(f"contrastive_align.{new}"), present or old)
    (warning,) = [w for w in seen if w.category is FutureWarning]  # the libraries warn at import too
    assert not present or f"{old} is now {present}" in str(warning.message)


def test_the_warning_is_shown_where_the_import_stands():
    lines = ["import contrastive_align", "from contrastive_align.feedback.judged_conditions import Text"]
    code = ["import warnings", "warnings.simplefilter('always')", *lines]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    assert "<string>:4: FutureWarning: contrastive_align.feedback.judged_conditions has moved. Use " in done.stderr


def test_other_names_are_missing_and_the_new_modules_are_untouched():
    with pytest.raises(AttributeError, match="has no attribute 'Mailbox'"):
        feedback.Mailbox  # noqa: B018
    with pytest.raises(ImportError):
        from contrastive_align.feedback.tokens import nothing  # noqa: F401
    assert tokens.__spec__.name == tokens.__name__ == "contrastive_align.conditions.tokens"
