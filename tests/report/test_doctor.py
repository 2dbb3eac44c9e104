"""The doctor names what recorded runs were made to suffer from, and is silent on healthy ones.

The numbers are those of ``benchmarks/doctor.py --record``: one run of each disease, and healthy runs of every method.
"""

import copy
import json
import re
from pathlib import Path

import pytest

from contrastive_align.report.doctor import RULES, Case, diagnose, verdict
from contrastive_align.report.history import History


RUNS = json.loads((Path(__file__).parents[1] / "fixtures" / "doctor.json").read_text())
DISEASES = [name for name in RUNS if not name.startswith("healthy")]
HEALTHY = [name for name in RUNS if name.startswith("healthy")]


def history_of(run):
    history = History()
    for name, points in run["points"].items():
        for step, value in points:
            history.add({"step": step, name: value})
    return history


def findings_of(run):
    return diagnose(run["summary"], history_of(run))


@pytest.mark.parametrize("disease", DISEASES)
def test_a_disease_is_named(disease):
    found = {finding.rule: finding for finding in findings_of(RUNS[disease])}
    assert disease in found
    finding = found[disease]
    assert finding.evidence and any(isinstance(value, float) for value in finding.evidence.values())
    assert finding.threshold and finding.source
    assert 2 <= len(re.findall(r"\.(?= [A-Z]|$)", finding.says)) <= 3
    assert re.search(r"\d", finding.says) or "sync_ref_model" in finding.says  # an option, and no number


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name):
    found = findings_of(RUNS[name])
    assert not [finding.rule for finding in found if finding.level == "warning"]
    assert "found nothing wrong" in verdict(found)[0]


def test_every_rule_has_a_disease():
    assert {rule.name for rule in RULES} == set(DISEASES) and len(RULES) == 15


def test_what_the_user_chose_is_a_note():
    found = {finding.rule: finding.level for finding in findings_of(RUNS["one_hot_labels"])}
    assert found["one_hot_labels"] == "note"


@pytest.mark.parametrize("disease", ["likelihood_displacement", "eos_lost", "repetition", "kl_large", "length"])
def test_what_chance_may_do_is_not_named(disease):
    run = copy.deepcopy(RUNS[disease])
    for part in ("metrics", "samples"):
        for change in run["summary"][part].values():
            change["se"] = 1e6
    run["points"] = {}
    assert disease not in [finding.rule for finding in findings_of(run)]


def test_a_run_that_measured_nothing_is_not_judged():
    assert diagnose({}, History()) == []
    assert Case({"metrics": {"loss": {"before": None, "after": 1.0}}}).change("loss") is None
