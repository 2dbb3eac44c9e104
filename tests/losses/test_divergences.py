"""Slopes, exact divergences and the f-DPG surrogate, in float64, on policies whose completions can be enumerated."""

import itertools
import math

import pytest
import torch

from contrastive_align.losses import (
    DIVERGENCES,
    canonical_divergence_name,
    divergence,
    divergence_value,
    fdpg,
    mean_slope,
)


ALPHAS = [-2, -1, 0, 0.5, 1, 2, 3]
NAMES = [*DIVERGENCES, *(f"alpha:{a}" for a in ALPHAS)]
INFINITE_AT_P_0 = ["reverse_kl", "reverse_chi2", "alpha:1", "alpha:2", "alpha:3"]
FINITE_AT_P_0 = [name for name in NAMES if name not in INFINITE_AT_P_0]
F64 = {"dtype": torch.float64}
INF = math.inf


def generator(t, name):
    """f(t), with f(1) = 0, as the papers write it; D_f = sum p f(pi / p)."""
    a = float(name.partition(":")[2] or 0)
    return {
        "kl": lambda: -t.log(),
        "reverse_kl": lambda: t * t.log(),
        "js": lambda: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(),
        "tv": lambda: (t - 1).abs() / 2,
        "chi2": lambda: (t - 1) ** 2 / t,
        "reverse_chi2": lambda: (t - 1) ** 2,
        "alpha:0": lambda: -t.log() + t - 1,
        "alpha:1": lambda: t * t.log() - t + 1,
    }.get(name, lambda: (t**a - 1 - a * (t - 1)) / (a * (a - 1)))()


def slope_at_p_0(name):
    """lim f(t) / t as t -> inf: what an atom of pi outside of p costs."""
    a = float(name.partition(":")[2] or 0)
    return {"kl": 0.0, "js": math.log(2), "tv": 0.5, "chi2": 1.0}.get(name, 1 / (1 - a) if a != 1 else INF)


def d_f(name, log_pi, log_p):
    """D_f straight from its definition."""
    outside = log_p == -INF
    pi, p = log_pi.exp(), log_p.exp()
    inside = (p * generator(pi / p.masked_fill(outside, 1.0), name))[~outside].sum()
    return inside + slope_at_p_0(name) * pi[outside].sum() if outside.any() else inside


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


class Tabular:
    """A softmax over n completions."""

    def __init__(self, n=7, seed=1):
        self.parameters = draw(n, seed=seed).requires_grad_()

    def logps(self):
        return self.parameters.log_softmax(-1)


class Autoregressive:
    """Tokens a, b and end; up to three of them; a row of logits for every prefix. Completions differ in length."""

    def __init__(self, seed=1, vocabulary=3, longest=3):
        prefixes = [p for n in range(longest) for p in itertools.product(range(vocabulary - 1), repeat=n)]
        self.parameters = draw(len(prefixes), vocabulary, seed=seed).requires_grad_()
        self.row = {prefix: i for i, prefix in enumerate(prefixes)}
        end = vocabulary - 1
        self.completions = [(*p, end) for p in prefixes]
        self.completions += list(itertools.product(range(end), repeat=longest))  # cut off

    def logps(self):
        steps = self.parameters.log_softmax(-1)
        return torch.stack([sum(steps[self.row[c[:i]], c[i]] for i in range(len(c))) for c in self.completions])


POLICIES = {"tabular": Tabular, "autoregressive": Autoregressive}
LOG_Z = 4.2  # targets are given unnormalised


def world(kind, *, online=False, excluded=0):
    """policy, log q, log p over all completions; ``excluded`` of them violate a constraint of the target."""
    policy = POLICIES[kind]()
    n = len(policy.logps())
    log_q = policy.logps().detach() if online else draw(n, seed=2).log_softmax(-1)
    log_p = draw(n, seed=3, scale=1.5)
    log_p[:excluded] = -INF
    return policy, log_q, log_p.log_softmax(-1)


def test_the_enumerations_are_distributions():
    policy = Autoregressive()
    assert len(policy.completions) == len(set(policy.completions)) == 15
    assert policy.logps().exp().sum().item() == pytest.approx(1, abs=1e-12)


def expected_gradient(policy, log_q, log_p, name, k=1, **kwargs):
    """E over all k-tuples of q's completions of the gradient of the loss of their group."""
    n = len(log_q)
    tuples = torch.cartesian_prod(*[torch.arange(n)] * k).reshape(-1, k)
    loss = fdpg(
        policy.logps()[tuples],
        log_q[tuples],
        log_p[tuples] + LOG_Z,
        log_z=torch.full((len(tuples),), LOG_Z, **F64),
        divergence=name,
        **kwargs,
    )
    assert loss.shape == (len(tuples),)
    return torch.autograd.grad((log_q[tuples].sum(-1).exp() * loss).sum(), policy.parameters)[0]


def true_gradient(policy, log_p, name):
    return torch.autograd.grad(d_f(name, policy.logps(), log_p), policy.parameters)[0]


# ---------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("baseline", [None, -1.3])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_expected_gradient_is_that_of_the_divergence(name, kind, online, baseline):
    policy, log_q, log_p = world(kind, online=online)
    want = true_gradient(policy, log_p, name)
    assert want.abs().max() > 1e-2
    got = expected_gradient(policy, log_q, log_p, name, baseline=baseline)
    assert torch.allclose(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("name", FINITE_AT_P_0)
def test_the_gradient_where_the_target_excludes_completions(name, online):
    policy, log_q, log_p = world("autoregressive", online=online, excluded=4)
    want = true_gradient(policy, log_p, name)
    assert torch.allclose(expected_gradient(policy, log_q, log_p, name), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_leave_one_out_leaves_the_expectation_alone(name, online, k):
    policy, log_q, log_p = Tabular(5), draw(5, seed=2).log_softmax(-1), draw(5, seed=3).log_softmax(-1)
    log_q = policy.logps().detach() if online else log_q
    want = true_gradient(policy, log_p, name)
    got = expected_gradient(policy, log_q, log_p, name, k=k, baseline="leave_one_out")
    assert torch.allclose(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_leave_one_out_lowers_the_variance(name, online):
    policy, log_q = Tabular(5), draw(5, seed=2).log_softmax(-1)
    log_pi = policy.logps().detach()
    log_q = log_pi if online else log_q
    log_p = (log_pi + draw(5, seed=3, scale=0.2)).log_softmax(-1)
    triples = torch.cartesian_prod(*[torch.arange(5)] * 3)
    weight = log_q[triples].sum(-1, keepdim=True).exp()
    variance = {}
    for baseline in (None, "leave_one_out"):
        x = log_pi[triples].requires_grad_()
        loss = fdpg(x, log_q[triples], log_p[triples], log_z=torch.zeros(125), divergence=name, baseline=baseline)
        (coefficients,) = torch.autograd.grad(loss.sum(), x)
        gradients = (coefficients.unsqueeze(-1) * (torch.eye(5, **F64) - log_pi.exp())[triples]).sum(1)
        variance[baseline] = (weight * (gradients - (weight * gradients).sum(0)) ** 2).sum().item()
    assert variance["leave_one_out"] < variance[None] / 5


@pytest.mark.parametrize("names", [("kl", "alpha:0"), ("reverse_kl", "alpha:1"), ("alpha:0", "alpha:1e-9")])
def test_leave_one_out_makes_constants_in_the_slope_indifferent(names):
    policy, proposal, target, log_z = samples()
    policy.requires_grad_()
    one, other = (
        torch.autograd.grad(
            fdpg(policy, proposal, target, log_z=log_z, divergence=name, baseline="leave_one_out").sum(), policy
        )[0]
        for name in names
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-7 if "alpha:1e-9" in names else 1e-13)
    assert one.abs().max() > 1e-2


@pytest.mark.parametrize("online", [True, False])
def test_reverse_kl_on_the_tilted_base_is_rl_with_a_kl_penalty(online):
    """f-DPG, section on RLHF: P = a exp(r / beta), gradient -(1/beta) grad [E r - beta KL(pi || a)]."""
    beta, policy = 0.3, Autoregressive()
    n = len(policy.completions)
    log_a, reward = draw(n, seed=4).log_softmax(-1), draw(n, seed=5)
    log_q = policy.logps().detach() if online else draw(n, seed=2).log_softmax(-1)
    log_pi = policy.logps()
    objective = (log_pi.exp() * reward).sum() - beta * (log_pi.exp() * (log_pi - log_a)).sum()
    want = -torch.autograd.grad(objective, policy.parameters)[0] / beta
    tilted = log_a + reward / beta
    log_p = tilted - tilted.logsumexp(-1)
    assert torch.allclose(expected_gradient(policy, log_q, log_p, "reverse_kl"), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_descending_it_reaches_the_target(name):
    policy, log_q, log_p = world("tabular")
    optimiser = torch.optim.Adam([policy.parameters], lr=0.02)
    before = divergence_value(name, policy.logps().detach(), log_p)
    for _ in range(600):
        policy.parameters.grad = expected_gradient(policy, log_q, log_p, name, baseline=0.7)
        optimiser.step()
    after = divergence_value(name, policy.logps().detach(), log_p)
    assert after < before * (0.05 if name == "tv" else 1e-3)  # the slope of tv does not fade near the target


# ---------------------------------------------------------------------------------------------- the surrogate by hand


def samples(batch=4, k=5, seed=0):
    policy = draw(batch, k, seed=seed) - 6
    proposal = policy + draw(batch, k, seed=seed + 1, scale=0.5)
    target = policy + 2 + draw(batch, k, seed=seed + 2)
    return policy, proposal, target, 2 + draw(batch, seed=seed + 3, scale=0.3)


def by_hand(name, policy, proposal, target, log_z, baseline=None, max_ratio=INF):
    """One group, plain floats. Returns what multiplies log pi, sample by sample."""
    t = torch.tensor([math.exp(a - b + log_z) for a, b in zip(policy, target, strict=True)], **F64, requires_grad=True)
    (f_prime,) = torch.autograd.grad(generator(t, name).sum(), t)
    f_prime, k = f_prime.tolist(), len(policy)
    w = [min(math.exp(a - b), max_ratio) for a, b in zip(policy, proposal, strict=True)]
    coefficients = []
    for i in range(k):
        if baseline == "leave_one_out":
            others = [j for j in range(k) if j != i]
            b = sum(w[j] * f_prime[j] for j in others) / sum(w[j] for j in others)
        elif isinstance(baseline, list):
            b = baseline[i]
        else:
            b = baseline or 0.0
        coefficients.append(w[i] * (f_prime[i] - b) / k)
    return coefficients


@pytest.mark.parametrize("max_ratio", [None, 1.0])
@pytest.mark.parametrize("baseline", [None, 0.4, "leave_one_out", "(B,)", "(B, K)"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_by_hand(name, baseline, max_ratio):
    policy, proposal, target, log_z = samples()
    given = {"(B,)": draw(4, seed=9), "(B, K)": draw(4, 5, seed=9)}.get(baseline, baseline)
    leaves = [t.requires_grad_() for t in (policy, proposal, target, log_z)]
    if isinstance(given, torch.Tensor):
        leaves.append(given.requires_grad_())
    loss = fdpg(*leaves[:3], log_z=log_z, divergence=name, baseline=given, max_ratio=max_ratio)
    gradient, *others = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert others == [None] * len(others)  # constants, all of them
    rows = given.detach().tolist() if isinstance(given, torch.Tensor) else [given] * 4
    inputs = (policy.tolist(), proposal.tolist(), target.tolist(), log_z.tolist(), rows)
    want = [by_hand(name, *row, max_ratio=max_ratio or INF) for row in zip(*inputs, strict=True)]
    assert torch.allclose(gradient, torch.tensor(want, **F64), rtol=1e-10, atol=1e-12)
    assert torch.allclose(loss, (gradient * policy).sum(-1), rtol=1e-12)
    if max_ratio:
        assert ((policy - proposal) > 0).any()  # something was cut


def test_leave_one_out_of_a_single_sample_is_no_baseline():
    policy, proposal, target, log_z = samples(k=1)
    with_, without = (
        fdpg(policy, proposal, target, log_z=log_z, divergence="kl", baseline=b) for b in ("leave_one_out", None)
    )
    assert torch.equal(with_, without) and with_.abs().min() > 0


# ----------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("garbage", [0.0, 1e30, -INF, INF, math.nan])
@pytest.mark.parametrize("baseline", [None, "leave_one_out", "(B, K)"])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_column_is_a_removed_column(name, baseline, garbage):
    policy, proposal, target, log_z = samples()
    window = draw(4, 5, seed=9)
    keep = [0, 1, 3, 4]
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[:, 2] = False
    results = []
    for wide in (False, True):
        x, q, s, b = (t.detach().clone() if wide else t.detach()[:, keep] for t in (policy, proposal, target, window))
        if wide:
            for t in (x, q, s, b):
                t[:, 2] = garbage
        x.requires_grad_()
        loss = fdpg(
            x,
            q,
            s,
            log_z=log_z,
            divergence=name,
            baseline=b if baseline == "(B, K)" else baseline,
            valid=valid if wide else None,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert not wide or (gradient[:, 2] == 0).all()
        results.append((loss.detach(), gradient[:, keep] if wide else gradient))
    for narrow, wide in zip(*results, strict=True):
        assert torch.allclose(narrow, wide, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bad_z", [0.0, -INF, math.nan])
@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
@pytest.mark.parametrize("name", NAMES)
def test_an_all_masked_row_gives_zero_and_a_finite_gradient(name, baseline, bad_z):
    policy, proposal, target, log_z = samples()
    policy[1], proposal[1], target[1], log_z[1] = math.nan, INF, -INF, bad_z
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[1] = False
    policy.requires_grad_()
    loss = fdpg(policy, proposal, target, log_z=log_z, divergence=name, baseline=baseline, valid=valid)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert loss[1] == 0 and (gradient[1] == 0).all()
    assert loss.isfinite().all() and gradient.isfinite().all() and (gradient[[0, 2, 3]] != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_permuting_samples_permutes_the_gradient(name):
    policy, proposal, target, log_z = samples(k=3)

    def gradient(order):
        x = policy[:, order].clone().requires_grad_()
        loss = fdpg(x, proposal[:, order], target[:, order], log_z=log_z, divergence=name, baseline="leave_one_out")
        return torch.autograd.grad(loss.sum(), x)[0]

    for order in itertools.permutations(range(3)):
        assert torch.allclose(gradient(list(order)), gradient([0, 1, 2])[:, list(order)], rtol=1e-12)


# -------------------------------------------------------------------------------------- where p = 0, and far away


@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
@pytest.mark.parametrize("name", FINITE_AT_P_0)
def test_an_excluded_completion_has_the_limit_as_its_slope(name, baseline):
    policy, _, target, log_z = samples()
    target[:, 0] = -INF
    results = []
    for score in (-INF, -1e5):
        target[:, 0] = score
        x = policy.clone().requires_grad_()
        loss = fdpg(x, policy, target, log_z=log_z, divergence=name, baseline=baseline)
        results.append(torch.autograd.grad(loss.sum(), x)[0])
    assert results[0].isfinite().all()
    assert torch.allclose(*results, rtol=1e-12)
    if baseline is None:
        assert torch.allclose(results[0][:, 0], torch.tensor(slope_at_p_0(name) / 5, **F64))


@pytest.mark.parametrize("name", INFINITE_AT_P_0)
def test_an_infinite_divergence_is_refused_by_name(name):
    policy, _, target, log_z = samples()
    target[2, 3] = -INF
    with pytest.raises(ValueError, match=rf"'{name}' is infinite.* 1 completions.*row 2, column 3.*Use js, kl, tv"):
        fdpg(policy, policy, target, log_z=log_z, divergence=name)
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[2, 3] = False
    assert fdpg(policy, policy, target, log_z=log_z, divergence=name, valid=valid).isfinite().all()


@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
@pytest.mark.parametrize("log_t", [-1e4, 1e4])
@pytest.mark.parametrize("log_w", [-1e4, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_are_right_or_refused(name, log_w, log_t, baseline):
    """(pi/q) f' in exact arithmetic is a sum of exponentials: finite if all exponents are small, else refused."""
    a = {"kl": 0.0, "chi2": -1.0, "reverse_chi2": 2.0}.get(name, float(name.partition(":")[2] or 1))
    power = log_w + (a - 1) * log_t  # the exponent of (pi/q) t^(a-1)
    log_pi = torch.tensor([[-20.0, -3.0]], **F64, requires_grad=True)
    log_q = log_pi.detach() - torch.tensor([[log_w, 0.1]], **F64)
    log_p = log_pi.detach() - torch.tensor([[log_t, 0.2]], **F64)
    arguments = {"log_z": torch.zeros(1, **F64), "divergence": name, "baseline": baseline}
    if name not in ("js", "tv", "reverse_kl", "alpha:1") and power > 700:
        with pytest.raises(ValueError, match=r"beyond torch.float64 at row 0, column 0"):
            fdpg(log_pi, log_q, log_p, **arguments)
        return
    fdpg(log_pi, log_q, log_p, **arguments).sum().backward()
    assert log_pi.grad.isfinite().all()
    if baseline is None:
        bounded = {  # f' without its power of t
            "kl": 0.0,
            "reverse_kl": log_t + 1,
            "js": math.log(2) + min(log_t, 0),
            "tv": math.copysign(0.5, log_t),
            "chi2": 1.0,
            "reverse_chi2": -2.0,
            "alpha:1": log_t,
        }.get(name, 1 / (1 - a) if a != 1 else None)
        factor = {"kl": -1.0, "chi2": -1.0, "reverse_chi2": 2.0}.get(name, 1 / (a - 1) if a != 1 else 0.0)
        want = (math.exp(log_w) * bounded + factor * math.exp(power)) / 2
        assert log_pi.grad[0, 0].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", ["kl", "alpha:-2", "alpha:0.5", "chi2"])
def test_a_weight_of_zero_times_an_infinite_slope(name):
    """pi e^-800 below p and q: the ratio underflows, the slope overflows, their product is an ordinary number."""
    a = {"kl": 0.0, "chi2": -1.0}.get(name, float(name.partition(":")[2] or 0))
    log_t = torch.tensor([-800.0], **F64)
    log_w = (1 - a) * log_t + 1.5
    factor = {"kl": -1.0, "chi2": -1.0}.get(name, 1 / (a - 1))
    assert divergence(name)(log_t, log_w).item() == pytest.approx(factor * math.exp(1.5), rel=1e-12)
    assert divergence(name)(log_t).isinf().item() == (a != 0.5)


@pytest.mark.parametrize("name", ["kl", "tv", "js", "reverse_kl"])
def test_refusals(name):
    policy, proposal, target, log_z = samples()
    call = {"log_z": log_z, "divergence": name}

    def changed(t, value):
        t = t.clone()
        t[1, 2] = value
        return t

    for bad in (math.nan, INF, -INF):
        with pytest.raises(ValueError, match="policy_logps is not finite at row 1, column 2"):
            fdpg(changed(policy, bad), proposal, target, **call)
        with pytest.raises(ValueError, match="proposal_logps is not finite at row 1, column 2"):
            fdpg(policy, changed(proposal, bad), target, **call)
        with pytest.raises(ValueError, match="log_z of row 3 is"):
            fdpg(policy, proposal, target, **{**call, "log_z": torch.cat([log_z[:3], torch.tensor([bad])])})
        with pytest.raises(ValueError, match=r"baseline, or .* is not finite"):
            fdpg(policy, proposal, target, **call, baseline=changed(policy, bad))
    for bad in (math.nan, INF):
        with pytest.raises(ValueError, match=r"target_log_scores is NaN or \+inf at row 1, column 2"):
            fdpg(policy, proposal, changed(target, bad), **call)
    with pytest.raises(ValueError, match=r"\(4, 5\), \(4, 1\), .*expected \(B, K\)"):
        fdpg(policy, proposal[:, :1], target, **call)
    with pytest.raises(ValueError, match=r"log_z is \(4, 5\)"):
        fdpg(policy, proposal, target, log_z=policy, divergence="kl")
    with pytest.raises(ValueError, match=r"baseline is \(5,\)"):
        fdpg(policy, proposal, target, **call, baseline=torch.zeros(5))
    with pytest.raises(ValueError, match="baseline is 'mean'"):
        fdpg(policy, proposal, target, **call, baseline="mean")
    with pytest.raises(ValueError, match="max_ratio is 0"):
        fdpg(policy, proposal, target, **call, max_ratio=0)
    with pytest.raises(ValueError, match="Unknown divergence 'hellinger'"):
        fdpg(policy, proposal, target, log_z=log_z, divergence="hellinger")


# ------------------------------------------------------------------------------------------------------- the slopes


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_the_derivatives_of_the_generators(name):
    log_t = draw(50, seed=7, scale=2.0)
    t = log_t.exp().requires_grad_()
    (want,) = torch.autograd.grad(generator(t, name).sum(), t)
    # The table's constants: f' need not vanish at t = 1.
    assert torch.allclose(divergence(name)(log_t), want, rtol=1e-10, atol=1e-12)
    log_w = draw(50, seed=8)
    assert torch.allclose(divergence(name)(log_t, log_w), log_w.exp() * want, rtol=1e-10, atol=1e-12)
    assert torch.allclose(divergence(name)(log_t, 0.7), math.exp(0.7) * want, rtol=1e-10, atol=1e-12)


def test_limits():
    ends = torch.tensor([-INF, INF], **F64)
    log2 = pytest.approx(math.log(2))
    for name, want in {
        "kl": [-INF, 0.0],
        "reverse_kl": [-INF, INF],
        "js": [-INF, log2],
        "tv": [-0.5, 0.5],
        "chi2": [-INF, 1.0],
        "reverse_chi2": [-2.0, INF],
        "alpha:-2": [-INF, pytest.approx(1 / 3)],
        "alpha:0": [-INF, 1.0],
        "alpha:0.5": [-INF, 2.0],
        "alpha:1": [-INF, INF],
        "alpha:2": [-1.0, INF],
        "alpha:3": [-0.5, INF],
    }.items():
        assert divergence(name)(ends).tolist() == want, name
    for name in NAMES:
        assert not divergence(name)(torch.tensor([-1e4, 1e4])).isnan().any(), name


def test_the_alpha_family_meets_the_others():
    log_t = draw(50, seed=7)
    for alpha, name, factor, constant in ((0, "kl", 1, 1), (1, "reverse_kl", 1, -1), (2, "reverse_chi2", 0.5, 0)):
        assert torch.allclose(divergence(f"alpha:{alpha}")(log_t), factor * divergence(name)(log_t) + constant)
    assert torch.allclose(divergence("alpha:-1")(log_t), divergence("chi2")(log_t) / 2)


@pytest.mark.parametrize("step", [1e-4, 1e-8, 1e-12, 1e-15])
def test_alpha_is_smooth_at_1_and_its_value_at_0_and_1(step):
    log_t = torch.linspace(-5, 5, 101, **F64)
    log_pi, log_p = draw(6, seed=1).log_softmax(-1), draw(6, seed=2).log_softmax(-1)
    for sign in (-step, step):
        error = (divergence(f"alpha:{1 + sign}")(log_t) - log_t).abs().max()
        assert error < 14 * step + 1e-14  # (t^e - 1) / e = log t + e (log t)^2 / 2 + ...
        for limit, name in ((0, "kl"), (1, "reverse_kl")):
            value = divergence_value(f"alpha:{limit + sign}", log_pi, log_p)
            assert value.item() == pytest.approx(divergence_value(name, log_pi, log_p).item(), abs=10 * step + 1e-14)


@pytest.mark.parametrize("name", ["chi2", "reverse_chi2", "alpha:0", "alpha:0.5", "alpha:2"])
def test_slopes_near_1_keep_their_digits(name):
    log_t = torch.tensor([1e-12, -1e-12], **F64)
    slope = 2 if name.endswith("chi2") else 1
    assert torch.allclose(divergence(name)(log_t), slope * log_t, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------- exact divergences


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_definitions(name):
    log_pi, log_p = draw(4, 9, seed=1).log_softmax(-1), draw(4, 9, seed=2).log_softmax(-1)
    got = divergence_value(name, log_pi, log_p)
    twice = 2 if name == "js" else 1
    want = torch.stack([d_f(name, *rows) for rows in zip(log_pi, log_p, strict=True)])
    assert torch.allclose(twice * got, want, rtol=1e-11)
    assert divergence_value(name, log_p, log_p).abs().max() < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_values_where_supports_differ(name):
    """pi = (1/4, 1/2, 1/4, 0, 0), p = (0, 1/2, 1/4, 1/4, 0)."""
    log_pi = torch.tensor([0.25, 0.5, 0.25, 0.0, 0.0], **F64).log()
    log_p = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0], **F64).log()
    a = float(name.partition(":")[2] or 0)
    want = {"kl": INF, "reverse_kl": INF, "chi2": INF, "reverse_chi2": INF, "tv": 0.25, "js": 0.25 * math.log(2)}
    if name.startswith("alpha"):
        want[name] = (0.75 - 1) / (a * (a - 1)) if 0 < a < 1 else INF
    assert divergence_value(name, log_pi, log_p).item() == pytest.approx(want[name], rel=1e-12)
    assert divergence_value(name, log_p, log_pi).item() == pytest.approx(want[name], rel=1e-12)
    inside = torch.tensor([0.0, 0.75, 0.25, 0.0, 0.0], **F64).log()
    outward = divergence_value(name, log_pi, inside).item()
    assert math.isfinite(outward) == (name not in INFINITE_AT_P_0)
    if name in FINITE_AT_P_0:
        twice = 2 if name == "js" else 1
        kept = slice(0, 3)
        assert twice * outward == pytest.approx(d_f(name, log_pi[kept], inside[kept]).item(), rel=1e-12)


def test_the_slope_of_js_is_that_of_twice_its_value():
    policy, log_q, log_p = world("tabular")
    (gradient,) = torch.autograd.grad(2 * divergence_value("js", policy.logps(), log_p), policy.parameters)
    assert torch.allclose(expected_gradient(policy, log_q, log_p, "js"), gradient, rtol=0, atol=1e-10)
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]], **F64)
    assert divergence_value("js", *apart).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("js", "tv")])
def test_the_gradient_of_a_value_is_the_expected_gradient(name):
    policy, log_q, log_p = world("tabular")
    (gradient,) = torch.autograd.grad(divergence_value(name, policy.logps(), log_p), policy.parameters)
    assert torch.allclose(expected_gradient(policy, log_q, log_p, name), gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["alpha:0.5", "alpha:0.25", "alpha:2", "reverse_kl", "js", "tv"])
def test_the_gradient_of_a_value_stays_finite_where_the_policy_all_but_excludes(name):
    log_pi = torch.tensor([math.log(0.3), math.log(0.7), -1e4], **F64, requires_grad=True)
    log_p = torch.tensor([0.2, 0.7, 0.1], **F64).log()
    (gradient,) = torch.autograd.grad(divergence_value(name, log_pi, log_p), log_pi)
    assert gradient.isfinite().all() and gradient[0] != 0


def test_a_target_that_is_not_normalised_is_refused():
    log_pi, log_p = draw(3, 9, seed=1).log_softmax(-1), draw(3, 9, seed=2).log_softmax(-1)
    with pytest.raises(ValueError, match=r"log_p holds probabilities that sum to exp\(1.5\)"):
        divergence_value("kl", log_pi, log_p + 1.5)
    with pytest.raises(ValueError, match=r"log_pi holds"):
        divergence_value("kl", log_pi * math.nan, log_p)


# -------------------------------------------------------------------------------------------------------------- names


def test_names():
    for spelling, name in {
        "KL": "kl",
        "reverseKL": "reverse_kl",
        "Reverse-KL": "reverse_kl",
        "rkl": "reverse_kl",
        "forward_kl": "kl",
        "JS": "js",
        "Jensen-Shannon": "js",
        "TV": "tv",
        "chi2": "chi2",
        "ReverseChi2": "reverse_chi2",
        "alpha:0.5": "alpha:0.5",
        "Alpha: -2": "alpha:-2",
        "alpha=1.0": "alpha:1",
        "alpha_.25": "alpha:0.25",
    }.items():
        assert canonical_divergence_name(spelling) == name
        at_1 = divergence(spelling)(torch.tensor([0.3]))
        assert torch.equal(at_1, DIVERGENCES[name](torch.tensor([0.3])))
    for wrong in ("hellinger", "alpha", "alpha:", "alpha-2", "alpha2", "alpha:x", "alpha:inf", "alpha:nan", ""):
        with pytest.raises(ValueError, match=r"Unknown divergence.*Known: kl, reverse_kl, js, tv.*alpha:<a>"):
            divergence(wrong)


def test_the_dict_is_a_dict():
    assert list(DIVERGENCES) == ["kl", "reverse_kl", "js", "tv", "chi2", "reverse_chi2"]
    assert isinstance(DIVERGENCES, dict)
    assert DIVERGENCES["alpha:2"](torch.tensor([0.0])).item() == 0
    assert len(DIVERGENCES) == 6
    with pytest.raises(KeyError):
        DIVERGENCES["hellinger"]


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_mean_slope_is_the_expectation_under_the_policy(name):
    """All atoms drawn from a uniform q: the sum over them is the expectation."""
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    log_pi, log_z = logits.log_softmax(-1), scores.logsumexp(-1)
    log_q = torch.full_like(log_pi, -torch.tensor(7.0).log().item())
    want = (log_pi.exp() * DIVERGENCES[name](log_pi - scores.log_softmax(-1))).sum(-1)
    found = mean_slope(log_pi, log_q, scores, log_z=log_z, divergence=name)
    assert torch.allclose(found, want, atol=1e-12)
