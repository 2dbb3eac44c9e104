"""Quasi-rejection sampling on spaces that can be enumerated: the published table, error bars, and what is accepted."""

import dataclasses
import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from contrastive_align.report import plot_tradeoff
from contrastive_align.sampling import (
    QuasiRejectionSampler,
    Samples,
    choose_beta,
    qrs_estimates,
)
from contrastive_align.targets import Constraint, Target, evaluate_feature


F64 = torch.float64
K = torch.arange(80, dtype=F64)
TABLE = {  # beta: acceptance, TVD(p, p_beta), KL(p || p_beta) for target Poisson(11), proposal Poisson(10)
    0.5: (0.999496, 0.122941, 0.048146),
    1: (0.876849, 0.074922, 0.019885),
    2: (0.498182, 0.003531, 4.87e-4),
    4: (0.249997, 1.1e-5, 1.2e-6),
}


def poisson(rate):
    return K * math.log(rate) - rate - torch.lgamma(K + 1)


LOG_P, LOG_Q = poisson(11), poisson(10)


def drawn(n, seed=0):
    x = torch.poisson(torch.full((n,), 10.0), generator=torch.Generator().manual_seed(seed)).long()
    return LOG_P[x], LOG_Q[x], K[x].unsqueeze(-1)


def by_enumeration(log_p, log_q, beta):
    """(acceptance, TVD, KL, p_beta) from the definitions, atom by atom, for a normalised p."""
    p, q = log_p.exp(), log_q.exp()
    capped = torch.minimum(p, beta * q)
    p_beta = capped / capped.sum()
    kl = torch.where(p > 0, p * (p / p_beta).log(), 0.0).sum()
    return (capped.sum() / beta).item(), ((p - p_beta).abs().sum() / 2).item(), kl.item(), p_beta


# ------------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize(("beta", "want"), TABLE.items())
def test_the_poisson_table_from_every_atom(beta, want):
    (estimate,) = qrs_estimates(LOG_P, LOG_Q, [beta], log_weights=LOG_Q, features=K.unsqueeze(-1))
    found = (estimate.acceptance_rate, estimate.tvd, estimate.kl)
    for value, published, digits in zip(found, want, (5e-7, 5e-7, max(5e-7 * (beta < 2), want[2] * 0.05)), strict=True):
        assert value == pytest.approx(published, abs=digits) and round(value, 3) == round(published, 3)
    exact = by_enumeration(LOG_P, LOG_Q, beta)
    assert found == pytest.approx(exact[:3], abs=1e-12)
    assert estimate.moments == pytest.approx([float(exact[3] @ K)], abs=1e-10)
    assert estimate.log_z == pytest.approx(0, abs=1e-12)
    assert estimate.log_z_beta == pytest.approx(math.log(exact[0] * beta), abs=1e-12)
    assert estimate.tvd <= estimate.tvd_bound == pytest.approx(1 - exact[0] * beta, abs=1e-12)


def test_the_poisson_table_from_samples():
    scores, logps, features = drawn(100_000)
    for estimate, (beta, want) in zip(
        qrs_estimates(scores, logps, list(TABLE), features=features), TABLE.items(), strict=True
    ):
        for name, published in zip(("acceptance_rate", "tvd", "kl"), want, strict=True):
            assert abs(getattr(estimate, name) - published) < 3 * getattr(estimate, f"{name}_se") + 5e-7, (beta, name)
        exact = by_enumeration(LOG_P, LOG_Q, beta)
        assert abs(estimate.moments[0] - float(exact[3] @ K)) < 3 * estimate.moments_se[0]
        assert abs(estimate.log_z) < 3 * estimate.log_z_se
        assert abs(estimate.log_z_beta - math.log(exact[0] * beta)) < 3 * estimate.log_z_beta_se


def test_standard_errors_are_the_spread_over_repeated_draws():
    names = ("acceptance_rate", "tvd", "tvd_bound", "kl", "log_z", "log_z_beta")
    rows, errors = [], []
    for seed in range(300):
        scores, logps, features = drawn(2000, seed)
        (e,) = qrs_estimates(
            scores.reshape(2, 1000), logps.reshape(2, 1000), [1.0], features=features.reshape(2, 1000, 1)
        )
        rows.append([*(getattr(e, name) for name in names), *e.moments])
        errors.append([*(getattr(e, f"{name}_se") for name in names), *e.moments_se])
    ratio = torch.tensor(rows, dtype=F64).std(0) / torch.tensor(errors, dtype=F64).mean(0)
    assert ((ratio - 1).abs() < 0.15).all(), dict(zip([*names, "moment"], ratio.tolist(), strict=True))


def test_everything_moves_one_way_with_beta():
    betas = [10 ** (i / 10) for i in range(-30, 21)]
    for weights, scores, logps in ((LOG_Q, LOG_P, LOG_Q), (None, *drawn(3000)[:2])):
        rows = [dataclasses.asdict(e) for e in qrs_estimates(scores, logps, betas, log_weights=weights)]
        for name in ("acceptance_rate", "tvd", "tvd_bound", "kl", "clipped"):
            column = [row[name] for row in rows]
            assert all(b <= a + 1e-12 for a, b in itertools.pairwise(column)), name
        assert all(row["tvd"] <= row["tvd_bound"] + 1e-12 for row in rows)
        assert rows[-1]["log_z_beta"] == pytest.approx(rows[-1]["log_z"], abs=1e-9)
        assert rows[-1]["kl"] == pytest.approx(0, abs=1e-9) and rows[-1]["clipped"] == pytest.approx(0, abs=1e-9)


def test_a_vanishing_beta_is_the_proposal():
    (estimate,) = qrs_estimates(LOG_P, LOG_Q, [1e-30], log_weights=LOG_Q, features=K.unsqueeze(-1))
    p, q = LOG_P.exp(), LOG_Q.exp()
    assert estimate.acceptance_rate == pytest.approx(1) and estimate.moments == pytest.approx([10])
    assert estimate.tvd == pytest.approx((p - q).abs().sum().item() / 2)
    assert estimate.kl == pytest.approx((p * (LOG_P - LOG_Q)).sum().item())


def test_the_scale_of_the_target_is_the_scale_of_beta():
    """P = e^7 p: the same numbers at beta e^7, or at beta with log Z given; log-probs far from 0 do no harm."""
    (plain,) = qrs_estimates(LOG_P, LOG_Q, [2.0], log_weights=LOG_Q)
    (scaled,) = qrs_estimates(LOG_P + 7, LOG_Q, [2 * math.exp(7)], log_weights=LOG_Q)
    (known,) = qrs_estimates(LOG_P + 7, LOG_Q, [2.0], log_weights=LOG_Q, log_z=7.0)
    far = qrs_estimates(LOG_P - 5000, LOG_Q - 5000, [2.0], log_weights=LOG_Q - 900)[0]
    for name in ("acceptance_rate", "tvd", "tvd_bound", "kl", "acceptance_rate_se", "tvd_se", "kl_se"):
        for other in (scaled, known, far):
            assert getattr(other, name) == pytest.approx(getattr(plain, name), rel=1e-9), name
    assert scaled.log_z == pytest.approx(7) and known.log_z == pytest.approx(0, abs=1e-12)


def test_samples_of_another_distribution_by_weight():
    other = poisson(12.0)
    x = torch.poisson(torch.full((60_000,), 12.0), generator=torch.Generator().manual_seed(1)).long()
    (estimate,) = qrs_estimates(LOG_P[x], LOG_Q[x], [1.0], log_weights=(LOG_Q - other)[x])
    for name, want in zip(("acceptance_rate", "tvd", "kl"), TABLE[1], strict=True):
        assert abs(getattr(estimate, name) - want) < 3 * getattr(estimate, f"{name}_se"), name
    assert estimate.ess < 60_000


def test_several_prompts_are_their_mean():
    scores, logps, features = drawn(900)
    grid = [t.reshape(3, 300, *t.shape[1:]) for t in (scores, logps, features)]
    weights = torch.zeros(3, 300)
    weights[1, 200:] = -math.inf
    log_z = torch.tensor([0.0, 0.3, -0.2])
    (together,) = qrs_estimates(*grid[:2], [1.5], features=grid[2], log_weights=weights, log_z=log_z)
    alone = [
        qrs_estimates(grid[0][c, :m], grid[1][c, :m], [1.5], features=grid[2][c, :m], log_z=log_z[c])[0]
        for c, m in enumerate((300, 200, 300))
    ]
    for name in ("acceptance_rate", "tvd", "tvd_bound", "kl", "log_z", "log_z_beta", "clipped"):
        assert getattr(together, name) == pytest.approx(sum(getattr(e, name) for e in alone) / 3), name
        if name != "clipped":
            se = math.sqrt(sum(getattr(e, f"{name}_se") ** 2 for e in alone)) / 3
            assert getattr(together, f"{name}_se") == pytest.approx(se), name
    assert together.moments == pytest.approx([sum(e.moments[0] for e in alone) / 3])
    assert together.ess == pytest.approx(9 / sum(1 / e.ess for e in alone)) and together.n == 800


def test_a_prompt_without_mass_counts_as_never_accepted():
    scores, logps, _ = drawn(600)
    scores, logps = scores.reshape(2, 300), logps.reshape(2, 300)
    (alone,) = qrs_estimates(scores[:1], logps[:1], [1.0])
    scores[1] = -math.inf
    (both,) = qrs_estimates(scores, logps, [1.0])
    assert both.skipped == 1 and both.acceptance_rate == pytest.approx(alone.acceptance_rate / 2)
    assert both.tvd == pytest.approx(alone.tvd) and both.kl == pytest.approx(alone.kl) and math.isfinite(both.log_z)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"betas": [0.0]}, "beta is 0.0, expected a number above 0"),
        ({"betas": [math.inf]}, "beta is inf"),
        ({"proposal_logps": LOG_Q[1:]}, r"proposal_logps has the shape \(79,\), expected \(80,\)"),
        ({"target_log_scores": LOG_P * math.nan}, r"target_log_scores is nan on sample \[0\]"),
        ({"target_log_scores": LOG_P - math.inf}, "none of 80 samples any mass .* Z = 0"),
        ({"proposal_logps": LOG_Q - math.inf}, r"proposal_logps is -inf on sample \[0, 0\]"),
        ({"log_weights": LOG_Q - math.inf}, "Prompt 0 has no sample"),
        ({"features": K}, r"features of shape \(80,\), expected finite numbers of shape \(80, 'J'\)"),
        ({"features": K.unsqueeze(-1) / 0}, "expected finite numbers of shape"),
        ({"log_z": torch.zeros(2)}, "log_z is .* expected a finite number or 1"),
        ({"target_log_scores": torch.tensor(0.0)}, r"shape \(\), expected \(samples,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    given = {"target_log_scores": LOG_P, "proposal_logps": LOG_Q, "betas": [1.0]}
    with pytest.raises(ValueError, match=match):
        qrs_estimates(**{**given, **change})


# ------------------------------------------------------------------------------------------------------ choosing beta


def test_beta_for_a_wish():
    for beta in TABLE:
        (exact,) = qrs_estimates(LOG_P, LOG_Q, [beta], log_weights=LOG_Q)
        assert choose_beta(LOG_P, LOG_Q, acceptance=exact.acceptance_rate, log_weights=LOG_Q).beta == pytest.approx(
            beta, rel=1e-6
        )
        assert choose_beta(LOG_P, LOG_Q, tvd=exact.tvd, log_weights=LOG_Q).beta == pytest.approx(beta, rel=1e-6)
    scores, logps, _ = drawn(2000)
    assert choose_beta(scores, logps, acceptance=0.01).acceptance_rate == pytest.approx(0.01)
    assert choose_beta(scores, logps, tvd=0.01).tvd <= 0.01
    assert choose_beta(scores, logps, tvd=0.9).acceptance_rate == pytest.approx(1)
    scaled = choose_beta(scores + 900, logps, acceptance=0.3, log_z=900.0)
    assert scaled.beta == pytest.approx(choose_beta(scores, logps, acceptance=0.3).beta)


def test_wishes_that_cannot_be_granted():
    scores, logps, _ = drawn(1000)
    half = torch.where(torch.arange(1000) < 500, scores, -math.inf)
    for kwargs, match in (
        ({}, "acceptance=None and tvd=None, expected exactly one"),
        ({"acceptance": 0.5, "tvd": 0.1}, "expected exactly one"),
        ({"acceptance": 1.5}, "1.5 is not between 0 and 1"),
        ({"acceptance": 0.7}, "acceptance=0.7 is above the highest there is, 0.5 at a beta of 0"),
    ):
        with pytest.raises(ValueError, match=match):
            choose_beta(half, logps, **kwargs)
    with pytest.raises(ValueError, match=r"beta would be exp\(90\d\).*log_z"):
        choose_beta(scores + 900, logps, acceptance=0.3)


# -------------------------------------------------------------------------------------------------------- the sampler

ATOMS = ["a", "b", "ab", "ba", "aab", "abb", "", "bbbb"]
PROMPTS = ["x", "y", "z"]


def has_b(prompts, completions, **columns):
    return [float("b" in c) for c in completions]


def size(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


class Enumerable:
    """A proposal over ATOMS with its own distribution, and the base's, for each prompt."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.log_q = {p: torch.log_softmax(torch.randn(len(ATOMS), generator=g, dtype=F64), 0) for p in PROMPTS}
        self.log_a = {p: torch.log_softmax(torch.randn(len(ATOMS), generator=g, dtype=F64), 0) for p in PROMPTS}
        self.generator, self.calls = g, []

    def sample(self, prompts, n):
        self.calls.append((list(prompts), n))
        rows = [torch.multinomial(self.log_q[p].exp(), n, True, generator=self.generator) for p in prompts]
        shuffled = torch.randperm(len(prompts) * n, generator=self.generator)  # any order of prompts will do
        atoms = torch.cat(rows)[shuffled]
        index = torch.arange(len(prompts)).repeat_interleave(n)[shuffled]
        texts = [ATOMS[i] for i in atoms]
        logps, base_logps = (
            torch.stack([table[prompts[c]][i] for c, i in zip(index, atoms, strict=True)])
            for table in (self.log_q, self.log_a)
        )
        return Samples(index, [[ord(c) for c in text] for text in texts], texts, logps, base_logps)


def target():
    made = Target([Constraint(has_b, 0.9), Constraint(size, 2.5)])
    proposal = Enumerable()
    phi = made.features([""] * len(ATOMS), ATOMS, completion_ids=[list(a) for a in ATOMS])
    made.fit(phi.expand(3, -1, -1), log_weights=torch.stack([proposal.log_a[p] for p in PROMPTS]), min_ess=0)
    return made, phi


def exact_p_beta(made, phi, prompt, beta, log_z=0.0):
    """(p_beta, acceptance rate) by enumeration."""
    proposal = Enumerable()
    log_p = made.log_scores(proposal.log_a[prompt], phi) - log_z
    capped = torch.minimum(log_p, proposal.log_q[prompt] + math.log(beta)).exp()
    return capped / capped.sum(), capped.sum() / beta


@pytest.mark.parametrize("normalised", [False, True])
def test_accepted_samples_follow_p_beta(normalised):
    made, phi = target()
    log_z, beta = made.last_fit.log_z if normalised else torch.zeros(3), 1.3
    sampler = QuasiRejectionSampler(made, Enumerable(), beta, log_z=log_z if normalised else None, batch_size=500)
    result = sampler.sample(PROMPTS, 3000, budget=20_000, generator=torch.Generator().manual_seed(1))
    assert not result.exhausted.any() and len(result.samples) == 9000
    assert result.samples.prompt_index.tolist() == sorted(result.samples.prompt_index.tolist())
    for c, prompt in enumerate(PROMPTS):
        p_beta, rate = exact_p_beta(made, phi, prompt, beta, log_z[c])
        mine = result.samples.select(result.samples.prompt_index == c)
        counts = torch.tensor([mine.completions.count(atom) for atom in ATOMS])
        assert counts.sum() == 3000
        assert chisquare(counts, 3000 * p_beta).pvalue > 0.001, prompt
        n = result.proposed[c].item()
        assert abs(result.acceptance_rates[c] - rate) < 3 * math.sqrt(rate * (1 - rate) / n)
        mean = result.phi[result.samples.prompt_index == c].mean(0)
        variance = p_beta @ (phi - p_beta @ phi) ** 2
        assert ((mean - p_beta @ phi).abs() < 3 * (variance / 3000).sqrt()).all()
    assert result.acceptance_rate == pytest.approx((result.accepted.sum() / result.proposed.sum()).item())
    # Features, scores and log-probs stay beside their samples.
    assert torch.equal(
        result.phi[:, 0], evaluate_feature(made.constraints[0].feature, [""] * 9000, result.samples.completions)
    )
    assert result.phi[:, 1].tolist() == [len(ids) for ids in result.samples.completion_ids]


def test_estimates_from_what_was_proposed():
    made, phi = target()
    sampler = QuasiRejectionSampler(made, Enumerable(), 1.3, batch_size=300)
    result = sampler.sample(PROMPTS, 2000, budget=20_000, generator=torch.Generator().manual_seed(2))
    (estimate,) = result.estimates([1.3])
    exact = [exact_p_beta(made, phi, prompt, 1.3) for prompt in PROMPTS]
    assert abs(estimate.acceptance_rate - sum(rate for _, rate in exact) / 3) < 3 * estimate.acceptance_rate_se
    moments = sum(p_beta @ phi for p_beta, _ in exact) / 3
    for found, se, want in zip(estimate.moments, estimate.moments_se, moments.tolist(), strict=True):
        assert abs(found - want) < 3 * se
    assert estimate.n == result.proposed.sum()


def test_budgets_are_kept(caplog):
    made, _ = target()
    proposal = Enumerable()
    with caplog.at_level("WARNING"):
        result = QuasiRejectionSampler(made, proposal, 1000.0, batch_size=16).sample(PROMPTS, 50, budget=100)
    assert result.proposed.tolist() == [100] * 3 and result.exhausted.all()
    assert [n for _, n in proposal.calls] == [16] * 6 + [4]
    assert len(result.samples) == result.accepted.sum() < 10
    assert "3 of 3 prompts used up their budget of 100 proposals before 50" in caplog.text


def test_a_prompt_that_has_enough_is_not_asked_again():
    made, _ = target()
    proposal = Enumerable()
    log_z = torch.tensor([30.0, -30.0, -30.0])  # the first prompt accepts nearly nothing, the others all
    result = QuasiRejectionSampler(made, proposal, 1.0, log_z=log_z, batch_size=7).sample(PROMPTS, 5, budget=21)
    assert proposal.calls == [(PROMPTS, 7), (["x"], 7), (["x"], 7)]
    assert result.proposed.tolist() == [21, 7, 7] and result.accepted.tolist() == [0, 7, 7]
    assert torch.bincount(result.samples.prompt_index, minlength=3).tolist() == [0, 5, 5]
    assert result.exhausted.tolist() == [True, False, False]


def test_a_pointwise_constraint_holds_on_every_sample():
    always = Target([Constraint(has_b, 1.0, pointwise=True)])
    result = QuasiRejectionSampler(always, Enumerable(), 0.5).sample(PROMPTS, 40, budget=1000)
    assert all("b" in text for text in result.samples.completions) and len(result.samples) == 120
    never = Target([Constraint(lambda prompts, completions, **columns: [0.0] * len(prompts), 1.0, pointwise=True)])
    result = QuasiRejectionSampler(never, Enumerable(), 0.5).sample(PROMPTS, 1, budget=30)
    assert len(result.samples) == 0 and result.phi.shape == (0, 1) and result.acceptance_rate == 0


def test_a_seed_gives_the_same_samples():
    made, _ = target()

    def run(seed):
        sampler = QuasiRejectionSampler(made, Enumerable(), 1.3)
        return sampler.sample(PROMPTS, 20, budget=500, generator=torch.Generator().manual_seed(seed))

    one, two, other = run(0), run(0), run(1)
    assert one.samples.completions == two.samples.completions and torch.equal(one.proposed, two.proposed)
    assert one.samples.completions != other.samples.completions


def test_columns_and_messages_reach_the_features():
    def allowed(prompts, completions, letter, **columns):
        assert all(isinstance(c, list) for c in completions)
        return [float(letter_ in c[-1]["content"]) for letter_, c in zip(letter, completions, strict=True)]

    class Chat(Enumerable):
        def sample(self, prompts, n):
            drawn = super().sample([p[-1]["content"] for p in prompts], n)
            talk = [[{"role": "assistant", "content": text}] for text in drawn.completions]
            return dataclasses.replace(drawn, completions=talk)

    prompts = [[{"role": "user", "content": p}] for p in PROMPTS[:2]]
    always = Target([Constraint(allowed, 1.0, pointwise=True)])
    result = QuasiRejectionSampler(always, Chat(), 0.1).sample(prompts, 9, budget=500, columns={"letter": ["a", "b"]})
    for i, completion in zip(result.samples.prompt_index, result.samples.completions, strict=True):
        assert "ab"[i] in completion[-1]["content"]


def test_what_the_sampler_refuses():
    made, _ = target()

    class Short(Enumerable):
        def sample(self, prompts, n):
            return super().sample(prompts, n - 1)

    sampler = QuasiRejectionSampler(made, Short(), 1.0, batch_size=4)
    for use, match in (
        (lambda: QuasiRejectionSampler(made, Short(), 0.0), "beta is 0.0, expected a number above 0"),
        (lambda: QuasiRejectionSampler(made, Short(), 1.0, batch_size=0), "batch_size is 0, expected a whole"),
        (lambda: QuasiRejectionSampler(made, Short(), 1.0, log_z=-math.inf), "log_z has NaN or infinite"),
        (lambda: sampler.sample(PROMPTS, 0, budget=1), "n is 0, expected a whole number above 0"),
        (lambda: sampler.sample(PROMPTS, 1, budget=0), "budget is 0"),
        (lambda: sampler.sample([], 1, budget=1), "no prompts"),
        (lambda: sampler.sample(PROMPTS, 1, budget=8), r"returned \[3, 3, 3\] samples for 3 prompts, expected 4"),
        (lambda: sampler.sample(PROMPTS, 1, budget=8, columns={"a": [1]}), "column 'a' has 1 values for 3 prompts"),
        (
            lambda: QuasiRejectionSampler(made, Short(), 1.0, log_z=[0.0, 1.0]).sample(PROMPTS, 1, budget=1),
            r"log_z has the shape \(2,\), expected a number or 3",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            use()


def test_samples_check_themselves():
    good = Samples([0, 1], [[1], [2]], ["a", "b"], [-1.0, -2.0], [-1.0, -math.inf])
    assert good.logps.dtype == F64 and good.prompt_index.dtype == torch.int64 and len(good) == 2
    assert good.select(torch.tensor([False, True])).completions == ["b"]
    assert Samples.join([good, good.select(torch.tensor([1, 0]))]).completions == ["a", "b", "b", "a"]
    assert len(Samples.join([])) == 0
    for parts, match in (
        (([0], [[1], [2]], ["a", "b"], [-1.0, -2.0], [-1.0, 0.0]), "lengths .*'prompt_index': 1"),
        (([0], [[1]], ["a"], [math.nan], [0.0]), "Sample 0 has logps nan"),
        (([0], [[1]], ["a"], [-math.inf], [0.0]), "expected a finite log-prob under the proposal"),
        (([0], [[1]], ["a"], [0.0], [math.nan]), "base_logps nan"),
    ):
        with pytest.raises(ValueError, match=match):
            Samples(*parts)


# ------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_not_blank(tmp_path, ending):
    pytest.importorskip("matplotlib")
    scores, logps, _ = drawn(500)
    path = plot_tradeoff(qrs_estimates(scores, logps, list(TABLE)), tmp_path / "new" / f"qrs.{ending}", title="Poisson")
    data = path.read_bytes()
    assert len(data) > 5000
    if ending == "svg":
        assert data.count(b"<path") > 20 and b"acceptance rate" in data.replace(b"\n", b" ")
    with pytest.raises(ValueError, match="no estimates"):
        plot_tradeoff([], path)


def test_a_picture_of_no_difference(tmp_path):
    pytest.importorskip("matplotlib")
    estimates = qrs_estimates(LOG_Q, LOG_Q, [1.0, 2.0], log_weights=LOG_Q)
    assert [e.kl for e in estimates] == [0, 0] and [e.clipped for e in estimates] == [0, 0]
    assert plot_tradeoff(estimates, tmp_path / "same.png").stat().st_size > 5000


def test_an_acceptance_that_cannot_be_had_is_the_highest_there_is():
    """A pointwise constraint that 2 of 25 samples satisfy."""
    allowed = torch.arange(25) < 2
    scores, logps = torch.where(allowed, 0.3, -torch.inf).double(), torch.full((25,), -1.0).double()
    with pytest.raises(ValueError, match=r"above the highest there is, 0\.08"):
        choose_beta(scores, logps, acceptance=0.5)
    found = choose_beta(scores, logps, acceptance=0.5, at_most=True)
    assert found.acceptance_rate == pytest.approx(0.08) and found.tvd == pytest.approx(0, abs=1e-12)
    assert choose_beta(scores, logps, acceptance=0.05, at_most=True).acceptance_rate == pytest.approx(0.05)
