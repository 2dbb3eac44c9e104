"""The moving-average baseline: what it averages, that it knows earlier steps only, that it is saved."""

import pytest
import torch
from test_fdpg_trainer import make_tokenizer, moment_target, trained

from contrastive_align.losses import mean_slope
from contrastive_align.trainers import fdpg as trainer_module
from contrastive_align.trainers.adaptive_proposal import WindowBaseline


def test_a_prompt_without_mass_is_left_out():
    logs = torch.zeros(2, 2)
    scores = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    slopes = mean_slope(logs, logs, scores, log_z=torch.tensor([0.0, -torch.inf]), divergence="js")
    baseline = WindowBaseline(3)
    baseline.add(slopes)
    assert baseline.value == pytest.approx(0.0) and baseline.state_dict() == {"means": [pytest.approx(0.0)]}
    baseline.add(slopes[1:])
    assert len(baseline.state_dict()["means"]) == 1


def test_the_baseline_of_a_step_is_that_of_earlier_steps(tmp_path, monkeypatch):
    seen = []

    def spy(*logs, **kwargs):
        seen.append((kwargs["baseline"], *logs, kwargs["log_z"]))
        return real(*logs, **kwargs)

    real = trainer_module.fdpg
    monkeypatch.setattr(trainer_module, "fdpg", spy)
    trained(
        make_tokenizer(), tmp_path, moment_target(), max_steps=5, baseline="window", baseline_window=2, divergence="kl"
    )
    means = []
    for baseline, _, proposal, target, log_z in seen:
        want = sum(means[-2:]) / max(1, len(means[-2:]))
        assert baseline.tolist() == [pytest.approx(want, abs=1e-9)] * 2
        means.append((-(target - log_z[:, None] - proposal).exp()).mean().item())  # f' = -p / pi, samples of pi
    assert len(means) == 5 and means[0] < -0.5


def test_killed_and_resumed_is_not_killed(tmp_path):
    same = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "steps_per_generation": 2, "baseline": "window"}
    tokenizer = make_tokenizer()
    whole = trained(tokenizer, tmp_path / "whole", moment_target(), **same)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = trained(tokenizer, tmp_path / "resumed", moment_target(), resume=checkpoint, **same)
    assert whole.baseline.state_dict() == resumed.baseline.state_dict()
    assert len(whole.baseline.state_dict()["means"]) == 3
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_bad_options_are_refused(tmp_path):
    for wrong, match in (({"baseline": "mean"}, "expected one of"), ({"baseline_window": 0}, "baseline_window")):
        with pytest.raises(ValueError, match=match):
            trained(make_tokenizer(), tmp_path, moment_target(), **wrong)
