"""Every loss against an independent formula, in float64; masks, permutations, optima and step-0 values."""

import ast
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import contrastive_align.losses as losses_room
from contrastive_align.losses import (
    ALIASES,
    LOSSES,
    canonical_loss_name,
    dpo,
    label_entropy,
    target_labels,
    temperature_for_entropy,
)


BETA = 0.37
ANY_K = [name for name in LOSSES if name != "biased_nca"]


def call(name, log_ratios, scores, *, alpha=0.7, beta=BETA, valid=None, seed=5):
    generator = torch.Generator().manual_seed(seed)
    policy = -5 - torch.rand(scores.shape, generator=generator, dtype=log_ratios.dtype)
    lengths = torch.randint(1, 9, scores.shape, generator=generator)
    return LOSSES[name](
        log_ratios, scores, beta=beta, temperature_alpha=alpha, valid=valid, policy_logps=policy, lengths=lengths
    )


def groups(k, batch=6, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    log_ratios = 3 * torch.randn(batch, k, generator=generator, dtype=torch.float64)
    scores = torch.randn(batch, k, generator=generator, dtype=torch.float64)
    return log_ratios, scores.round() if ties else scores


# ---------------------------------------------------------------- independent formulas, one group, plain Python floats


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def labels_of(scores, alpha):
    if sorted(scores) == [0, 1]:
        return [float(s == 1) for s in scores]
    exps = [math.exp((s - max(scores)) / alpha) for s in scores]
    return [e / sum(exps) for e in exps]


def by_hand(name, ratios, scores, alpha, beta):
    r, k, p = [beta * x for x in ratios], len(ratios), labels_of(scores, alpha)
    if name == "nca":
        return -sum(p[i] * math.log(sigmoid(r[i])) + math.log(1 - sigmoid(r[i])) / k for i in range(k))
    if name == "info_nca":
        total = sum(math.exp(x) for x in r)
        return -sum(p[i] * math.log(math.exp(r[i]) / total) for i in range(k))
    if name == "biased_nca":
        order = [(0, 1)] if scores[0] > scores[1] else [(1, 0)] if scores[1] > scores[0] else [(0, 1), (1, 0)]
        return sum(-math.log(sigmoid(r[w])) - math.log(1 - sigmoid(r[loser])) for w, loser in order) / len(order)
    if name in ("dpo", "dpo_best_vs_rest"):
        pairs = [(i, j) for i in range(k) for j in range(k) if scores[i] > scores[j]]
        if name == "dpo_best_vs_rest":
            pairs = [(i, j) for i, j in pairs if scores[i] == max(scores)]
        return sum(-math.log(sigmoid(r[i] - r[j])) for i, j in pairs) / len(pairs) if pairs else 0.0
    if name == "plackett_luce":
        if len(set(scores)) == 1:
            return 0.0
        return -sum(r[i] - math.log(sum(math.exp(r[j]) for j in range(k) if scores[j] <= scores[i])) for i in range(k))
    raise KeyError(name)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("k", [2, 3, 4, 7, 13])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "sft"])
def test_equals_the_formula_by_hand(name, k, alpha, ties):
    if name == "biased_nca" and k > 2:
        k = 2
    log_ratios, scores = groups(k, seed=k, ties=ties)
    got = call(name, log_ratios, scores, alpha=alpha)
    want = [by_hand(name, lr, s, alpha, BETA) for lr, s in zip(log_ratios.tolist(), scores.tolist(), strict=True)]
    assert got.shape == (len(want),)
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-10)


def test_sft_is_the_nll_per_token_of_the_best():
    policy = torch.tensor([[-6.0, -1.0, -8.0]], dtype=torch.float64)
    lengths = torch.tensor([[3, 1, 2]])
    for scores, want in (([[2.0, 1.0, 0.0]], 2.0), ([[0.0, 1.0, 3.0]], 4.0), ([[1.0, 0.0, 1.0]], 3.0)):
        got = LOSSES["sft"](
            policy, torch.tensor(scores), beta=1.0, temperature_alpha=1.0, policy_logps=policy, lengths=lengths
        )
        assert got.item() == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="policy_logps"):
        LOSSES["sft"](policy, torch.tensor([[1.0, 0.0, 0.0]]), beta=1.0, temperature_alpha=1.0)


# ---------------------------------------------------------------------------------------------------------- identities


def test_pairs_are_the_pair_losses():
    log_ratios, _ = groups(2, batch=50)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(50, 2)
    win, lose = (BETA * log_ratios).unbind(1)
    ls = torch.nn.functional.logsigmoid
    assert torch.allclose(call("nca", log_ratios, scores), -ls(win) - 0.5 * ls(-win) - 0.5 * ls(-lose), atol=1e-12)
    assert torch.allclose(call("biased_nca", log_ratios, scores), -ls(win) - ls(-lose), atol=1e-12)
    for name in ("dpo", "dpo_best_vs_rest", "info_nca", "plackett_luce"):
        assert torch.allclose(call(name, log_ratios, scores), -ls(win - lose), atol=1e-12), name


@pytest.mark.parametrize("alpha", [1e-4, 1.0, 1e6])
def test_a_preference_is_hard_whatever_the_temperature(alpha):
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(target_labels(scores, temperature_alpha=alpha), scores)
    ragged = torch.tensor([[1.0, 7.0, 0.0]])
    valid = torch.tensor([[True, False, True]])
    assert target_labels(ragged, temperature_alpha=alpha, valid=valid).tolist() == [[1.0, 0.0, 0.0]]


def test_binary_scores_of_more_than_two_keep_their_temperature():
    p = target_labels(torch.tensor([[1.0, 0.0, 0.0]]), temperature_alpha=1.0)
    assert torch.allclose(p, torch.softmax(torch.tensor([[1.0, 0.0, 0.0]]), -1))


def test_soft_labels_on_a_pair_are_conservative_dpo():
    log_ratios, scores = groups(2, batch=20)
    p = torch.softmax(scores / 0.7, -1)
    margin = BETA * (log_ratios[:, 0] - log_ratios[:, 1])
    ls = torch.nn.functional.logsigmoid
    assert torch.allclose(call("info_nca", log_ratios, scores), -p[:, 0] * ls(margin) - p[:, 1] * ls(-margin))


@pytest.mark.parametrize("k", [2, 3, 4, 13])
def test_values_at_step_0(k):
    _, scores = groups(k)
    zeros = torch.zeros_like(scores)
    assert torch.allclose(call("nca", zeros, scores), torch.tensor(2 * math.log(2), dtype=torch.float64))
    assert torch.allclose(call("info_nca", zeros, scores), torch.tensor(math.log(k), dtype=torch.float64))
    assert torch.allclose(call("dpo", zeros, scores), torch.tensor(math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_optima(k):
    """NCA pins r_i = ln(K p_i); InfoNCA pins softmax(r) = p with loss H(p): the gradient is 0 there."""
    _, scores = groups(k, seed=3)
    p = torch.softmax(scores / 0.7, -1)
    for name, r in (("nca", (k * p).log()), ("info_nca", p.log() + 0.8)):
        log_ratios = (r / BETA).requires_grad_()
        loss = call(name, log_ratios, scores)
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratios)
        assert gradient.abs().max() < 1e-12, name
        if name == "info_nca":
            assert torch.allclose(loss, label_entropy(p), atol=1e-12)
        worse = call(name, log_ratios + torch.randn(log_ratios.shape, dtype=torch.float64), scores)
        assert (worse >= loss - 1e-12).all(), name


def test_hard_label_nca_optimum_is_ln_k():
    """Found by optimising, not by formula: the best goes to ln K, the others to minus infinity."""
    r = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    optimiser = torch.optim.LBFGS([r], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = LOSSES["nca"](r, scores, beta=1.0, temperature_alpha=1e-4).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert r[0, 0].item() == pytest.approx(math.log(4), abs=1e-4)
    assert (r[0, 1:] < -8).all()


def test_the_published_minimum_of_the_pair():
    """facts: in pairwise NCA the chosen's two terms are lowest at ln 2, where they are 0.9548."""
    r = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    terms = -torch.nn.functional.logsigmoid(r) - 0.5 * torch.nn.functional.logsigmoid(-r)
    assert r[terms.argmin()].item() == pytest.approx(math.log(2), abs=1e-4)
    far = torch.stack([r, torch.full_like(r, -1e3)], 1)
    loss = LOSSES["nca"](far, torch.tensor([[1.0, 0.0]]).expand(len(r), 2), beta=1.0, temperature_alpha=1e-4)
    assert loss.min().item() == pytest.approx(0.9548, abs=1e-4)


# ------------------------------------------------------------------------------------------------- masks, permutations


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ANY_K)
def test_a_masked_column_is_a_removed_column(name, garbage):
    log_ratios, scores = groups(4, ties=True)
    policy, lengths = -torch.rand(6, 4, dtype=torch.float64), torch.randint(1, 9, (6, 4))
    column = torch.full((6, 1), garbage, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True, True]]).expand(6, 5)

    def widen(t, fill=None):
        middle = column.to(t.dtype) if fill is None else torch.full((6, 1), fill, dtype=t.dtype)
        return torch.cat([t[:, :2], middle, t[:, 2:]], 1)

    results = []
    for wide in (False, True):
        x = (widen(log_ratios) if wide else log_ratios).clone().requires_grad_()
        loss = LOSSES[name](
            x,
            widen(scores) if wide else scores,
            beta=BETA,
            temperature_alpha=0.7,
            valid=valid if wide else None,
            policy_logps=widen(policy) if wide else policy,
            lengths=widen(lengths, 0) if wide else lengths,
        )
        gradient = torch.autograd.grad(loss.sum(), x)[0] if loss.requires_grad else torch.zeros_like(x)
        results.append((loss.detach(), gradient[:, [0, 1, 3, 4]] if wide else gradient))
        assert not wide or (gradient[:, 2] == 0).all()
    assert torch.equal(*(loss for loss, _ in results)) or torch.allclose(results[0][0], results[1][0], atol=1e-13)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_an_all_masked_row_gives_zero_and_a_finite_gradient(name):
    log_ratios, scores = groups(2, batch=3)
    valid = torch.tensor([[True, True], [False, False], [True, True]])
    policy = (-torch.ones(3, 2, dtype=torch.float64)).requires_grad_()
    x = log_ratios.clone().requires_grad_()
    loss = LOSSES[name](
        x,
        scores,
        beta=BETA,
        temperature_alpha=0.7,
        valid=valid,
        policy_logps=policy,
        lengths=torch.ones(3, 2, dtype=torch.long),
    )
    assert loss[1] == 0
    loss.sum().backward()
    for gradient in (x.grad, policy.grad):
        assert gradient is None or torch.isfinite(gradient).all()
        assert gradient is None or (gradient[1] == 0).all()


@pytest.mark.parametrize("name", ANY_K)
def test_permuting_completions_permutes_the_gradient(name):
    log_ratios, scores = groups(4, ties=True)
    policy, lengths = -torch.rand(6, 4, dtype=torch.float64), torch.randint(1, 9, (6, 4))

    def loss_and_gradient(order):
        x, pi = log_ratios[:, order].clone().requires_grad_(), policy[:, order].clone().requires_grad_()
        loss = LOSSES[name](
            x,
            scores[:, order],
            beta=BETA,
            temperature_alpha=0.7,
            policy_logps=pi,
            lengths=lengths[:, order],
        )
        loss.sum().backward()
        return loss.detach(), (pi if name == "sft" else x).grad

    base_loss, base_gradient = loss_and_gradient([0, 1, 2, 3])
    for order in itertools.permutations(range(4)):
        loss, gradient = loss_and_gradient(list(order))
        assert torch.allclose(loss, base_loss, atol=1e-12)
        assert torch.allclose(gradient, base_gradient[:, list(order)], atol=1e-12)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "sft"])
def test_gradcheck(name):
    k = 2 if name == "biased_nca" else 5
    log_ratios, scores = groups(k, ties=True)
    valid = torch.ones(6, k, dtype=torch.bool)
    if k > 2:
        valid[0, 3:], valid[1, :2], valid[2] = False, False, False
    assert torch.autograd.gradcheck(
        lambda x: call(name, x, scores, valid=valid), (log_ratios.clone().requires_grad_(),), atol=1e-8
    )


# ------------------------------------------------------------------------------------------- ties and degenerate groups


def test_ties():
    log_ratios, _ = groups(3, batch=1)
    tied = torch.full((1, 3), 2.5, dtype=torch.float64)
    assert call("dpo", log_ratios, tied).item() == 0
    assert call("dpo_best_vs_rest", log_ratios, tied).item() == 0
    assert call("plackett_luce", log_ratios, tied).item() == 0
    assert target_labels(tied, temperature_alpha=1e-4).tolist() == [[pytest.approx(1 / 3)] * 3]


def test_errors():
    with pytest.raises(ValueError, match=r"pairs, found groups with K in \[3\]"):
        call("biased_nca", *groups(3))
    with pytest.raises(ValueError, match="best_vs_rest"):
        dpo(torch.zeros(1, 2), torch.zeros(1, 2), beta=1.0, temperature_alpha=1.0, pairs="some")
    with pytest.raises(ValueError, match="temperature_alpha is 0"):
        call("nca", *groups(3), alpha=0)


def test_large_scores_at_a_small_temperature_keep_their_digits():
    scores = torch.tensor([[10000.0001, 10000.0, 3.0]], dtype=torch.float64)
    p = target_labels(scores, temperature_alpha=1e-4)
    assert p[0, 0].item() == pytest.approx(math.e / (1 + math.e), abs=1e-6)
    extreme = torch.tensor([[1e4, -1e4]])
    for name in ANY_K:
        assert torch.isfinite(call(name, extreme * 10, extreme)).all(), name


def test_temperature_for_entropy():
    _, scores = groups(5, batch=40)
    alpha = temperature_for_entropy(scores)
    half = label_entropy(target_labels(scores, temperature_alpha=alpha)).mean() / math.log(5)
    assert half.item() == pytest.approx(0.5, abs=1e-9)
    assert temperature_for_entropy(torch.ones(3, 4)) is None
    with pytest.raises(ValueError, match="fraction is 1"):
        temperature_for_entropy(scores, fraction=1)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e7])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_temperature_for_entropy_is_a_plain_bisection(scale, fraction):
    """Ragged groups with ties at the top, beside preferences and equal scores, which no temperature changes."""
    rows = [[3.0, 3.0, 1.0], [0.5, 2.0], [0.0, -1.0, 0.25, 0.2], [4.0, 4.0, 4.0, 4.0, 1.0]]
    k, tied = [3, 2, 4, 5], [2, 1, 1, 4]

    def mean_entropy(alpha):
        total = 0.0
        for row in rows:
            weights = [math.exp((score - max(row)) / alpha) for score in row]
            total -= sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0)
        return total / len(rows)

    lower, upper = (sum(map(math.log, counts)) / 4 for counts in (tied, k))
    wish = fraction * upper if fraction * upper > lower else lower + fraction * (upper - lower)
    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_entropy(middle) < wish else (low, middle)

    # A preference is told by its scores (1, 0), whatever the others' scale.
    together = [[scale * score for score in row] for row in rows] + [[1.0, 0.0], [7.0, 7.0, 7.0]]
    scores = torch.full((6, 5), 99.0, dtype=torch.float64)
    valid = torch.zeros(6, 5, dtype=torch.bool)
    for i, row in enumerate(together):
        scores[i, : len(row)], valid[i, : len(row)] = torch.tensor(row, dtype=torch.float64), True
    assert temperature_for_entropy(scores, valid=valid, fraction=fraction) == pytest.approx(scale * low, rel=1e-9)


def test_temperature_for_entropy_has_no_answer_where_no_label_depends_on_it():
    assert temperature_for_entropy(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])) is None


# ------------------------------------------------------------------------------------------------------------ the room


def test_names():
    for spelling, name in {
        "NCA": "nca",
        "InfoNCA": "info_nca",
        "info_nca": "info_nca",
        "info-nca": "info_nca",
        "biasedNCA": "biased_nca",
        "DPO": "dpo",
        "sigmoid": "dpo",
        "nca_pair": "nca",
        "bco_pair": "biased_nca",
        "PlackettLuce": "plackett_luce",
    }.items():
        assert canonical_loss_name(spelling) == name
    assert set(ALIASES.values()) <= set(LOSSES)
    with pytest.raises(ValueError, match=r"hinge.*Known: nca"):
        canonical_loss_name("hinge")


def test_the_room_imports_torch_and_the_standard_library_alone():
    allowed = {"torch", *sys.stdlib_module_names}
    for file in Path(losses_room.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith(("contrastive_align.losses", "contrastive_align.registry"))
                assert name.split(".")[0] in allowed or own, (file, name)
