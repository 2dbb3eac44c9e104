r"""f-divergences between a policy pi and a target p: their slopes f'(t), t = pi / p, and their exact values.

.. math:: D_f(\pi \| p) = \sum_{x: p(x) > 0} p(x)\, f(t(x)) + f'(\infty)\, \pi(p = 0), \qquad
    \nabla D_f = E_{x \sim \pi}\big[ f'(t(x))\, \nabla \log \pi(x) \big]

f-DPG, arXiv:2302.08215, Theorem 1. The gradient asks for f' alone, and constants in f' do not matter to it.

================  =========================  =====================  ==============  ===========================
name              f'(t)                      D_f                    at p = 0        as ``alpha:<a>``
================  =========================  =====================  ==============  ===========================
``kl``            -1 / t                     KL(p || pi)            0               a = 0 (f' differs by 1)
``reverse_kl``    log t + 1                  KL(pi || p)            **+inf**        a = 1 (f' differs by 1)
``js``            log(2 t / (1 + t))         **2** JSD(pi, p)       log 2
``tv``            sign(log t) / 2            TV(pi, p)              1 / 2
``chi2``          1 - 1 / t^2                chi2(p || pi)          1               twice a = -1
``reverse_chi2``  2 (t - 1)                  chi2(pi || p)          **+inf**        twice a = 2
``alpha:<a>``     (t^(a-1) - 1) / (a - 1)    see                    1 / (1 - a),
                                             `divergence_value`     +inf for a >= 1
================  =========================  =====================  ==============  ===========================

``js`` is the one name whose slope (the paper's) is not that of the reported value: it descends twice the JSD.

Every slope takes ``log_t`` and an optional ``log_weight``, and returns exp(log_weight) f'(t). The product is formed in
log space: with a weight pi/q it stays right where the weight alone would be 0 and the slope alone infinite, as in
(pi/q) (-p/pi) = -p/q. At log_t = -inf (pi = 0) ``tv`` is -1/2, ``reverse_chi2`` -2, ``alpha:<a>`` with a > 1
-1 / (a - 1), and the others -inf.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """KL(p || pi), the objective of DPG: f'(t) = -1 / t.

    >>> kl(torch.tensor([0.0, torch.inf]))
    tensor([-1., -0.])
    """
    return -_exp(log_weight - log_t)


def reverse_kl(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """KL(pi || p), that of RL with a KL penalty: f'(t) = log t + 1. Infinite where p = 0.

    >>> reverse_kl(torch.tensor([0.0, torch.inf]))
    tensor([1., inf])
    """
    return _exp(log_weight, like=log_t) * (log_t + 1)


def js(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """Twice the Jensen-Shannon divergence: f'(t) = log(2 t / (1 + t)), at most log 2.

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
    """chi2(p || pi) = E_p[p / pi] - 1: f'(t) = 1 - 1 / t^2.

    >>> chi2(torch.tensor([0.0, torch.inf]))
    tensor([0., 1.])
    """
    return -_expm1(-2 * log_t, log_weight)


def reverse_chi2(log_t: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
    """chi2(pi || p) = E_pi[pi / p] - 1: f'(t) = 2 (t - 1). Infinite where p = 0.

    >>> reverse_chi2(torch.tensor([0.0, torch.inf]))
    tensor([0., inf])
    """
    return 2 * _expm1(log_t, log_weight)


def alpha(a: float):
    """The slope of the alpha-divergence: f'(t) = (t^(a-1) - 1) / (a - 1), and log t at a = 1.

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


class _Slopes(dict):
    def __missing__(self, name):
        """``alpha:<a>`` is a family: made when asked for, never stored, so that iterating gives the six names."""
        if isinstance(name, str) and (a := alpha_of(name)) is not None:
            return alpha(a)
        raise KeyError(name)


DIVERGENCES = _Slopes(kl=kl, reverse_kl=reverse_kl, js=js, tv=tv, chi2=chi2, reverse_chi2=reverse_chi2)

# Other people's names for the same thing.
DIVERGENCE_ALIASES = {
    "forward_kl": "kl",
    "rkl": "reverse_kl",
    "jensen_shannon": "js",
    "total_variation": "tv",
}


def canonical_divergence_name(name: str) -> str:
    """The key of ``DIVERGENCES`` that ``name`` means, whatever its case and punctuation, or ``alpha:<a>``.

    >>> canonical_divergence_name("Reverse-KL"), canonical_divergence_name("JS"), canonical_divergence_name("Alpha=.50")
    ('reverse_kl', 'js', 'alpha:0.5')
    """
    if (a := alpha_of(name)) is not None:
        return f"alpha:{int(a) if a == int(a) else a}"
    bare = _bare(name)
    for spelling, key in [*((key, key) for key in DIVERGENCES), *DIVERGENCE_ALIASES.items()]:
        if _bare(spelling) == bare:
            return key
    raise ValueError(
        f"Unknown divergence {name!r}. Known: {', '.join(DIVERGENCES)}, and alpha:<a> with a number <a>, such as "
        "alpha:0.5 or alpha:-1."
    )


def divergence(name: str):
    """f'(t) as a function of log t, by name; :func:`canonical_divergence_name` says which spellings are known.

    >>> divergence("alpha:2")(torch.tensor([0.0])), divergence("ReverseKL") is reverse_kl
    (tensor([0.]), True)
    """
    return DIVERGENCES[canonical_divergence_name(name)]


def alpha_of(name: str) -> float | None:
    """The number of ``alpha:<a>`` (also ``alpha=<a>``, ``alpha_<a>``, ``alpha <a>``); None for any other name.

    >>> alpha_of("alpha:-0.5"), alpha_of("js")
    (-0.5, None)
    """
    rest = name.strip().lower().removeprefix("alpha")
    # A separator is asked for: "alpha-2" could be read both ways.
    if rest == name.strip().lower() or rest[:1] not in (":", "=", "_", " "):
        return None
    try:
        a = float(rest[1:])
    except ValueError:
        return None
    return a if math.isfinite(a) else None


def divergence_value(name: str, log_pi: Tensor, log_p: Tensor) -> Tensor:
    r"""The exact divergence of two enumerated distributions, in nats for the two KL and for ``js``.

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
        log_pi: (..., N) log-probabilities over all N atoms; -inf for an atom that is not there.
        log_p: (..., N).

    Returns:
        (...).

    Raises:
        ValueError: an unknown name, or probabilities that do not sum to 1 (a target without its log Z taken off).

    >>> pi, p = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> divergence_value("tv", pi, p), divergence_value("kl", pi, p)
    (tensor(0.4000), tensor(0.3681))
    """
    name = canonical_divergence_name(name)
    for which, logs in (("log_pi", log_pi), ("log_p", log_p)):
        total = logs.detach().logsumexp(-1).flatten()
        wrong = ~(total.abs() < 1e-3)
        if bool(wrong.any()):
            raise ValueError(
                f"{which} holds probabilities that sum to exp({total[wrong][0].item():.6g}), expected 1. Take the "
                "logsumexp over all atoms (log Z) off first."
            )
    if name == "tv":
        return (log_pi.exp() - log_p.exp()).abs().sum(-1) / 2
    if name == "js":
        middle = torch.logaddexp(log_pi, log_p) - math.log(2)
        return (_alpha_terms(0.0, middle, log_pi) + _alpha_terms(0.0, middle, log_p)).sum(-1) / 2
    a = {"kl": 0.0, "reverse_kl": 1.0, "chi2": -1.0, "reverse_chi2": 2.0}.get(name, alpha_of(name))
    scale = 2 if name in ("chi2", "reverse_chi2") else 1
    return scale * _alpha_terms(a, log_pi, log_p).sum(-1)


def _alpha_terms(a: float, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """(pi^a p^(1-a) - a pi - (1-a) p) / (a (a-1)), which is at least 0, atom by atom; the limits at a = 0 and 1."""
    if a > 0.5:  # the two sides swap as a -> 1 - a; below, only a near 0 has to be handled with care
        return _alpha_terms(1 - a, log_p, log_pi)
    absent = log_p == -torch.inf
    weight, log_t = log_p.masked_fill(absent, 0.0), (log_pi - log_p).masked_fill(absent, 0.0)
    # (t^a - 1) / a, times p; at a = 0, log t.
    powers = weight.exp() * log_t if a == 0 else _expm1(a * log_t, weight) / a
    terms = (powers - _expm1(log_t, weight)) / (a - 1)
    return torch.where(absent, log_pi.exp() / (1 - a), terms)


def _bare(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _exp(x: Tensor | float, like: Tensor | None = None) -> Tensor:
    """exp, also of the plain number that a slope's ``log_weight`` may be."""
    return torch.exp(x if isinstance(x, Tensor) else torch.full_like(like, x))


def _expm1(x: Tensor, log_weight: Tensor | float) -> Tensor:
    """exp(log_weight) (e^x - 1): exact near x = 0, and finite wherever the product is."""
    # exp(log_weight) alone may be 0 where e^x is infinite; the clamps keep the branch not taken free of NaN.
    above = -_exp(log_weight + x.clamp(min=0)) * torch.expm1(-x.clamp(min=0))
    below = _exp(log_weight, like=x) * torch.expm1(x.clamp(max=0))
    return torch.where(x > 0, above, below)
