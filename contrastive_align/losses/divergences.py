r"""f-divergences between a policy pi and a target p: slopes f'(t), t = pi / p, exact values, and the f-DPG surrogate.

.. math:: D_f(\pi \| p) = \sum_{x: p(x) > 0} p(x)\, f(t(x)) + f'(\infty)\, \pi(p = 0), \qquad
    \nabla D_f = E_{x \sim \pi}\big[ f'(t(x))\, \nabla \log \pi(x) \big]

f-DPG, arXiv:2302.08215, Theorem 1. The gradient asks for f' alone, and constants in f' do not matter to it.

Every slope takes ``log_t`` and an optional ``log_weight``, and returns exp(log_weight) f'(t). The product is formed in
log space: with a weight pi/q it stays right where the weight alone would be 0 and the slope alone infinite, as in
(pi/q) (-p/pi) = -p/q. At log_t = -inf (pi = 0) ``tv`` is -1/2, ``reverse_chi2`` -2, ``alpha:<a>`` with a > 1
-1 / (a - 1), and the others -inf.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_align.registry import Registry, place_of


def kl(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """KL(p || pi), the objective of DPG: f'(t) = -1 / t, and 0 where p = 0. Up to a constant ``alpha:0``.

    >>> kl(torch.tensor([0.0, torch.inf]))
    tensor([-1., -0.])
    """
    return -_exp(log_weight - log_t)


def reverse_kl(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """KL(pi || p), that of RL with a KL penalty: f'(t) = log t + 1, +inf where p = 0. Up to a constant ``alpha:1``.

    >>> reverse_kl(torch.tensor([0.0, torch.inf]))
    tensor([1., inf])
    """
    return _exp(log_weight, like=log_t) * (log_t + 1)


def js(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """**Twice** the Jensen-Shannon divergence: f'(t) = log(2 t / (1 + t)), at most log 2.

    The one slope (the paper's) that is not that of the reported value.

    >>> js(torch.tensor([0.0, torch.inf]))
    tensor([0.0000, 0.6931])
    """
    return _exp(log_weight, like=log_t) * (F.logsigmoid(log_t) + math.log(2))


def tv(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """Total variation: f'(t) = sign(log t) / 2, and 0, a subgradient, at t = 1.

    >>> tv(torch.tensor([-3.0, 0.0, torch.inf]))
    tensor([-0.5000,  0.0000,  0.5000])
    """
    return _exp(log_weight, like=log_t) * log_t.sign() / 2


def chi2(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """Return f'(t) = 1 - 1 / t^2, and 1 where p = 0, of Pearson's divergence E_p[p / pi] - 1. Twice ``alpha:-1``.

    >>> chi2(torch.tensor([0.0, torch.inf]))
    tensor([0., 1.])
    """
    return -_expm1(-2 * log_t, log_weight)


def reverse_chi2(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """chi2(pi || p) = E_pi[pi / p] - 1: f'(t) = 2 (t - 1), +inf where p = 0. Twice ``alpha:2``.

    >>> reverse_chi2(torch.tensor([0.0, torch.inf]))
    tensor([0., inf])
    """
    return 2 * _expm1(log_t, log_weight)


def alpha(a: float):
    """Return the alpha-divergence's f'(t) = (t^(a-1) - 1) / (a - 1), log t at a = 1; +inf where p = 0 if a >= 1.

    >>> alpha(0.5)(torch.tensor([0.0, torch.inf]))
    tensor([0., 2.])
    """
    if not math.isfinite(a):
        raise ValueError(f"alpha is {a}, expected a finite number.")

    def slope(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
        if a == 1:
            return _exp(log_weight, like=log_t) * log_t
        return _expm1((a - 1) * log_t, log_weight) / (a - 1)

    return slope


class _Slopes(Registry):
    def __missing__(self, name):
        """Build a member of the family ``alpha:<a>``; it is not stored, so that iterating gives the six names."""
        if isinstance(name, str) and (a := alpha_of(name)) is not None:
            return alpha(a)
        raise KeyError(name)

    def __setitem__(self, name, function):
        super().__setitem__(name, function)
        if name in self.hashes:
            dict.__setitem__(self, name, _slope_of(function))


def _slope_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``slope(log_t, log_weight)`` of a function that gives f(t) or f'(t)."""
    if "log_weight" in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def slope(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
        found = _derivative(function, log_t) if is_generator(function) else function(log_t)
        weight = _exp(log_weight, like=log_t)
        return torch.where(weight == 0, 0.0, weight * found.to(log_t.dtype))

    return slope


def is_generator(function: Callable[..., Tensor]) -> bool:
    """Whether a divergence of one's own is given by f(t), and not by its slope."""
    return next(iter(inspect.signature(function).parameters), "") == "t"


def _derivative(f: Callable[[Tensor], Tensor], log_t: Tensor) -> Tensor:
    """Return f'(t) in float64; at t = inf, where p = 0, its limit, or inf where it goes on rising."""
    absent = log_t == torch.inf
    far = torch.tensor([40.0, 80.0], dtype=torch.float64, device=log_t.device)
    with torch.enable_grad():
        t = torch.cat([far, log_t.detach().double().masked_fill(absent, 0.0).flatten()]).exp().requires_grad_()
        (found,) = torch.autograd.grad(f(t).sum(), t)
    (near, limit), found = found[:2].tolist(), found[2:].view(log_t.shape)
    return found.masked_fill(absent, limit if abs(limit - near) < 1e-6 * max(1.0, abs(limit)) else torch.inf)


def _check_divergence(name: str, function: Callable[..., Tensor]) -> None:
    where = f"The divergence {name} ({place_of(function)})"
    log_t = torch.cat([torch.linspace(-5, 5, 101, dtype=torch.float64), torch.tensor([torch.inf])])
    given = log_t[:-1].exp() if is_generator(function) else log_t
    found = function(given)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(given.shape):
        raise ValueError(f"{where} returned {shape} for numbers of shape {tuple(given.shape)}, expected this shape.")
    if is_generator(function) and not abs(at_one := function(torch.ones(1, dtype=torch.float64)).item()) < 1e-6:
        raise ValueError(f"{where} has f(1) = {at_one:.4g}, expected 0: a distribution is at no distance from itself.")
    slopes = _slope_of(function)(log_t)
    wrong = ~slopes.isfinite()
    wrong[-1] = False
    wrong[1:] |= ~(slopes.diff() >= -1e-9 * (1 + slopes[1:].abs().nan_to_num(posinf=0.0)))
    if bool(wrong.any()):
        at = int(wrong.long().argmax())
        raise ValueError(
            f"{where} has the slope {slopes[at].item():.4g} at t = {log_t[at].exp().item():.4g}"
            f"{f', after {slopes[at - 1].item():.4g}' if at else ''}. Expected the slope of a convex f: finite, and "
            "never falling up to t = inf, where the target has no mass; there it may be inf."
        )


DIVERGENCES = _Slopes(
    "divergence",
    {"kl": kl, "reverse_kl": reverse_kl, "js": js, "tv": tv, "chi2": chi2, "reverse_chi2": reverse_chi2},
    _check_divergence,
)


def register_divergence(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an f-divergence of one's own known by a name, for ``divergence``.

    Args:
        name: free of case and punctuation, like those in ``DIVERGENCES``.
        function: by the name of its first parameter it says what it returns, in the shape of its argument.
            ``t`` = pi / p: the generator f(t), convex with f(1) = 0, whose slope autograd takes in float64.
            ``log_t``: the slope f'(t) itself, in the dtype of log t; at log t = inf, where p = 0, its limit, or inf. It
            may take ``log_weight``, too, as those of the package do (see above).

    Raises:
        ValueError: a name of the package's, another shape, f(1) other than 0, or a slope that falls: f must be convex.

    >>> _ = register_divergence("le_cam", lambda t: (t - 1) ** 2 / (t + 1) / 2)
    >>> _ = register_divergence("hellinger", lambda log_t: 1 - torch.exp(-log_t / 2))
    >>> divergence("LeCam")(torch.tensor([0.0, torch.inf])), divergence("Hellinger")(torch.tensor([0.0, torch.inf]))
    (tensor([0.0000, 0.5000]), tensor([0., 1.]))
    >>> del DIVERGENCES["hellinger"], DIVERGENCES["le_cam"]
    """
    return DIVERGENCES.register(name, function)


# Other common names of the same divergences.
DIVERGENCE_ALIASES = {"forward_kl": "kl", "rkl": "reverse_kl", "jensen_shannon": "js", "total_variation": "tv"}


def canonical_divergence_name(name: str) -> str:
    """Return the key of ``DIVERGENCES`` for a name, whatever its case and punctuation, or ``alpha:<a>``.

    ``file.py:function`` that is not registered yet is, see :func:`find_divergence`.

    >>> canonical_divergence_name("Reverse-KL"), canonical_divergence_name("JS"), canonical_divergence_name("Alpha=.50")
    ('reverse_kl', 'js', 'alpha:0.5')
    """
    return _known_name(name) or find_divergence(name)


def _known_name(name: str) -> str | None:
    if (a := alpha_of(name)) is not None:
        return f"alpha:{int(a) if a == int(a) else a}"
    if name in DIVERGENCES:
        return name
    for spelling in (*DIVERGENCES, *DIVERGENCE_ALIASES):
        if re.sub(r"[\W_]", "", spelling.lower()) == re.sub(r"[\W_]", "", name.lower()):
            return DIVERGENCE_ALIASES.get(spelling, spelling)
    return None


def find_divergence(given: str | Callable[..., Tensor]) -> str:
    """Register a divergence that is given as a function or by its place, and return its key; also that of a name.

    A file is read anew, which :func:`canonical_divergence_name` does not: a run's config asks here, its steps there.

    Raises:
        ValueError: an unknown name, or what :func:`register_divergence` refuses.
    """
    named = isinstance(given, str) and (":" not in given or given.lower().startswith("alpha"))
    if named and (known := _known_name(given)) is not None:
        return known
    misspelt = named and given.lower().startswith("alpha")
    if not misspelt and (found := DIVERGENCES.find(given)) is not None:
        return found
    raise ValueError(
        f"Unknown divergence {given!r}. Known: {', '.join(DIVERGENCES)}, alpha:<a> with a number <a>, such as "
        "alpha:0.5 or alpha:-1, and one of your own as 'file.py:function'."
    )


def divergence(name: str):
    """Return the slope f'(t) as a function of log t, by name; :func:`canonical_divergence_name` lists the spellings.

    >>> divergence("alpha:2")(torch.tensor([0.0])), divergence("ReverseKL") is reverse_kl
    (tensor([0.]), True)
    """
    return DIVERGENCES[canonical_divergence_name(name)]


def alpha_of(name: str) -> float | None:
    """Return the number of ``alpha:<a>`` (also ``alpha=<a>``, ``alpha_<a>``, ``alpha <a>``); None for any other name.

    >>> alpha_of("alpha:-0.5"), alpha_of("js")
    (-0.5, None)
    """
    match = re.fullmatch(
        "alpha[:=_ ](.*)", name.strip().lower()
    )  # without a separator "alpha-2" could be read both ways
    try:
        a = float(match[1]) if match else math.nan
    except ValueError:
        return None
    return a if math.isfinite(a) else None


def divergence_value(name: str, log_pi: Tensor, log_p: Tensor) -> Tensor:
    r"""Return the exact divergence of two enumerated distributions, in nats for the two KL and for ``js``.

    .. math:: \text{kl} = \sum p \log\frac{p}{\pi} \quad \text{reverse\_kl} = \sum \pi \log\frac{\pi}{p} \quad
        \text{tv} = \tfrac12 \sum |\pi - p| \quad \text{chi2} = \sum \frac{p^2}{\pi} - 1 \quad
        \text{reverse\_chi2} = \sum \frac{\pi^2}{p} - 1

    .. math:: \text{js} = \tfrac12 KL(\pi \| m) + \tfrac12 KL(p \| m), \; m = \tfrac{\pi + p}{2} \qquad
        \text{alpha:a} = \frac{\sum \pi^a p^{1-a} - 1}{a (a - 1)}

    The usual definitions; ``js`` is at most log 2, and its slope in ``DIVERGENCES`` is that of twice this value.
    ``alpha`` tends to kl at a = 0 and to reverse_kl at a = 1. Each atom's share is at least 0 in every sum that is
    formed, so that nothing cancels where pi is near p. Infinite where an atom missing on one side makes it so.

    Args:
        name: as :func:`canonical_divergence_name` reads it.
        log_pi, log_p: (..., N) log-probabilities over all N atoms; -inf for an atom that is not there.

    Raises:
        ValueError: an unknown name, or probabilities that do not sum to 1 (a target without its log Z taken off).

    >>> pi, p = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> divergence_value("tv", pi, p), divergence_value("kl", pi, p)
    (tensor(0.4000), tensor(0.3681))
    """
    name = canonical_divergence_name(name)
    if name in DIVERGENCES.hashes and not is_generator(DIVERGENCES[name]):
        raise ValueError(f"{DIVERGENCES.describe(name)} is known by its slope alone, and a value needs f itself.")
    for which, logs in (("log_pi", log_pi), ("log_p", log_p)):
        total = logs.detach().logsumexp(-1).flatten()
        wrong = ~(total.abs() < 1e-3)
        if bool(wrong.any()):
            raise ValueError(
                f"{which} holds probabilities that sum to exp({total[wrong][0].item():.6g}), expected 1. Take the "
                "logsumexp over all atoms (log Z) off first."
            )
    if name in DIVERGENCES.hashes:
        return _generated_value(DIVERGENCES[name], log_pi, log_p)
    if name == "tv":
        return (log_pi.exp() - log_p.exp()).abs().sum(-1) / 2
    if name == "js":
        middle = torch.logaddexp(log_pi, log_p) - math.log(2)
        return (_alpha_terms(0.0, middle, log_pi) + _alpha_terms(0.0, middle, log_p)).sum(-1) / 2
    a = {"kl": 0.0, "reverse_kl": 1.0, "chi2": -1.0, "reverse_chi2": 2.0}.get(name, alpha_of(name))
    scale = 2 if name in ("chi2", "reverse_chi2") else 1
    return scale * _alpha_terms(a, log_pi, log_p).sum(-1)


def _generated_value(slope: Callable[..., Tensor], log_pi: Tensor, log_p: Tensor) -> Tensor:
    """Return the sum of p f(pi/p), and of f'(inf) pi where p = 0."""
    absent = log_p == -torch.inf
    t = (log_pi - log_p).masked_fill(absent, 0.0).exp()
    limit = slope(torch.full((1,), torch.inf, dtype=log_p.dtype, device=log_p.device))
    outside = torch.where(absent & (log_pi > -torch.inf), log_pi.exp() * limit, 0.0)
    f = slope.__wrapped__
    inside = torch.where(f(t).isnan(), f(t.clamp(min=torch.finfo(t.dtype).tiny)), f(t))  # t log t at t = 0
    return (log_p.exp() * inside + outside).sum(-1)


def _alpha_terms(a: float, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """(pi^a p^(1-a) - a pi - (1-a) p) / (a (a-1)), at least 0, atom by atom; the limits at a = 0 and 1."""
    if a > 0.5:  # the two sides swap as a -> 1 - a; below, only a near 0 has to be handled with care
        return _alpha_terms(1 - a, log_p, log_pi)
    absent = log_p == -torch.inf
    weight, log_t = log_p.masked_fill(absent, 0.0), (log_pi - log_p).masked_fill(absent, 0.0)
    # (t^a - 1) / a, times p; at a = 0, log t.
    powers = weight.exp() * log_t if a == 0 else _expm1(a * log_t, weight) / a
    terms = (powers - _expm1(log_t, weight)) / (a - 1)
    return torch.where(absent, log_pi.exp() / (1 - a), terms)


def _exp(x: Tensor | float, like: Tensor | None = None) -> Tensor:
    """exp, also of the plain number that a slope's ``log_weight`` may be."""
    return torch.exp(x if isinstance(x, Tensor) else torch.full_like(like, x))


def _expm1(x: Tensor, log_weight: Tensor | float) -> Tensor:
    """exp(log_weight) (e^x - 1): exact near x = 0, and finite wherever the product is."""
    # exp(log_weight) alone may be 0 where e^x is infinite; the clamps keep the branch not taken free of NaN.
    above = -_exp(log_weight + x.clamp(min=0)) * torch.expm1(-x.clamp(min=0))
    below = _exp(log_weight, like=x) * torch.expm1(x.clamp(max=0))
    return torch.where(x > 0, above, below)


def fdpg(
    policy_logps: Tensor,
    proposal_logps: Tensor,
    target_log_scores: Tensor,
    *,
    log_z: Tensor,
    divergence: str,
    baseline: str | float | Tensor | None = None,
    valid: Tensor | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    r"""Return the f-DPG surrogate, whose gradient is that of D_f(pi || p), p = P / Z, on K samples of a proposal q.

    .. math:: \frac{1}{K} \sum_i \frac{\pi(y_i)}{q(y_i)} \big( f'(t_i) - b_i \big) \log \pi(y_i), \qquad
        t_i = \frac{\pi(y_i)}{P(y_i) / Z}

    where only the last log pi has a gradient. f-DPG, arXiv:2302.08215, Theorem 1, under importance weights
    (GDC, arXiv:2012.11635); one Z for each prompt as in CDPG, arXiv:2112.00791. Only the gradient has a meaning: the
    value is not a divergence. To measure one, see :mod:`contrastive_align.losses.estimators`.

    The gradient is unbiased for every baseline b_i that does not depend on y_i, since E_q[(pi/q) b grad log pi] = 0.
    ``"leave_one_out"`` is the mean of f' over the other valid samples of the group, weighted by their pi/q:

    .. math:: b_i = \frac{\sum_{j \ne i} w_j f'(t_j)}{\sum_{j \ne i} w_j}, \qquad w = \pi / q

    an estimate of E_pi[f'], which is -1 for ``kl``, the baseline of arXiv:2206.00761. Dividing by the sum of the
    weights takes off every constant in f' exactly. A sample without another gets 0. ``js``, ``tv`` and the two chi2
    have slopes around 0 near the target: there it gains nothing and costs variance when K is small.

    Args:
        policy_logps: (B, K) nats, log pi(y|x) summed over the completion's tokens. The only input with a gradient.
        proposal_logps: (B, K) nats, log q(y|x) of what the completions were sampled from; the policy's own when online.
        target_log_scores: (B, K) nats, log P(y|x), not normalised; -inf where a pointwise constraint is violated.
        log_z: (B,) nats, log of the sum of P over all completions of the prompt.
        divergence: a name in ``DIVERGENCES`` or ``alpha:<a>``.
        baseline: None, ``"leave_one_out"``, or numbers from outside: a float, (B,) or (B, K); these are as unbiased as
            they are independent of the sample that they are subtracted from.
        valid: (B, K) bool; a False entry acts as if it were not there, and a row without a valid entry gives 0.
        max_ratio: clip pi/q at this value, which trades variance for a bias, also with a baseline.

    Returns:
        (B,).

    Raises:
        ValueError: at a valid entry, f' is infinite (P = 0 under ``reverse_kl``, ``reverse_chi2`` and ``alpha:<a>``
            with a >= 1, where D_f itself is infinite) or beyond the dtype; a log-probability or log_z is not finite;
            shapes, names or ``max_ratio`` are not as above.

    >>> policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> target = torch.tensor([[-1.0, -torch.inf]])
    >>> loss = fdpg(policy, policy, target, log_z=torch.tensor([-1.0]), divergence="kl", baseline=-1.0)
    >>> loss.backward()
    >>> policy.grad  # 1/2 (-p/pi + 1): up where p is above pi, down where p is 0
    tensor([[-0.8591,  0.5000]])
    """
    name = canonical_divergence_name(divergence)
    slope = DIVERGENCES[name]
    valid = torch.ones_like(policy_logps, dtype=torch.bool) if valid is None else valid
    shapes = [tuple(t.shape) for t in (policy_logps, proposal_logps, target_log_scores, valid)]
    if policy_logps.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "policy_logps, proposal_logps, target_log_scores and valid are "
            f"{', '.join(map(str, shapes))}, expected (B, K), the same for each."
        )
    if log_z.shape != policy_logps.shape[:1]:
        raise ValueError(f"log_z is {tuple(log_z.shape)}, expected one for each row: {tuple(policy_logps.shape[:1])}.")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio is {max_ratio}, expected a number above 0, or None for no limit.")

    log_pi = policy_logps.masked_fill(~valid, 0.0)  # before any product: a masked NaN times 0 would still be NaN
    log_q = proposal_logps.detach().masked_fill(~valid, 0.0)
    log_p = (target_log_scores.detach() - log_z.detach().unsqueeze(-1)).masked_fill(~valid, 0.0)
    with torch.no_grad():
        log_ratio = log_pi - log_q
        if max_ratio is not None:
            log_ratio = log_ratio.clamp(max=math.log(max_ratio))
        # One product in log space: pi/q may underflow where f' overflows and their product is an ordinary number.
        weighted = slope(log_pi - log_p, log_ratio).masked_fill(~valid, 0.0)
        if isinstance(baseline, str):
            b = _leave_one_out(baseline, slope, log_pi - log_p, log_ratio, valid)
        else:
            b = _as_column(baseline, weighted.shape)
        coefficients = (weighted - log_ratio.exp() * b).masked_fill(~valid, 0.0)
        finite = log_pi.isfinite() & log_q.isfinite() & (log_p < torch.inf) & coefficients.isfinite()
        finite = finite & (log_z.detach().isfinite().unsqueeze(-1) | ~valid)
        if not bool(finite.all()):
            raise ValueError(_describe_error(name, log_pi, log_q, log_p, weighted, target_log_scores, log_z, valid))
    return (coefficients * log_pi).sum(-1) / valid.sum(-1).clamp(min=1)


@torch.no_grad()
def mean_slope(
    policy_logps: Tensor, proposal_logps: Tensor, target_log_scores: Tensor, *, log_z: Tensor, divergence: str
) -> Tensor:
    r"""Estimate E_pi[f'(t)] of each prompt, minus the mean pseudo-reward, from the arguments of :func:`fdpg`.

    .. math:: \sum_i w_i f'(t_i) / \sum_i w_i, \qquad w = \pi / q

    (B,); not finite where f' is not, or log_z.

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> mean_slope(logps, logps, logps + 0.5, log_z=torch.tensor([0.5]), divergence="kl")  # at the target
    tensor([-1.])
    """
    log_t = policy_logps - target_log_scores + log_z.unsqueeze(-1)
    shares = (policy_logps - proposal_logps).log_softmax(-1)
    return DIVERGENCES[canonical_divergence_name(divergence)](log_t, shares).sum(-1)


def _leave_one_out(baseline: str, slope, log_t: Tensor, log_ratio: Tensor, valid: Tensor) -> Tensor:
    """Return the weighted mean of f' over the other valid samples of each sample's group, (B, K)."""
    if baseline != "leave_one_out":
        raise ValueError(f"baseline is {baseline!r}, expected None, 'leave_one_out', a number, or a tensor.")
    # A sum that leaves i out, not the whole minus i: the difference would lose its digits next to one large entry.
    others = valid.unsqueeze(-2) & ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)  # [b, i, j]
    log_shares = log_ratio.unsqueeze(-2).masked_fill(~others, -torch.inf).log_softmax(-1)
    b = slope(log_t.unsqueeze(-2), log_shares).masked_fill(~others, 0.0).sum(-1)
    # Beyond the dtype when every other sample is hopeless: then none. That too is decided without sample i.
    return b.masked_fill(~b.isfinite(), 0.0)


def _as_column(baseline: float | Tensor | None, shape: torch.Size) -> Tensor | float:
    """Return a baseline from outside in a shape that broadcasts to (B, K)."""
    if not isinstance(baseline, Tensor) or baseline.dim() == 0:
        return float(baseline or 0.0)
    if baseline.shape not in (shape, shape[:1]):
        raise ValueError(
            f"baseline is {tuple(baseline.shape)}, expected a number, (B,) = {tuple(shape[:1])} or "
            f"(B, K) = {tuple(shape)}."
        )
    return baseline.detach() if baseline.dim() == 2 else baseline.detach().unsqueeze(-1)


def _describe_error(name, log_pi, log_q, log_p, weighted, target_log_scores, log_z, valid) -> str:
    """Name the first cause that applies, where it was found, and how to fix it."""

    def where(wrong: Tensor) -> str:
        row, column = (wrong & valid).nonzero()[0].tolist()
        return f"row {row}, column {column}"

    bad_z = ~log_z.isfinite().unsqueeze(-1) & valid
    bad_target = (target_log_scores.isnan() | (target_log_scores == torch.inf)) & valid
    if bool(bad_z.any()):
        row = int(bad_z.any(-1).nonzero()[0])
        return (
            f"log_z of row {row} is {log_z[row].item()}, expected a finite number. -inf means that no sample met the "
            "constraints yet: mask the row until Z is known, or sample more."
        )
    for argument, logs in (("policy_logps", log_pi), ("proposal_logps", log_q)):
        if not bool(logs.isfinite().all()):
            return f"{argument} is not finite at {where(~logs.isfinite())}; set valid=False where there is no sample."
    if bool(bad_target.any()):
        return f"target_log_scores is NaN or +inf at {where(bad_target)}, expected log P, finite or -inf."
    infinite = ~weighted.isfinite() & (log_p == -torch.inf)
    if bool(infinite.any()) and bool(DIVERGENCES[name](log_p.new_tensor(torch.inf)) == torch.inf):
        return (
            f"divergence {name!r} is infinite: the policy sampled {int(infinite.sum())} completions that the target "
            f"excludes (target_log_scores -inf, the first at {where(infinite)}), where f' is +inf. Use js, kl, tv or "
            "chi2, or alpha:<a> with a < 1."
        )
    if not bool(weighted.isfinite().all()):
        wrong = ~weighted.isfinite()
        log_t = (log_pi - log_p)[wrong][0].item()
        return (
            f"(pi/q) f' of {name!r} is beyond {weighted.dtype} at {where(wrong)}, where log(pi/p) is {log_t:.4g} and "
            f"log(pi/q) {(log_pi - log_q)[wrong][0].item():.4g}. Use js or tv, whose slopes stay small, or set "
            "max_ratio if it is pi/q that is large."
        )
    return (
        "baseline, or (pi/q) times it, is not finite at a valid entry. Give finite numbers, or set max_ratio if it is "
        "pi/q that is large."
    )
