"""What is logged, against scipy and against counting by hand."""

import math

import pytest
import scipy.stats
import torch

from contrastive_align.losses import divergence_value, target_labels
from contrastive_align.trainers.metrics import Averages, distribution_metrics, group_metrics


def metrics_of(ratios, scores, valid=None, beta=0.1):
    ratios, scores = torch.tensor(ratios, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else torch.tensor(valid)
    labels = target_labels(scores, temperature_alpha=1.0, valid=valid)
    return group_metrics(
        log_ratios=ratios, policy_logps=ratios - 50, scores=scores, labels=labels, valid=valid, beta=beta
    )


def test_one_group_by_hand():
    m = metrics_of([[1.0, -2.0, 4.0, 0.0]], [[0.5, 2.0, -1.0, 0.0]])
    assert {j: m[f"rewards/rank_{j}"][0].item() for j in range(4)} == pytest.approx({0: -0.2, 1: 0.1, 2: 0.0, 3: 0.4})
    assert m["rewards/margins"][0].item() == pytest.approx(-0.2 - (0.1 + 0.0 + 0.4) / 3)
    assert m["rewards/accuracies"][0].item() == 0 and m["rewards/pair_accuracies"][0].item() == 0
    assert m["logps/best"][0].item() == -52 and m["logps/best_delta"][0].item() == -2
    assert m["logps/rest"][0].item() == pytest.approx(-50 + 5 / 3)
    assert m["groups/no_signal"][0].item() == 0


def test_accuracy_counts_the_best_against_all_and_against_each():
    m = metrics_of([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]], [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert m["rewards/accuracies"][0].tolist() == [0, 1]
    assert m["rewards/pair_accuracies"][0].tolist() == [0.5, 1]


def test_a_group_without_signal_has_no_accuracy_margin_or_tau():
    m = metrics_of([[1.0, 2.0]], [[3.0, 3.0]])
    for name in ("rewards/accuracies", "rewards/margins", "rewards/kendall_tau", "rewards/chosen"):
        assert m[name][1].item() == 0, name
    assert m["groups/no_signal"][0].item() == 1 and m["labels/entropy"][0].item() == pytest.approx(math.log(2))


def test_masked_columns_change_nothing():
    plain = metrics_of([[1.0, -2.0, 4.0]], [[0.5, 2.0, -1.0]])
    wide = metrics_of([[1.0, 9.9, -2.0, 4.0]], [[0.5, 7.0, 2.0, -1.0]], valid=[[True, False, True, True]])
    for name, (value, weight) in plain.items():
        assert wide[name][0].item() == pytest.approx(value.item()), name
        assert wide[name][1].item() == weight.item()
    assert wide["rewards/rank_3"][1].item() == 0


def test_kendall_tau_is_scipys():
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    scores = torch.randn(50, 6, generator=generator, dtype=torch.float64).round()
    tau, weight = metrics_of(ratios.tolist(), scores.tolist())["rewards/kendall_tau"]
    for i in range(50):
        want = scipy.stats.kendalltau(scores[i], ratios[i]).statistic
        assert (math.isnan(want) and weight[i] == 0) or tau[i].item() == pytest.approx(want, abs=1e-12)


def test_averages_do_not_depend_on_the_batches_and_know_their_error():
    values, weights = torch.randn(20, dtype=torch.float64), (torch.rand(20) > 0.3).double()
    kept = values[weights > 0]
    for size in (1, 7, 20):
        averages = Averages()
        for v, w in zip(values.split(size), weights.split(size), strict=True):
            averages.add({"x": (v, w)})
        mean = averages.compute()["x"]
        assert mean.mean == pytest.approx(kept.mean().item())
        assert mean.se == pytest.approx(kept.std().item() / len(kept) ** 0.5)
        assert mean.n == len(kept)
    assert averages.compute() == {}


def test_a_nan_of_weight_0_is_left_out():
    averages = Averages()
    averages.add({"x": (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0]))})
    assert averages.compute()["x"].mean == 1.0


@pytest.mark.parametrize("near", [True, False])
def test_the_errors_of_what_f_dpg_logs_cover_the_truth(near):
    """Two standard errors are too few in one of twenty repeats; of these 80 on a table, in one of eight at most."""
    noise = torch.Generator().manual_seed(0)
    base = torch.rand(40, generator=noise, dtype=torch.float64).log().log_softmax(-1)
    feature = (torch.rand(40, generator=noise) < 0.3).double()
    score = base + 2 * feature
    log_z = score.logsumexp(-1)
    policy = (base + (1.8 if near else 0.5) * feature).log_softmax(-1)
    names = {"kl": "kl_target", "reverse_kl": "reverse_kl_target", "js": "js_target", "tv": "tv_target"}
    truth = {key: divergence_value(name, policy, score - log_z).item() for name, key in names.items()}
    truth |= {"log_z": log_z.item()}
    prompts, k, repeats = 64, 16, 80
    misses, sizes = dict.fromkeys(truth, 0), (prompts, k)
    for _ in range(repeats):
        y = torch.multinomial(policy.exp(), prompts * k, replacement=True, generator=noise).view(sizes)
        found = distribution_metrics(
            policy_logps=policy[y], proposal_logps=policy[y], base_logps=base[y], target_log_scores=score[y],
            phi=feature[y].unsqueeze(-1), names=["f"], keys=[str(i) for i in range(prompts)], lengths=torch.ones(sizes),
            ended=torch.ones(sizes), completion_ids=[[[1, 2]] * k] * prompts,
        )  # fmt: skip
        for key, value in truth.items():
            misses[key] += abs(found[key] - value) > 2 * found[f"{key}/se"]
    assert all(count <= repeats / 8 for count in misses.values()), misses
