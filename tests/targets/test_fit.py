"""Lambda from moments: closed forms, a numerical solver, what cannot be reached, whether error bars are honest."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from contrastive_align.targets import InfeasibleMoment, fit_lambdas
from contrastive_align.targets.fit import fit_adaptively


F64 = torch.float64


def dependent(n=3000, c=1, seed=0):
    """Two binary features that depend on each other, (c, n, 2), and log-weights (c, n)."""
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(c, n, generator=g) < 0.2
    second = (torch.rand(c, n, generator=g) < 0.1) | (first & (torch.rand(c, n, generator=g) < 0.6))
    return torch.stack([first, second], -1).double(), torch.randn(c, n, generator=g, dtype=F64)


def by_scipy(phi, moments, log_weights):
    moments = torch.tensor(moments, dtype=F64)
    prior = torch.log_softmax(log_weights, -1)

    def dual(lambdas):
        energies = prior + torch.where(prior.unsqueeze(-1) > -math.inf, phi, 0.0) @ torch.tensor(lambdas)
        p = torch.softmax(energies, -1).unsqueeze(-1)
        value = torch.logsumexp(energies, -1).mean() - torch.tensor(lambdas) @ moments
        return value.item(), ((p * phi).sum(1).mean(0) - moments).numpy()

    return torch.tensor(minimize(dual, [0.0] * len(moments), jac=True, method="BFGS", options={"gtol": 1e-11}).x)


def log_z_of(phi, lambdas, log_weights):
    return torch.logsumexp(torch.log_softmax(log_weights, -1) + phi @ lambdas, -1)


# -------------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("base", [1e-4, 0.07, 0.5, 0.93])
@pytest.mark.parametrize("wanted", [0.02, 0.3, 0.5, 0.999])
def test_one_binary_feature_is_the_difference_of_logits(base, wanted):
    phi = torch.tensor([[[0.0], [1.0]]], dtype=F64)
    weights = torch.tensor([[1 - base, base]], dtype=F64).log()
    fit = fit_lambdas(phi, [wanted], log_weights=weights, min_ess=0)
    logit = [math.log(mu / (1 - mu)) for mu in (wanted, base)]
    assert fit.lambdas.item() == pytest.approx(logit[0] - logit[1], abs=1e-6)
    assert fit.log_z.item() == pytest.approx(math.log(1 - base + base * math.exp(logit[0] - logit[1])), abs=1e-6)
    assert fit.achieved.item() == pytest.approx(wanted, abs=1e-9)
    assert fit.base_moments.item() == pytest.approx(base, abs=1e-12)
    assert fit.residual.abs().max() < 1e-9 and fit.converged and fit.iterations < 30


def test_the_number_on_the_page():
    phi = torch.tensor([[[0.0], [1.0]]])
    fit = fit_lambdas(phi, [0.5], log_weights=torch.tensor([[0.93, 0.07]], dtype=F64).log(), min_ess=0)
    assert fit.lambdas.item() == pytest.approx(2.58669, abs=5e-6)


def test_two_dependent_features_are_what_a_solver_finds():
    phi, weights = dependent()
    for moments in ([0.5, 0.3], [0.1, 0.6], [0.4, 0.4]):
        fit = fit_lambdas(phi, moments, log_weights=weights)
        assert torch.allclose(fit.lambdas, by_scipy(phi, moments, weights), atol=1e-6)
        assert torch.allclose(fit.log_z, log_z_of(phi, fit.lambdas, weights), atol=1e-12)


def test_one_lambda_for_several_prompts_is_what_a_solver_finds():
    g = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 300.0, 0.01], dtype=F64)  # units of the features must not matter
    phi = (torch.randn(6, 80, 3, generator=g, dtype=F64) + torch.randn(6, 1, 3, generator=g, dtype=F64)) * scale
    weights = torch.randn(6, 80, generator=g, dtype=F64)
    moments = phi.mean((0, 1)) + torch.tensor([0.3, -60.0, 0.002], dtype=F64)
    fit = fit_lambdas(phi, moments, log_weights=weights)
    scaled = by_scipy(phi / scale, (moments / scale).tolist(), weights) / scale
    assert torch.allclose(fit.lambdas * scale, scaled * scale, atol=1e-6)
    assert torch.allclose(fit.log_z, log_z_of(phi, fit.lambdas, weights), atol=1e-10)
    assert ((fit.achieved - moments) / scale).abs().max() < 1e-8
    assert fit.log_z.shape == fit.ess_per_prompt.shape == (6,)
    p = torch.softmax(weights + phi @ fit.lambdas, -1)
    assert torch.allclose(fit.ess_per_prompt, 1 / (p**2).sum(-1))
    assert fit.ess == pytest.approx(36 / float((p**2).sum()))


def test_missing_samples_are_as_good_as_removed():
    phi, weights = dependent(n=200, c=3)
    valid = torch.rand(3, 200, generator=torch.Generator().manual_seed(2)) < 0.7
    fit = fit_lambdas(phi, [0.4, 0.4], log_weights=weights, valid=valid)
    garbage = torch.where(valid.unsqueeze(-1), phi, math.nan)
    again = fit_lambdas(garbage, [0.4, 0.4], log_weights=torch.where(valid, weights, math.nan), valid=valid)
    masked = fit_lambdas(phi, [0.4, 0.4], log_weights=weights.masked_fill(~valid, -math.inf))
    for other in (again, masked):
        assert torch.equal(fit.lambdas, other.lambdas) and torch.equal(fit.log_z, other.log_z)
    order = valid.int().argsort(descending=True, stable=True)
    short = int(valid.sum(-1).max())
    moved = [x.gather(1, order)[:, :short] for x in (phi[..., 0], phi[..., 1], weights, valid)]
    moved = fit_lambdas(torch.stack(moved[:2], -1), [0.4, 0.4], log_weights=moved[2], valid=moved[3])
    assert torch.allclose(fit.lambdas, moved.lambdas, atol=1e-9)


def test_constants_in_the_weights_of_a_prompt_do_not_matter():
    phi, weights = dependent(n=300, c=3)
    shifted = weights + torch.tensor([[-900.0], [0.0], [700.0]])
    one, two = (fit_lambdas(phi, [0.4, 0.4], log_weights=w) for w in (weights, shifted))
    assert torch.allclose(one.lambdas, two.lambdas, atol=1e-10) and torch.allclose(one.log_z, two.log_z, atol=1e-10)


# -------------------------------------------------------------------------------- samples, weights, standard errors


def atoms(seed=0, n=40):
    """An enumerable space: log a, log q and two features of every atom."""
    g = torch.Generator().manual_seed(seed)
    log_a, log_q = (torch.log_softmax(torch.randn(n, generator=g, dtype=F64), 0) for _ in range(2))
    phi = torch.stack([torch.rand(n, generator=g) < 0.4, torch.rand(n, generator=g) < 0.5], -1).double()
    return log_a, log_q, phi


def test_samples_of_a_proposal_give_the_lambda_of_the_base():
    log_a, log_q, phi = atoms()
    moments = [0.7, 0.3]
    exact = fit_lambdas(phi.unsqueeze(0), moments, log_weights=log_a.unsqueeze(0), min_ess=0)
    g = torch.Generator().manual_seed(3)
    x = torch.multinomial(log_q.exp(), 20000, replacement=True, generator=g)
    fit = fit_lambdas(phi[x].unsqueeze(0), moments, log_weights=(log_a - log_q)[x].unsqueeze(0))
    assert ((fit.lambdas - exact.lambdas).abs() < 3 * fit.lambda_se).all()
    assert abs(fit.log_z - exact.log_z) < 3 * fit.log_z_se
    unweighted = fit_lambdas(phi[x].unsqueeze(0), moments)
    assert ((unweighted.lambdas - exact.lambdas).abs() > 5 * fit.lambda_se).any()


def test_standard_errors_are_the_spread_over_repeated_draws():
    """Two prompts of 300 samples each, drawn 400 times from a proposal."""
    spaces = [atoms(seed) for seed in (0, 1)]
    moments, g = [0.6, 0.4], torch.Generator().manual_seed(4)
    columns = {"lambdas": [], "log_z": [], "true_moments": []}
    errors = {"lambdas": [], "log_z": [], "true_moments": []}
    exact = fit_lambdas(
        torch.stack([s[2] for s in spaces]), moments, log_weights=torch.stack([s[0] for s in spaces]), min_ess=0
    )
    for _ in range(400):
        phi, weights = [], []
        for log_a, log_q, features in spaces:
            x = torch.multinomial(log_q.exp(), 300, replacement=True, generator=g)
            phi.append(features[x])
            weights.append((log_a - log_q)[x])
        phi, weights = torch.stack(phi), torch.stack(weights)
        fit = fit_lambdas(phi, moments, log_weights=weights)
        columns["lambdas"].append(fit.lambdas)
        errors["lambdas"].append(fit.lambda_se)
        columns["log_z"].append(log_z_of(phi, exact.lambdas, weights))  # at fixed lambdas, as its error bar says
        errors["log_z"].append(fit.log_z_se)
        p = torch.softmax(weights + phi @ exact.lambdas, -1).unsqueeze(-1)
        columns["true_moments"].append((p * phi).sum(1).mean(0))
        errors["true_moments"].append(fit.moment_se)
    for name, values in columns.items():
        ratio = torch.stack(values).std(0) / torch.stack(errors[name]).mean(0)
        assert ((ratio - 1).abs() < 0.15).all(), (name, ratio)
    assert (torch.stack(columns["lambdas"]).mean(0) - exact.lambdas).abs().max() < 0.03


def test_the_bias_of_few_samples_for_each_of_many_prompts_is_corrected():
    """64 prompts of 64 samples, drawn 60 times: the exact lambda is that of all atoms."""
    g = torch.Generator().manual_seed(7)
    log_a = torch.log_softmax(torch.randn(64, 80, generator=g, dtype=F64), -1)
    phi = (torch.rand(64, 80, 2, generator=g) < 0.15).double()
    moments = [0.5, 0.3]
    exact = fit_lambdas(phi, moments, log_weights=log_a, min_ess=0).lambdas
    plain, corrected, residuals = [], [], []
    for _ in range(60):
        x = torch.multinomial(log_a.exp(), 64, replacement=True, generator=g)
        drawn = phi.gather(1, x.unsqueeze(-1).expand(-1, -1, 2))
        plain.append(fit_lambdas(drawn, moments).lambdas)
        fit = fit_lambdas(drawn, moments, correct_bias=True)
        corrected.append(fit.lambdas)
        residuals.append(fit.residual)
    plain, corrected = torch.stack(plain) - exact, torch.stack(corrected) - exact
    assert (plain.mean(0) > 4 * plain.std(0) / 60**0.5).all()
    assert (corrected.mean(0).abs() < plain.mean(0) / 3).all()
    assert (corrected.std(0) < 1.05 * plain.std(0)).all()
    assert torch.stack(residuals).abs().max() < 0.003


def test_the_corrected_bias_is_that_of_the_jackknife():
    """Over the samples of a prompt, M m - (M - 1) mean of m without each one, but for O(1 / M^2); in any units."""
    g = torch.Generator().manual_seed(8)
    phi = torch.rand(3, 400, 2, generator=g, dtype=F64) * torch.tensor([1.0, 50.0])
    weights = torch.randn(3, 400, generator=g, dtype=F64) / 2
    moments = torch.tensor([0.6, 22.0], dtype=F64)
    fit = fit_lambdas(phi, moments, log_weights=weights, correct_bias=True)
    w = torch.exp(weights + phi @ fit.lambdas).unsqueeze(-1)
    whole = (w * phi).sum(1) / w.sum(1)
    without = ((w * phi).sum(1, keepdim=True) - w * phi) / (w.sum(1, keepdim=True) - w)
    jackknife = (400 * whole - 399 * without.mean(1)).mean(0)
    bias = (whole.mean(0) - jackknife).abs()
    assert (bias > 1e-4 * moments).all()
    assert ((fit.achieved - jackknife).abs() < 0.05 * bias).all()
    assert ((jackknife - moments).abs() < 0.05 * bias).all()


def test_progress_is_told():
    phi, _ = dependent()
    told = []
    fit = fit_lambdas(phi, [0.5, 0.3], progress=lambda i, state: told.append((i, state)))
    assert [i for i, _ in told] == list(range(fit.iterations + 1))
    duals = [state["dual"] for _, state in told]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(duals))
    assert told[-1][1]["residual"].abs().max() < 1e-9 and told[-1][1]["ess"] == pytest.approx(fit.ess)


# --------------------------------------------------------------------------------------------- what cannot be reached


def refuse(match, phi, moments, **kwargs):
    with pytest.raises(InfeasibleMoment, match=match):
        fit_lambdas(torch.as_tensor(phi, dtype=F64), moments, names=["polite", "long"][: len(moments)], **kwargs)


def test_outside_the_range():
    phi, _ = dependent()
    refuse(
        r"moment 0.5 of 'long' is outside .* 3000 samples reach: 0 to 0.25", phi * torch.tensor([1, 0.25]), [0.5, 0.5]
    )
    refuse(r"moment 1 of 'polite' is on the edge .* 0 to 1\. For 'always'", phi, [1.0, 0.5])
    refuse(r"moment 0 of 'polite' is on the edge .* 'never'", phi, [0.0, 0.5])
    # The range is that of the mean over prompts: here 0 to 0.5, though single samples reach 1.
    half = torch.tensor([[[0.0], [1.0]], [[0.0], [0.0]]])
    refuse(r"outside .* 0 to 0.5 \(mean over 2 prompts\)", half, [0.6])


def test_constant_features():
    refuse(r"'polite' is the constant 3 on all 20 samples", torch.full((1, 20, 1), 3.0), [1.0])
    refuse(r"'polite' does not vary among the samples of any one prompt.*several samples", [[[0.0]], [[1.0]]], [0.5])
    weighted = torch.tensor([[[0.0], [0.0], [1.0]]])
    refuse("constant 0 on all 2 samples", weighted, [0.5], log_weights=torch.tensor([[0.0, 0.0, -math.inf]]))


@pytest.mark.parametrize("moments", [[0.4, 0.6], [0.4, 0.5]])
def test_each_within_its_range_but_not_together(moments):
    """long only ever comes with polite, so that E[long] > E[polite] is out of reach."""
    phi, _ = dependent()
    refuse("cannot be reached together.*'polite' wanted 0.4, range 0 to 1; 'long'", phi * phi[..., :1], moments)


def test_on_the_edge_together():
    """E[long] = E[polite] would need that there is no polite without long: lambda is infinite."""
    phi, _ = dependent()
    refuse(r"together: -1 \* 'polite' \+1 \* 'long' should be 0, and reaches at most 0", phi * phi[..., :1], [0.5, 0.5])
    g = torch.Generator().manual_seed(0)
    topic = torch.nn.functional.one_hot(torch.randint(5, (1, 2000), generator=g))[..., :4].double()
    names = ["science", "art", "business", "sports"]
    with pytest.raises(
        InfeasibleMoment, match=r"1 \* 'science' \+1 \* 'art' \+1 \* 'business' \+1 \* 'sports' should be 1"
    ):
        fit_lambdas(topic, [0.4, 0.4, 0.1, 0.1], names=names)
    fit = fit_lambdas(topic, [0.4, 0.39, 0.1, 0.1])
    assert fit.lambdas[2].item() == pytest.approx(
        math.log(0.1 / 0.01) - math.log(topic[..., 2].mean() / (1 - topic.sum(-1)).mean()), abs=1e-6
    )


def test_outside_the_hull_in_four_dimensions():
    phi = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    assert (phi.amax(1) > 2).all()
    with pytest.raises(InfeasibleMoment, match="together"):
        fit_lambdas(phi, [2.0] * 4)


def test_dependent_features_that_agree_have_a_lambda():
    phi, _ = dependent()
    both = torch.stack([phi[..., 0], 1 - phi[..., 0]], -1)
    fit = fit_lambdas(both, [0.5, 0.5])
    alone = fit_lambdas(phi[..., :1], [0.5])
    assert (fit.lambdas[0] - fit.lambdas[1]).item() == pytest.approx(alone.lambdas.item(), abs=1e-8)
    refuse("together", both, [0.5, 0.6])


def test_too_few_samples_carry_the_weight():
    phi = torch.zeros(1, 1000, 1, dtype=F64)
    phi[0, :3] = 1
    refuse(r"effective sample size of 12.0 out of 1000 .*at least 20.*'polite' wanted 0.5.*samples 0.003", phi, [0.5])
    assert fit_lambdas(phi, [0.5], min_ess=3).ess == pytest.approx(1 / (0.25 / 3 + 0.25 / 997))


def test_a_prompt_that_nothing_satisfies_is_left_out():
    phi, _ = dependent(n=400, c=3)
    log_b = torch.zeros(3, 400)
    log_b[1] = -math.inf
    fit = fit_lambdas(phi, [0.5, 0.3], log_b=log_b)
    without = fit_lambdas(phi[[0, 2]], [0.5, 0.3])
    assert fit.skipped == [1] and torch.allclose(fit.lambdas, without.lambdas, atol=1e-12)
    assert fit.log_z[1] == -math.inf and fit.ess_per_prompt[1] == 0 and fit.samples == 800
    with pytest.raises(InfeasibleMoment, match="None of 1200 samples satisfies"):
        fit_lambdas(phi, [0.5, 0.3], log_b=torch.full((3, 400), -math.inf))


def test_no_features_give_log_z_alone():
    log_b = torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    fit = fit_lambdas(torch.zeros(1, 4, 0), [], log_b=log_b)
    assert (
        fit.log_z.item() == pytest.approx(math.log(0.75)) and fit.lambdas.shape == (0,) and fit.ess == pytest.approx(3)
    )


def test_what_does_not_fit_is_refused():
    phi, weights = dependent(n=5)
    for kwargs, match in (
        ({"phi": phi[0], "moments": [0.5, 0.5]}, r"shape \(5, 2\), expected \(prompts, samples, features\).*unsqueeze"),
        ({"phi": phi, "moments": [0.5]}, r"moments has the shape \(1,\), expected one for each of 2"),
        ({"phi": phi, "moments": [0.5, math.nan]}, "expected finite"),
        ({"phi": phi, "moments": [0.5, 0.5], "log_weights": weights[:, 1:]}, r"log_weights has the shape \(1, 4\)"),
        ({"phi": phi, "moments": [0.5, 0.5], "log_weights": weights * math.nan}, "prompt 0, sample 0 is nan"),
        ({"phi": phi / 0, "moments": [0.5, 0.5]}, "'feature 0' is .* on prompt 0, sample 0"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_lambdas(**kwargs)


def test_large_numbers_stay_finite():
    g = torch.Generator().manual_seed(6)
    phi = 1e6 + torch.rand(1, 500, 1, generator=g, dtype=F64)
    fit = fit_lambdas(phi, [1e6 + 0.7], log_weights=-1000 * torch.rand(1, 500, generator=g, dtype=F64) * 1e-2 - 1e4)
    assert fit.achieved.item() == pytest.approx(1e6 + 0.7, abs=1e-6) and torch.isfinite(fit.lambdas).all()


# ------------------------------------------------------------------------------------------- random prompts, adaptively


def rare(seed, n=1200):
    """Base rates of a word: 53 prompts that name it, and others of which one in 250 completions does."""
    rng = np.random.default_rng(seed)
    return np.where(np.arange(n) < 53, 0.863, rng.gamma(3, 0.004 / 3, n)), rng


def adaptive(rates, rng, most=16384, tolerance=0.01):
    order = rng.permutation(len(rates))

    def draw(places, call, n):
        drawn = rng.random((len(places), n, 1)) < rates[order[list(places)]][:, None, None]
        return torch.tensor(drawn, dtype=torch.float64)

    return fit_adaptively(
        lambda phi: fit_lambdas(phi, [0.5], correct_bias=True, population=len(rates)),
        draw, prompts=len(rates), samples=1024, most=most, tolerance=tolerance,
    )  # fmt: skip


def moment_under(fit, rates):
    odds = rates / (1 - rates) * np.exp(fit.lambdas.item())
    return (odds / (1 + odds)).mean()


def test_prompts_of_many_kinds_have_the_moment_together_and_the_error_says_how_well():
    """The fit on the first prompts of a sorted file had 0.016 in the place of 0.5."""
    z = []
    for seed in range(40):
        rates, rng = rare(seed)
        fit = adaptive(rates, rng)
        z.append((moment_under(fit, rates) - 0.5) / fit.moment_se.item())
    assert sum(abs(x) <= 2 for x in z) >= 34 and abs(np.mean(z)) <= 2 / np.sqrt(len(z)) + 0.1


def test_sampling_ends_where_the_error_is_small_or_all_prompts_are_known():
    rng = np.random.default_rng(0)
    fit = adaptive(np.full(500, 0.3), rng, most=2**20, tolerance=0.02)
    assert fit.moment_se.item() <= 0.02 and fit.samples < 2**17
    few = np.array([0.1, 0.6])  # the spread between two prompts that are all there are is no error
    fit = adaptive(few, rng, most=2**20, tolerance=0.005)
    assert len(fit.log_z) == 2 and fit.moment_se.item() <= 0.005
    assert moment_under(fit, few) == pytest.approx(0.5, abs=0.02)


def test_a_feature_that_never_varies_is_refused_without_more_samples():
    calls = []

    def draw(places, call, n):
        calls.append(len(places) * n)
        return torch.zeros(len(places), n, 1)

    with pytest.raises(InfeasibleMoment, match="constant 0"):
        fit_adaptively(lambda phi: fit_lambdas(phi, [0.5]), draw, prompts=64, samples=512, most=2**20, tolerance=0.01)
    assert sum(calls) == 512


def test_the_spread_between_prompts_is_part_of_the_error():
    """200 choices of 30 prompts: with the population given, the errors are those of the choice."""
    rng = np.random.default_rng(1)
    rates, z = rng.beta(0.6, 4, 3000), []
    for _ in range(200):
        chosen = rng.choice(rates, 30)
        phi = torch.tensor(rng.random((30, 400, 1)) < chosen[:, None, None], dtype=torch.float64)
        fit = fit_lambdas(phi, [0.4], correct_bias=True, population=math.inf)
        z.append((moment_under(fit, rates) - 0.4) / fit.moment_se.item())
    assert np.std(z) == pytest.approx(1, abs=0.2)
    alone = fit_lambdas(phi, [0.4], correct_bias=True)
    assert fit.moment_se.item() > 3 * alone.moment_se.item()
