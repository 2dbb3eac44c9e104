"""What samples say against what enumeration says: values within their standard errors, and errors that are right."""

import math

import pytest
import torch

from contrastive_align.losses import (
    Estimate,
    RunningLogZ,
    average_estimate,
    divergence_value,
    estimate_divergence,
    estimate_kl_base,
    estimate_log_z,
    estimate_moments,
)


F64 = {"dtype": torch.float64}
N = 12
LOG_Z = -3.7
ESTIMATED = ["kl", "reverse_kl", "tv", "js"]


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


class World:
    """A policy, its base, a proposal and a target over 12 completions. Three are outside of the target if asked."""

    def __init__(self, *, online=False, excluded=False):
        self.pi = draw(N, seed=1).log_softmax(-1)
        self.q = self.pi if online else (self.pi + draw(N, seed=2, scale=0.6)).log_softmax(-1)
        self.base = draw(N, seed=3).log_softmax(-1)
        scores = self.pi + draw(N, seed=4, scale=0.9)
        if excluded:
            scores[:3] = -math.inf
        self.p = scores.log_softmax(-1)
        self.features = draw(N, 2, seed=5)

    def sample(self, batch, k, seed=6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.multinomial(self.q.exp(), batch * k, replacement=True, generator=generator).view(batch, k)
        return {name: getattr(self, name)[x] for name in ("pi", "q", "base", "p", "features")}


def known_z(batch, known):
    return torch.full((batch,), LOG_Z, **F64) if known else None


def estimates(s, *, valid=None, log_z=None):
    """Every estimator on the samples of ``World.sample``; those of the divergences under their names."""
    scores = s["p"] + LOG_Z
    return {
        "log_z": estimate_log_z(s["q"], scores, valid=valid),
        "kl_base": estimate_kl_base(s["pi"], s["base"], proposal_logps=s["q"], valid=valid),
        "moment of pi": estimate_moments(s["features"], s["pi"], s["q"], valid=valid),
        "moment of p": estimate_moments(s["features"], scores, s["q"], valid=valid),
        **{n: estimate_divergence(n, s["pi"], s["q"], scores, log_z=log_z, valid=valid) for n in ESTIMATED},
    }


def exact(w):
    return {
        "log_z": torch.tensor(LOG_Z, **F64),
        "kl_base": divergence_value("reverse_kl", w.pi, w.base),
        "moment of pi": w.pi.exp() @ w.features,
        "moment of p": w.p.exp() @ w.features,
        **{n: divergence_value(n, w.pi, w.p) for n in ESTIMATED},
    }


CASES = [
    *((online, False, known) for online in (True, False) for known in (True, False)),
    (False, True, False),  # off-policy, with completions that the target excludes
    (True, True, True),
]


@pytest.mark.parametrize(("online", "excluded", "known"), CASES)
def test_they_converge_to_the_exact_values(online, excluded, known):
    world = World(online=online, excluded=excluded)
    got = estimates(world.sample(1, 40_000), log_z=known_z(1, known))
    for name, want in exact(world).items():
        value, se, ess = got[name]
        if name == "reverse_kl" and excluded:
            assert want == value == math.inf and se.isnan()
            continue
        error = (value[0] - want).abs()
        assert (error <= 3 * se[0]).all(), (name, value, want, se)
        # Without noise where nothing is left to chance: weights of 1, summed.
        assert (se < 0.03).all() and (error < 0.05).all() and (se > 0).all(), (name, se)
        assert 10_000 < ess.item() <= 40_000 * (1 + 1e-9)


@pytest.mark.parametrize(("online", "excluded", "known"), CASES)
def test_their_standard_errors_are_calibrated(online, excluded, known):
    """200 repetitions: (value - exact) / se has mean 0 and standard deviation 1, itself known to 5%."""
    world = World(online=online, excluded=excluded)
    got = estimates(world.sample(200, 2_000, seed=11), log_z=known_z(200, known))
    for name, want in exact(world).items():
        if name == "reverse_kl" and excluded:
            continue
        z = (got[name].value - want) / got[name].se
        assert z.shape[0] == 200 and z.mean(0).abs().max() < 0.3, (name, z.mean(0))
        assert ((z.std(0) - 1).abs() < 0.17).all(), (name, z.std(0))


def test_effective_sample_size():
    logs = torch.log(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], **F64))
    q = torch.zeros(3, 4, **F64)
    want = torch.tensor([4.0, 9 / 5, 1.0], **F64)
    assert torch.allclose(estimate_log_z(q, logs + 900).ess, want)
    assert torch.allclose(estimate_moments(q, logs - 900, q).ess, want)
    # The smaller one of the two where both the policy's and the target's weights enter.
    for name, enters in (("kl", False), ("tv", True), ("js", True)):
        few = estimate_divergence(name, logs[:2].roll(1, 0) + math.log(0.25), q[:2], logs[:2]).ess
        assert torch.allclose(few, torch.tensor([9 / 5] * 2, **F64) if enters else want[:2]), name
    known = estimate_divergence("reverse_kl", logs[:1], q[:1], logs[1:2] - 5.0, log_z=torch.zeros(1, **F64))
    assert known.ess.item() == pytest.approx(4)


def test_by_hand_on_three_samples():
    """w = pi/q = (1/2, 1, 2), P/q = (4, 2, 0): Z = 2, u = (2, 1, 0)."""
    q = torch.tensor([[0.2, 0.1, 0.3]], **F64).log()
    pi = q + torch.tensor([[0.5, 1.0, 2.0]], **F64).log()
    scores = q + torch.tensor([[4.0, 2.0, 0.0]], **F64).log()
    for log_z in (None, torch.tensor([math.log(2)], **F64)):
        value = {
            n: estimate_divergence(n, pi, q, scores, log_z=log_z, correct_bias=False).value.item() for n in ESTIMATED
        }
        assert value["kl"] == pytest.approx(2 * math.log(4) / 3, rel=1e-12)
        assert value["tv"] == pytest.approx((1.5 + 0 + 2) / 6, rel=1e-12)
        js = 0.5 * math.log(2 * 0.5 / 2.5) + 2 * math.log(2 * 2 / 2.5) + 2 * math.log(2)
        assert value["js"] == pytest.approx(js / 6)
        assert value["reverse_kl"] == math.inf
    log_z = estimate_log_z(q, scores, correct_bias=False)
    assert log_z.value.item() == pytest.approx(math.log(2), rel=1e-12)
    assert log_z.se.item() == pytest.approx(math.sqrt((1 + 0 + 1) / 6))
    finite = estimate_divergence("reverse_kl", pi[:, :2], q[:, :2], scores[:, :2], correct_bias=False)  # Z = 3
    assert finite.value.item() == pytest.approx((0.5 * math.log(0.5 / 4) + 0) / 1.5 + math.log(3) - math.log(2) / 1.5)
    base = q + math.log(0.5)
    got = estimate_kl_base(pi, base, proposal_logps=q, correct_bias=False).value.item()
    assert got == pytest.approx((0.5 * math.log(1) + math.log(2) + 2 * math.log(4)) / 3.5)
    assert estimate_kl_base(pi, base, correct_bias=False).value.item() == pytest.approx(
        (0 + math.log(2) + math.log(4)) / 3
    )
    phi = torch.tensor([[1.0, 0.0, 1.0]], **F64)
    assert estimate_moments(phi, pi, q, correct_bias=False).value.item() == pytest.approx(2.5 / 3.5)
    assert estimate_moments(phi, scores, q, correct_bias=False).value.item() == pytest.approx(2 / 3)
    assert estimate_moments(phi, scores, q, correct_bias=False).se.shape == (1,)


def test_the_bias_that_is_taken_off_is_that_of_halves_by_hand():
    """Of two samples the halves are each alone; of four there are two ways to halve them."""
    q, scores = torch.zeros(1, 2, **F64), torch.tensor([[0.0, math.log(3)]], **F64)  # Z = 2, alone 1 and 3
    plain, halves = math.log(2), math.log(3) / 2
    assert estimate_log_z(q, scores).value.item() == pytest.approx(2 * plain - halves)
    q, scores = torch.zeros(1, 4, **F64), torch.tensor([[1.0, 3.0, 1.0, 7.0]], **F64).log()
    plain = math.log(3)
    halves = (math.log(1) + math.log(5) + math.log(2) + math.log(4)) / 4
    assert estimate_log_z(q, scores).value.item() == pytest.approx(2 * plain - halves)
    empty = torch.tensor([[0.0, -math.inf]], **F64)  # a half without weight corrects nothing
    assert estimate_log_z(q[:, :2], empty).value.item() == pytest.approx(-math.log(2))


def test_a_policy_that_is_its_target_is_at_0():
    world = World()
    s = world.sample(3, 500)
    for name in ESTIMATED:
        value, _, ess = estimate_divergence(
            name, s["pi"], s["q"], s["pi"] + LOG_Z, log_z=torch.full((3,), LOG_Z, **F64)
        )
        assert value.abs().max() < 1e-12 and ess.min() > 100, name
        off = estimate_divergence(name, s["pi"], s["pi"], s["p"] + LOG_Z).value
        assert off.min() > 0.01


@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("known", [True, False])
def test_a_masked_column_is_a_removed_column(known, garbage):
    s = World(excluded=True).sample(4, 50)
    valid = torch.ones(4, 50, dtype=torch.bool)
    valid[:, [0, 7, 49]] = False
    keep = valid[0].nonzero().squeeze(-1)
    removed = estimates({k: t[:, keep] for k, t in s.items()}, log_z=known_z(4, known))
    wide = {k: t.clone() for k, t in s.items()}
    for t in wide.values():
        t[:, ~valid[0]] = garbage
    masked = estimates(wide, valid=valid, log_z=known_z(4, known))
    for name, estimate in removed.items():
        for want, got in zip(estimate, masked[name], strict=True):
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-12, equal_nan=name == "reverse_kl"), name
            assert name == "reverse_kl" or want.isfinite().all()


@pytest.mark.parametrize("known", [True, False])
def test_rows_that_say_nothing_say_nan(known):
    """Row 0 as it was, row 1 all masked, row 2 one sample, row 3 no sample that the target allows."""
    s = World().sample(4, 50)
    valid = torch.ones(4, 50, dtype=torch.bool)
    valid[1], valid[2, 1:] = False, False
    s["p"][3] = -math.inf
    got = estimates(s, valid=valid, log_z=known_z(4, known))
    alone = estimates({k: t[:1] for k, t in s.items()}, log_z=known_z(1, known))
    for name, (value, se, ess) in got.items():
        assert torch.allclose(value[0], alone[name].value[0]) and torch.allclose(se[0], alone[name].se[0])
        assert value[1].isnan().all() and se[1].isnan().all() and ess[1] == 0, name
        assert value[2].isfinite().all() and ess[2].item() == pytest.approx(1), name
        if name in ("kl_base", "moment of pi"):
            assert value[3].isfinite().all() and ess[3] > 1
        elif name == "log_z":
            assert value[3] == -math.inf and se[3].isnan() and ess[3] == 0
        elif name == "reverse_kl" and known:
            assert value[3] == math.inf
        else:
            assert value[3].isnan().all() and se[3].isnan().all() and ess[3] == 0, name


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_far_away_is_finite_or_infinite_but_never_nan(far):
    s = World().sample(3, 20)
    for moved in ("pi", "p", "base"):
        t = {k: v.clone() for k, v in s.items()}
        t[moved][:, 0] += far
        for known in (True, False):
            for name, (value, _, ess) in estimates(t, log_z=known_z(3, known)).items():
                assert not value.isnan().any() and not ess.isnan().any(), (moved, name)


def test_long_sequences_stay_in_log_space():
    """Log-probs of -5000 nats underflow; only their differences count."""
    s = World().sample(2, 300)
    shifted = {k: t if k == "features" else t - 5000 for k, t in s.items()}
    for name, estimate in estimates(shifted).items():
        for got, want in zip(estimate, estimates(s)[name], strict=True):
            assert torch.allclose(got, want, rtol=1e-8, atol=1e-9), name


def test_half_precision_and_gradients_are_left_at_the_door():
    s = World().sample(2, 300)
    low = {k: t.bfloat16().requires_grad_() for k, t in s.items()}
    for name, (value, se, ess) in estimates(low).items():
        assert value.dtype == se.dtype == ess.dtype == torch.float32, name
        assert not value.requires_grad and not ess.requires_grad


def test_average_over_prompts():
    """The spread between prompts contains the noise within them."""
    values = torch.tensor([1.0, 2.0, math.nan, 6.0], **F64)
    one = Estimate(values, torch.full((4,), 0.1, **F64), torch.tensor([5.0, 6.0, 0.0, 7.0], **F64))
    value, se, ess = average_estimate(one)
    assert (value.item(), ess.item()) == (3.0, 18.0)
    assert se.item() == pytest.approx(math.sqrt(7 / 3))
    single = average_estimate(Estimate(*(t[:1] for t in one)))
    assert (single.value.item(), single.se.item()) == (1.0, pytest.approx(0.1))
    none = average_estimate(Estimate(*(t[2:3] for t in one)))
    assert none.value.isnan() and none.se.isnan() and none.ess == 0
    world = World()
    moments = estimate_moments(*(world.sample(300, 200)[k] for k in ("features", "pi", "q")))
    assert moments.value.shape == moments.se.shape == (300, 2) and moments.ess.shape == (300,)
    value, se, _ = average_estimate(moments)
    assert ((value - world.pi.exp() @ world.features).abs() < 3 * se + 0.003).all()  # O(1/K) of self-normalisation
    # One distribution for every prompt: then all the spread is noise within.
    assert torch.allclose(se, moments.se.square().mean(0).sqrt() / math.sqrt(300), rtol=0.15)


def test_refusals():
    logps = torch.zeros(2, 3)
    for name in ("chi2", "reverse_chi2", "alpha:0.5"):
        with pytest.raises(ValueError, match=rf"{name} is not estimated from samples.*Use kl, reverse_kl, tv or js"):
            estimate_divergence(name, logps, logps, logps)
    with pytest.raises(ValueError, match="Unknown divergence 'hellinger'"):
        estimate_divergence("hellinger", logps, logps, logps)
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"expected \(B, K\), the same for each"):
            estimate_log_z(logps, wrong)
        with pytest.raises(ValueError, match=r"expected \(B, K\), the same for each"):
            estimate_kl_base(logps, wrong)
    with pytest.raises(ValueError, match=r"log_z is \(2, 3\), expected \(2,\)"):
        estimate_divergence("kl", logps, logps, logps, log_z=logps)
    with pytest.raises(ValueError, match=r"features are \(2, 4\)"):
        estimate_moments(torch.zeros(2, 4), logps, logps)


def test_the_running_log_z_is_the_mean_over_all_samples_of_a_prompt_and_survives_saving():
    log_weights = draw(2, 7)
    running = RunningLogZ()
    running.add([("a", log_weights[0, :3]), ("b", log_weights[1])])
    running.add([("a", log_weights[0, 3:]), ("none", torch.full((2,), -math.inf))])
    saved = RunningLogZ()
    saved.load_state_dict(running.state_dict())
    for log_z in (running, saved):
        assert torch.allclose(log_z.of(["b", "a"]), log_weights.flip(0).exp().mean(-1).log(), atol=1e-12)
        assert log_z["none"] == -math.inf and "a" in log_z and "c" not in log_z


def test_samples_that_neither_policy_nor_target_has_say_nothing():
    """As of quasi-rejection sampling under a pointwise constraint: p_beta is the target, on a part of the proposal."""
    scores = torch.tensor([[0.0, 0.5, -math.inf, -math.inf]], **F64)
    q, log_z = torch.full((1, 4), -1.0, **F64), torch.tensor([0.0], **F64)
    for name in ESTIMATED:
        value = estimate_divergence(name, scores, q, scores, log_z=log_z, correct_bias=False).value
        assert value.item() == pytest.approx(0), name
