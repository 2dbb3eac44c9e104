"""The doctor names what recorded runs were made to suffer from, and is silent on healthy ones.

The numbers are those of ``benchmarks/doctor.py --record``: one run of each disease, and healthy runs of every method.
"""

import copy
import json
import re
from pathlib import Path

import pytest

from contrastive_align.report.doctor import RULES, Case, diagnose
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


def diagnosis_of(run):
    return diagnose(run["summary"], history_of(run))


def findings_of(run):
    return diagnosis_of(run).findings


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
    found = diagnosis_of(RUNS[name])
    assert not [finding.rule for finding in found.findings if finding.level == "warning"]
    assert found.lines[0] == f"The doctor's {len(found.rules)} rules found nothing wrong." and not found.blind


def test_every_rule_has_a_disease():
    assert {rule.name for rule in RULES} == set(DISEASES) and len(RULES) == 16


@pytest.mark.parametrize(
    "entry", [{"loss": None}, {"train_loss": None}, {"loss": float("nan")}, {"loss": 0.5, "grad_norm": None}]
)
def test_a_value_that_is_not_finite_is_divergence(entry):
    history = History([{"step": 1, "loss": 0.7, "grad_norm": 1.0}, {"step": 2, **entry}])
    (found,) = diagnose({}, history).findings
    assert found.rule == "diverged" and found.level == "warning"


def test_a_norm_that_is_finite_again_is_no_divergence():
    steps = [{"loss": 0.7, "grad_norm": None}, {"loss": 0.6, "grad_norm": 1.0}]  # as a gradient scaler begins
    assert diagnose({}, History(steps)).findings == []


def test_rules_without_their_metrics_are_not_said_to_have_looked():
    run = copy.deepcopy(RUNS["healthy nca 0"])
    assert diagnosis_of(run).lines == ["The doctor's 13 rules found nothing wrong."]
    run["summary"]["unfinished"] = "4 of 40"
    assert diagnosis_of(run).lines == ["The doctor's 13 rules found nothing wrong so far."]
    run["summary"]["samples"] = {}  # --report_prompts=0
    found = diagnosis_of(run)
    assert [rule.name for rule in found.blind] == ["length", "eos_lost", "repetition", "kl_large"]
    assert found.lines == ["9 of 13 rules could look, and found nothing wrong so far."]
    found = diagnose({}, History([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))
    assert found.lines == ["1 of 16 rules could look, and found nothing wrong."]


@pytest.mark.parametrize(
    ("name", "of_others"),
    [
        ("healthy dpo 0", ["one_hot_labels", "temperature_high", "ess_low", "proposal_stale", "conditions_order"]),
        ("healthy fdpg", ["likelihood_displacement", "length", "one_hot_labels", "conditions_order"]),
        ("healthy conditional", ["likelihood_displacement", "kl_large", "ess_low", "proposal_stale"]),
    ],
)
def test_rules_of_other_methods_are_not_counted(name, of_others):
    assert not {rule.name for rule in diagnosis_of(RUNS[name]).rules} & set(of_others)


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
    found = diagnose({}, History())
    assert found.findings == [] and found.blind == RULES
    assert found.lines == ["None of the doctor's 16 rules could look: nothing that they read was measured."]
    assert Case({"metrics": {"loss": {"before": None, "after": 1.0}}}).change("loss") is None
