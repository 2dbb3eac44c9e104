"""The conditional loss against torch's own distributions and a softmax that is written out, in float64."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from contrastive_align.losses import conditional


N, V = 6, 11


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)

    return make(N, V).requires_grad_(), make(N, V), torch.randint(V, (N,), generator=generator)


def written_out(logits, labels, reference, kl_coef, entropy_coef, direction, kept):
    """With plain probabilities; ``kept`` are the columns of the KL."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    nll = -p[torch.arange(len(labels)), labels].log()
    entropy = -(p * p.log()).sum(1)
    pi, r = (x[:, kept].exp() / x[:, kept].exp().sum(1, keepdim=True) for x in (logits, reference))
    kl = (pi * (pi / r).log()).sum(1) if direction == "reverse" else (r * (r / pi).log()).sum(1)
    return nll + kl_coef * kl - entropy_coef * entropy, nll, kl, entropy


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("size", [V, V - 2])
@pytest.mark.parametrize("outside", [(), (V - 1, V - 2), (0, 4, V - 1)])
def test_it_is_the_formula_in_value_and_gradient(case, direction, size, outside):
    logits, reference, labels = case
    terms = conditional(
        logits, labels, reference_logits=reference[:, :size], kl_coef=0.3, entropy_coef=0.2, kl_direction=direction,
        outside=outside,
    )  # fmt: skip
    kept = [i for i in range(size) if i not in outside]
    expected = written_out(logits, labels, reference, 0.3, 0.2, direction, kept)
    for found, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    (found,) = torch.autograd.grad((terms.loss * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((expected[0] * weights).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_directions_are_those_of_torch(case):
    logits, reference, labels = case
    pi, r = Categorical(logits=logits), Categorical(logits=reference)
    for direction, wanted in (("reverse", kl_divergence(pi, r)), ("forward", kl_divergence(r, pi))):
        terms = conditional(
            logits, labels, reference_logits=reference, kl_coef=1.0, entropy_coef=0.0, kl_direction=direction
        )
        torch.testing.assert_close(terms.kl, wanted)
        torch.testing.assert_close(terms.loss, wanted - pi.log_prob(labels))
    torch.testing.assert_close(terms.entropy, pi.entropy())


def test_the_policy_as_its_own_reference_has_no_kl_and_no_gradient_of_it(case):
    logits, _, labels = case
    for direction in ("reverse", "forward"):
        terms = conditional(
            logits, labels, reference_logits=logits, kl_coef=1.0, entropy_coef=0.0, kl_direction=direction
        )
        torch.testing.assert_close(terms.kl, torch.zeros_like(terms.kl))
        (found,) = torch.autograd.grad(terms.kl.sum(), logits)
        torch.testing.assert_close(found, torch.zeros_like(found))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_token_outside_does_not_move_the_kl(case, direction):
    logits, reference, labels = case
    changed = logits.detach().clone()
    changed[:, -1] += 7
    reference[:, 2] = torch.nan  # whatever the reference says about it
    kls = [
        conditional(
            x, labels, reference_logits=reference, kl_coef=1.0, entropy_coef=0.0, kl_direction=direction,
            outside=(2, V - 1),
        ).kl
        for x in (logits, changed)
    ]  # fmt: skip
    torch.testing.assert_close(*kls)
    (found,) = torch.autograd.grad(kls[0].sum(), logits)
    assert (found[:, [2, V - 1]] == 0).all() and found.isfinite().all() and found.abs().sum() > 0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_words_that_both_exclude_count_for_nothing(case, direction, dtype):
    logits, reference, labels = (x.detach().to(dtype) if x.is_floating_point() else x for x in case)
    banned = [1, 5]
    labels = labels.clone().fill_(3)
    kept = [i for i in range(V) if i not in banned]
    reference[:, banned] = -torch.inf
    logits[:, banned] = -torch.inf
    logits.requires_grad_()
    terms = conditional(
        logits, labels, reference_logits=reference, kl_coef=0.3, entropy_coef=0.2, kl_direction=direction
    )
    small = conditional(
        logits[:, kept], torch.full_like(labels, kept.index(3)), reference_logits=reference[:, kept], kl_coef=0.3,
        entropy_coef=0.2, kl_direction=direction,
    )  # fmt: skip
    for found, wanted in zip(terms, small, strict=True):
        torch.testing.assert_close(found, wanted)
    (found,) = torch.autograd.grad(terms.loss.sum(), logits)
    (wanted,) = torch.autograd.grad(small.loss.sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_words_that_one_excludes_are_free_or_infinite(case):
    """0 log(0 / r) = 0, and p log(p / 0) is infinite: what is excluded by which side decides."""
    logits, reference, labels = case
    labels = labels.clone().fill_(3)
    without = torch.zeros(V, dtype=torch.float64)
    without[1] = -torch.inf

    def kl(x, y, direction):
        terms = conditional(x, labels, reference_logits=y, kl_coef=1.0, entropy_coef=1.0, kl_direction=direction)
        return terms.kl, torch.autograd.grad(terms.loss.sum(), logits)[0]

    for direction, x, y in (("reverse", logits + without, reference), ("forward", logits, reference + without)):
        value, slope = kl(x, y, direction)
        assert value.isfinite().all() and (value > 0).all() and slope.isfinite().all()
    for direction, x, y in (("forward", logits + without, reference), ("reverse", logits, reference + without)):
        assert (kl(x, y, direction)[0] == torch.inf).all()


def test_far_logits_stay_finite_in_single_precision():
    logits = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[-300.0, 300.0, 0.0]])
    for direction in ("reverse", "forward"):
        terms = conditional(
            logits, torch.tensor([1]), reference_logits=reference, kl_coef=1.0, entropy_coef=1.0, kl_direction=direction
        )
        assert [x.item() for x in terms] == [1200.0, 600.0, 600.0, 0.0]
        assert torch.autograd.grad(terms.loss.sum(), logits)[0].isfinite().all()


def test_a_coefficient_of_zero_measures_without_a_gradient(case):
    logits, reference, labels = case
    reference[0, 0] = -torch.inf  # an infinite KL is no part of the loss
    terms = conditional(
        logits, labels, reference_logits=reference, kl_coef=0.0, entropy_coef=0.0, kl_direction="reverse"
    )
    assert terms.kl[0] == math.inf and not terms.kl.requires_grad and not terms.entropy.requires_grad
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(terms.loss, wanted)
    assert (terms.entropy > 0).all()


def test_no_reference(case):
    logits, _, labels = case
    terms = conditional(logits, labels, kl_coef=0.0, entropy_coef=0.1, kl_direction="forward")
    assert (terms.kl == 0).all()
    torch.testing.assert_close(terms.loss, terms.nll - 0.1 * Categorical(logits=logits).entropy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_logits": None}, "kl_coef is 0.3, but reference_logits is None"),
        ({"kl_direction": "backward"}, "'backward', expected 'reverse'"),
        ({"outside": (3, V)}, f"token id {V}"),
        ({"outside": (-1,)}, "token id -1"),
        ({"outside": tuple(range(V))}, "nothing to take a KL over"),
        ({"reference_logits": torch.zeros(N, V + 1)}, f"V_ref at most {V}"),
        ({"reference_logits": torch.zeros(1, V)}, rf"expected \({N}, V_ref\)"),
        ({"labels": torch.zeros(N, 1, dtype=torch.long)}, "expected"),
    ],
)
def test_it_says_what_is_wrong(case, change, message):
    logits, reference, labels = case
    arguments = {
        "labels": labels, "reference_logits": reference, "kl_coef": 0.3, "entropy_coef": 0.1, "kl_direction": "forward",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        conditional(logits, **{**arguments, **change})
