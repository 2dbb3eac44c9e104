r"""Estimates from samples: log Z, divergences and moments, each with its standard error and effective sample size.

Every function takes K samples y_1 .. y_K of a proposal q for each of B prompts, and returns one estimate per prompt.
Log-probs are (B, K) nats, summed over the completion's tokens: ``policy_logps`` of the policy pi, ``proposal_logps`` of
q, which is the policy when online, and ``target_log_scores`` of P, not normalised, p = P / Z, -inf where a constraint
is violated. ``log_z`` (B,) is log Z if known better than from these samples, and taken as exact. ``valid`` (B, K) is
False where there is no sample.

Samples of one distribution without prompts are one row: (1, n). Nothing here has a gradient. Standard errors are the
delta method's: they include the noise of Z and of self-normalisation where these come from the same samples. They hold
when the effective sample size is large (hundreds); when it is a few, value and error are both too small, for what was
not sampled cannot be seen. Where a value is a ratio or a logarithm of means over K samples, its bias of first order in
1 / K is taken off (``correct_bias=False`` leaves it), so that more prompts make the mean over prompts more exact. A row
without a sample that carries weight gives nan with ess 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_align.losses.divergences import canonical_divergence_name


class Estimate(NamedTuple):
    """A value, its standard error, and its effective sample size (sum w)^2 / sum w^2.

    Where two sets of weights enter (to the policy and to the target) ``ess`` is the smaller one.
    """

    value: Tensor
    se: Tensor
    ess: Tensor


SPLITS = 4  # in how many ways the samples are halved


def without_bias(estimate: Callable[[Tensor | None], Estimate], valid: Tensor | None, like: Tensor) -> Estimate:
    r"""Take off the bias of first order in 1 / K, from estimates on halves of the samples.

    .. math:: \hat\theta - b / K \text{ with } \hat b / K = \overline{\hat\theta_{\text{half}}} - \hat\theta, \qquad
        E[\hat\theta_K] \approx \theta + b / K

    Half the samples have twice the bias. The jackknife in its first form, Quenouille (1949): a half moves log Z by as
    much as its noise, which the kinks of ``tv`` need. The split goes by a sample's place among the valid ones. A value
    whose halves are not finite stays as it is; the standard error is that of all samples.

    Args:
        estimate: on the samples of a mask (B, K).
        valid: the mask of all samples, or None.
        like: (B, K).
    """
    whole = estimate(valid)
    valid = torch.ones_like(like, dtype=torch.bool) if valid is None else valid
    place, n = valid.cumsum(-1) - 1, valid.sum(-1)
    total, splits = torch.zeros_like(whole.value), torch.zeros_like(whole.value)
    for split in range(SPLITS):
        odd = (place >> split) % 2 == 1
        mean = torch.zeros_like(whole.value)
        for half in (valid & odd, valid & ~odd):
            share = half.sum(-1).to(mean.dtype) / n.clamp(min=1)
            mean = mean + estimate(half).value * share.reshape(-1, *[1] * (mean.dim() - 1))
        total, splits = total + torch.where(mean.isfinite(), mean, 0.0), splits + mean.isfinite()
    known = (splits > 0) & whole.value.isfinite()
    return whole._replace(value=torch.where(known, 2 * whole.value - total / splits.clamp(min=1), whole.value))


def estimate_log_z(
    proposal_logps: Tensor,
    target_log_scores: Tensor,
    *,
    valid: Tensor | None = None,
    correct_bias: bool = True,
) -> Estimate:
    r"""Estimate log Z of each prompt.

    .. math:: \log \hat Z = \log \frac{1}{K} \sum_i \frac{P(y_i)}{q(y_i)}

    CDPG, arXiv:2112.00791. Z itself is unbiased; its log is low by about se^2 / 2, which is taken off unless
    ``correct_bias`` is False: weights whose mean over these samples is to be 1 need the plain one.
    -inf, with ess 0, where no sample meets the constraints.

    >>> estimate_log_z(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, -torch.inf]])).value
    tensor([0.3069])
    """
    if correct_bias:
        return without_bias(
            lambda part: estimate_log_z(proposal_logps, target_log_scores, valid=part, correct_bias=False),
            valid,
            proposal_logps,
        )
    log_q, log_target, valid = _prepare(valid, proposal_logps, target_log_scores)
    log_u = (log_target - log_q).masked_fill(~valid, -torch.inf)
    n, ess = valid.sum(-1), _ess(log_u)
    log_z = _log_mean_exp(log_u, n)
    u = _normalised(log_u, n)
    value = log_z.masked_fill(n == 0, torch.nan)
    return Estimate(value, _standard_error(u - 1, valid).masked_fill(ess == 0, torch.nan), ess)


def estimate_divergence(
    divergence: str,
    policy_logps: Tensor,
    proposal_logps: Tensor,
    target_log_scores: Tensor,
    *,
    log_z: Tensor | None = None,
    valid: Tensor | None = None,
    correct_bias: bool = True,
) -> Estimate:
    r"""KL(p || pi) (``kl``), KL(pi || p) (``reverse_kl``), TV (``tv``) or JSD (``js``) of each prompt, in nats.

    With u = P / (Z q) and w = pi / q, and means over the samples:

    .. math:: \text{kl} = \overline{u \log (u / w)} \quad
        \text{reverse\_kl} = \overline{w \log (w / u)}\, / \,\overline{w} \quad
        \text{tv} = \tfrac12 \overline{|w - u|}

    .. math:: \text{js} = \tfrac12 \overline{w \log \tfrac{2 w}{w + u} + u \log \tfrac{2 u}{w + u}}

    GDC, arXiv:2012.11635, estimates kl so; the others are their definitions under the same importance sampling. ``js``
    is the usual JSD, at most log 2. Z comes from the same samples unless ``log_z`` is given. reverse_kl is
    self-normalised: else the noise of the mean of w would be multiplied by the divergence, which may be tens of nats.
    It is +inf, as the divergence is, if a sample is one that the target excludes.

    Raises:
        ValueError: another divergence. The two chi2 and the alpha family have estimators too noisy to be reported.

    >>> logps = torch.tensor([[-0.5, -1.0]])
    >>> estimate_divergence("tv", logps, logps, logps - 3.0).value  # P = pi / e^3: p is pi
    tensor([0.])
    """
    name = canonical_divergence_name(divergence)
    if name not in ("kl", "reverse_kl", "tv", "js"):
        raise ValueError(
            f"{name} is not estimated from samples (its estimator has too heavy tails). Use kl, reverse_kl, tv or js, "
            "or divergence_value where all atoms can be enumerated."
        )
    logs = (policy_logps, proposal_logps, target_log_scores)
    if correct_bias:
        return without_bias(
            lambda part: estimate_divergence(name, *logs, log_z=log_z, valid=part, correct_bias=False), valid, logs[0]
        )
    log_pi, log_q, log_target, valid = _prepare(valid, *logs)
    if log_z is not None and log_z.shape != valid.shape[:1]:
        raise ValueError(f"log_z is {tuple(log_z.shape)}, expected {tuple(valid.shape[:1])}: one for each prompt.")
    n = valid.sum(-1)
    log_w = (log_pi - log_q).masked_fill(~valid, -torch.inf)
    log_v = (log_target - log_q).masked_fill(~valid, -torch.inf)
    estimated = log_z is None
    # u has mean 1 over the samples where Z is theirs.
    log_z = _log_mean_exp(log_v, n) if estimated else log_z.detach().to(log_v.dtype)
    log_u = (log_v - log_z.unsqueeze(-1)).masked_fill(log_v == -torch.inf, -torch.inf)
    neither = (log_pi == -torch.inf) & (log_target == -torch.inf)
    log_t = (log_pi - log_target).masked_fill(~valid | neither, 0.0) + log_z.unsqueeze(-1)
    u, w = log_u.exp(), log_w.exp()

    # h is the average's summand; dh is u dh/du: shifting log Z by e shifts the average by -mean(dh) e.
    if name == "reverse_kl":
        return _reverse_kl(log_w, log_t, valid, log_u if estimated else None)
    if name == "kl":
        h = -_times(u, log_t)
        dh, ess = h + u, _ess(log_u)
    elif name == "tv":
        h = (torch.maximum(log_w, log_u)).exp() * -torch.expm1(-log_t.abs()) / 2
        dh, ess = -log_t.sign() * u / 2, torch.minimum(_ess(log_u), _ess(log_w))
    else:
        from_p = _times(u, F.logsigmoid(-log_t) + math.log(2))
        h = (_times(w, F.logsigmoid(log_t) + math.log(2)) + from_p) / 2
        dh, ess = from_p / 2, torch.minimum(_ess(log_u), _ess(log_w))
    h, dh = h.masked_fill(~valid, 0.0), dh.masked_fill(~valid, 0.0)
    value, shift = h.sum(-1) / n, dh.sum(-1) / n
    influence = h - value.unsqueeze(-1)
    if estimated:
        influence = influence - shift.unsqueeze(-1) * (u - 1)
    return _unless_empty(value, influence, valid, ess)


def estimate_kl_base(
    policy_logps: Tensor,
    base_logps: Tensor,
    *,
    proposal_logps: Tensor | None = None,
    valid: Tensor | None = None,
    correct_bias: bool = True,
) -> Estimate:
    r"""Estimate KL(pi || a) of each prompt, the distance in nats of the policy from its base a.

    .. math:: \overline{w \log (\pi / a)}\, / \,\overline{w}, \qquad w = \pi / q

    ``base_logps`` are log a(y|x), (B, K) nats. Without ``proposal_logps`` the policy is the proposal, w = 1.

    >>> estimate_kl_base(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])).value
    tensor([0.5000])
    """
    proposal_logps = policy_logps if proposal_logps is None else proposal_logps
    if correct_bias:
        options = {"proposal_logps": proposal_logps, "correct_bias": False}
        return without_bias(
            lambda part: estimate_kl_base(policy_logps, base_logps, valid=part, **options), valid, policy_logps
        )
    log_pi, log_q, log_a, valid = _prepare(valid, policy_logps, proposal_logps, base_logps)
    log_w = (log_pi - log_q).masked_fill(~valid, -torch.inf)
    log_t = (log_pi - log_a).masked_fill(~valid, 0.0)
    return _reverse_kl(log_w, log_t, valid, None)


def estimate_moments(
    features: Tensor,
    log_scores: Tensor,
    proposal_logps: Tensor,
    *,
    valid: Tensor | None = None,
    correct_bias: bool = True,
) -> Estimate:
    r"""Estimate the mean of features under the policy or the target, self-normalised, for each prompt.

    .. math:: \hat\mu = \frac{\sum_i v_i\, \phi(y_i)}{\sum_i v_i}, \qquad
        v_i = \frac{e^{\text{log\_scores}_i}}{q(y_i)}

    Self-normalised importance sampling as in GDC, arXiv:2012.11635.

    Args:
        features: (B, K), or (B, K, F) for several at once.
        log_scores: (B, K) nats: ``policy_logps`` for the moments under pi, ``target_log_scores`` for those under p,
            the base's log-probabilities for those under the base. Its normaliser does not matter.

    Returns:
        value and se (B,) or (B, F); ess (B,).

    >>> phi, logps = torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3)
    >>> estimate_moments(phi, torch.tensor([[0.0, -torch.inf, -torch.inf]]), logps)
    Estimate(value=tensor([1.]), se=tensor([0.]), ess=tensor([1.]))
    """
    if correct_bias:
        logs = (log_scores, proposal_logps)
        return without_bias(
            lambda part: estimate_moments(features, *logs, valid=part, correct_bias=False), valid, proposal_logps
        )
    log_s, log_q, valid = _prepare(valid, log_scores, proposal_logps)
    if features.shape[:2] != valid.shape or features.dim() > 3:
        raise ValueError(f"features are {tuple(features.shape)}, expected {tuple(valid.shape)} or one more dimension.")
    log_v = (log_s - log_q).masked_fill(~valid, -torch.inf)
    n, ess = valid.sum(-1), _ess(log_v)
    single = features.dim() == 2
    phi = features.detach().unsqueeze(-1) if single else features.detach()
    phi = phi.to(log_v.dtype).masked_fill(~valid.unsqueeze(-1), 0.0)
    v = _normalised(log_v, n).unsqueeze(-1)
    value = (v * phi).sum(-2) / n.unsqueeze(-1)
    influence = v * (phi - value.unsqueeze(-2))
    se = _standard_error(influence.transpose(-1, -2), valid.unsqueeze(-2))
    nothing = (ess == 0).unsqueeze(-1)
    value, se = value.masked_fill(nothing, torch.nan), se.masked_fill(nothing, torch.nan)
    return Estimate(value.squeeze(-1) if single else value, se.squeeze(-1) if single else se, ess)


def average_estimate(estimate: Estimate) -> Estimate:
    r"""Average the estimates of prompts: 0-dimensional, or (F,) for several features.

    The standard error is that of the spread between prompts, which are a sample themselves; it contains the noise
    within each. From a single prompt only that noise is known. Prompts with ess 0 are left out; ``ess`` is the sum.

    >>> average_estimate(Estimate(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.1]), torch.tensor([10.0, 20.0])))
    Estimate(value=tensor(2.), se=tensor(1.), ess=tensor(30.))
    """
    known = estimate.ess > 0
    values, n = estimate.value[known], int(known.sum())
    if n == 0:
        nothing = estimate.value.new_full(estimate.value.shape[1:], torch.nan)
        return Estimate(nothing, nothing, estimate.ess.sum())
    se = estimate.se[known][0] if n == 1 else values.std(0) / math.sqrt(n)
    return Estimate(values.mean(0), se, estimate.ess.sum())


class RunningLogZ:
    r"""A running estimate of log Z for each prompt c: the mean of P(y|c) / q(y|c) over all samples y ~ q seen so far.

    .. math:: Z_c = E_{y \sim q}\big[P(y|c) / q(y|c)\big]

    GDC, arXiv:2012.11635, and one Z for each prompt, CDPG, arXiv:2112.00791. The mean is unbiased although q moves,
    since each sample is weighted by the proposal it was drawn from. Kept in log space.

    >>> z = RunningLogZ()
    >>> z.add([("hello", torch.tensor([0.0, -torch.inf]))])  # log P - log q of two samples
    >>> round(math.exp(z["hello"]), 3)
    0.5
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, groups: Iterable[tuple[str, Tensor]]) -> None:
        """Add samples: pairs of a prompt's key and the (K,) nats log P - log q of its samples."""
        for key, log_weights in groups:
            log_sum, n = self._sums.get(key, (-math.inf, 0))
            both = torch.cat([log_weights.double().cpu(), torch.tensor([log_sum], dtype=torch.float64)])
            self._sums[key] = (both.logsumexp(0).item(), n + len(log_weights))

    def __getitem__(self, key: str) -> float:
        log_sum, n = self._sums[key]
        return log_sum - math.log(n)

    def __contains__(self, key: str) -> bool:
        return key in self._sums

    def of(self, keys: Sequence[str]) -> Tensor:
        """Return log Z of B prompts: (B,) float64 nats, -inf where the target allows none of a prompt's samples."""
        return torch.tensor([self[key] for key in keys], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return the log-sums and counts, for a checkpoint."""
        return {key: list(pair) for key, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._sums = {key: (float(log_sum), int(n)) for key, (log_sum, n) in state.items()}


def _reverse_kl(log_w: Tensor, log_t: Tensor, valid: Tensor, log_u: Tensor | None) -> Estimate:
    """Self-normalised mean of log_t under w. ``log_u`` is given when log_t holds a log Z with the noise of these u."""
    n, ess = valid.sum(-1), _ess(log_w)
    w = _normalised(log_w, n)
    value = _times(w, log_t).sum(-1) / n
    # w may underflow to 0, but a policy that can sample where P = 0 is infinitely far, however rarely it does.
    value = value.masked_fill(((log_t == torch.inf) & (log_w > -torch.inf) & valid).any(-1), torch.inf)
    influence = _times(w, log_t - value.unsqueeze(-1))
    if log_u is not None:
        influence, ess = influence + (log_u.exp() - 1), torch.minimum(ess, _ess(log_u))
    return _unless_empty(value, influence, valid, ess)


def _prepare(valid: Tensor | None, *logs: Tensor) -> list[Tensor]:
    """Detached, at least float32 (sums over many samples), 0 where not valid; and the mask."""
    for tensor in logs:
        if tensor.dim() != 2 or tensor.shape != logs[0].shape:
            raise ValueError(f"found shapes {[tuple(t.shape) for t in logs]}, expected (B, K), the same for each.")
    valid = torch.ones_like(logs[0], dtype=torch.bool) if valid is None else valid
    precise = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).masked_fill(~valid, 0.0) for t in logs]
    return [*precise, valid]


def _normalised(log_weights: Tensor, n: Tensor) -> Tensor:
    """Weights with mean 1 over the n valid samples; all 0 where there is no weight."""
    weights = torch.softmax(log_weights, -1) * n.unsqueeze(-1)
    return weights.masked_fill((log_weights == -torch.inf).all(-1, keepdim=True), 0.0)


def _log_mean_exp(log_weights: Tensor, n: Tensor) -> Tensor:
    return log_weights.logsumexp(-1) - n.to(log_weights.dtype).log()


def _ess(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last dimension; 0 where all weights are."""
    log_ess = 2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)
    return log_ess.exp().masked_fill((log_weights == -torch.inf).all(-1), 0.0)


def _standard_error(influence: Tensor, valid: Tensor) -> Tensor:
    """Of a mean over the valid samples, from each sample's influence on it (mean 0); nan for a single sample."""
    n = valid.sum(-1)
    return (influence.masked_fill(~valid, 0.0).square().sum(-1) / (n * (n - 1))).sqrt()


def _unless_empty(value: Tensor, influence: Tensor, valid: Tensor, ess: Tensor) -> Estimate:
    se = _standard_error(influence, valid).masked_fill(~value.isfinite(), torch.nan)
    return Estimate(value.masked_fill(ess == 0, torch.nan), se.masked_fill(ess == 0, torch.nan), ess)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply; 0 where the weight is 0, also when x is infinite."""
    return torch.where(weight == 0, 0.0, weight * x)
