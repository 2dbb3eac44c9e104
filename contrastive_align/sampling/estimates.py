r"""Estimates of quasi-rejection sampling: acceptance rate, distance from the target and moments, from one sample set.

A sample x of the proposal q is accepted with probability min(1, P(x) / (beta q(x))), P the target's unnormalised score.
Accepted samples follow p_beta(x) = min(P(x), beta q(x)) / Z_beta: the proposal as beta -> 0, the target p = P / Z as
beta grows, with an acceptance rate of Z_beta / beta. QRS, arXiv:2112.05702.

Every number here is a mean over q, so one set of samples serves every beta. ``beta`` is in the scale of P / q, which is
unnormalised; with ``log_z`` it is in that of p / q, where beta = 1 means the same for all prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


BISECTIONS = 100
LARGEST_LOG = 600.0  # nats: exp of more is no float64


@dataclass(frozen=True)
class QRSEstimate:
    """Quasi-rejection sampling at one beta, with standard errors.

    With several prompts, rates, divergences and moments are means over prompts. Divergences and moments leave out the
    ``skipped`` prompts, for which all scores were -inf; their acceptance rate counts as 0. For an enumerated space,
    standard errors and effective sample sizes have no meaning. Where ``clipped`` is 0, no sample showed a difference,
    and the divergences are given as 0 although they are not known.
    """

    beta: float
    acceptance_rate: float  # Z_beta / beta
    acceptance_rate_se: float
    tvd: float  # total variation distance of p and p_beta, between 0 and 1
    tvd_se: float
    tvd_bound: float  # 1 - Z_beta / Z, an upper bound of tvd
    tvd_bound_se: float
    kl: float  # KL(p||p_beta), nats
    kl_se: float
    moments: list[float]  # E under p_beta of each feature; empty without features
    moments_se: list[float]
    log_z: float  # nats, a mean over prompts, in the scale that beta is in
    log_z_se: float
    log_z_beta: float
    log_z_beta_se: float
    ess: float  # effective sample size of moments: of the weights min(P, beta q) / q
    ess_target: float  # effective sample size of log_z, the divergences and the bound: of the weights P / q
    clipped: float  # the share of q with P > beta q, where p_beta differs from p
    n: int  # samples that had any weight
    skipped: int  # prompts left out


def qrs_estimates(
    target_log_scores: Tensor,
    proposal_logps: Tensor,
    betas: Sequence[float],
    *,
    log_weights: Tensor | None = None,
    features: Tensor | None = None,
    log_z: float | Tensor | None = None,
) -> list[QRSEstimate]:
    r"""Predict what quasi-rejection sampling would do at each beta.

    .. math::
        \text{acceptance} = E_q[\alpha], \quad \alpha = \min(1, r / \beta), \quad r = P / q, \quad Z = E_q[r], \quad
        Z_\beta = \beta E_q[\alpha]

        TVD(p, p_\beta) = \tfrac12 E_q |r / Z - \alpha / E_q[\alpha]| \le 1 - Z_\beta / Z

        KL(p \| p_\beta) = E_q[r / Z \cdot \max(0, \log r - \log\beta)] + \log Z_\beta - \log Z

    QRS, arXiv:2112.05702 (its estimators, there for normalised p; here Z is one of them). Standard errors by
    the delta method for ratios of means.

    Args:
        target_log_scores: (n,) nats, log P(x), -inf where a pointwise constraint fails; or (C, M), M samples for each
            of C prompts.
        proposal_logps: the same shape, nats, log q(x).
        betas: above 0, in the scale of P / q, or of p / q with ``log_z``.
        log_weights: the same shape, nats, up to a constant for each prompt. Default: equal, for samples of q. With the
            samples of another distribution s: log q - log s. With every atom of an enumerable space: log q, and all
            results are exact. -inf marks what is not there.
        features: (n, J) or (C, M, J), for the moments under p_beta.
        log_z: nats, a number or (C,): log Z as known, which normalises P. It changes the scale of beta and of the
            log Z that is returned, nothing else.

    Returns:
        One :class:`QRSEstimate` for each beta, in their order.

    Raises:
        ValueError: shapes that do not fit, NaN or +inf, a beta not above 0, or scores that are all -inf (Z = 0).

    >>> p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    >>> (estimate,) = qrs_estimates(p.log(), q.log(), [1.0], log_weights=q.log())
    >>> round(estimate.acceptance_rate, 4), round(estimate.tvd_bound, 4)
    (0.7, 0.3)
    """
    ratios = _Ratios(target_log_scores, proposal_logps, log_weights=log_weights, log_z=log_z, features=features)
    for beta in betas:
        if not 0 < beta < math.inf:
            raise ValueError(
                f"beta is {beta}, expected a number above 0. The proposal itself is the limit of small ones."
            )
    return [ratios.estimate(math.log(beta)) for beta in betas]


def choose_beta(
    target_log_scores: Tensor,
    proposal_logps: Tensor,
    *,
    acceptance: float | None = None,
    tvd: float | None = None,
    at_most: bool = False,
    **samples: Any,
) -> QRSEstimate:
    """Find the beta for a wished acceptance rate, or the least beta for a wished distance, by bisection on log beta.

    Both fall as beta grows, so the answer is unique. It is as accurate as the samples: see its standard errors. The
    beta is the ``.beta`` of the estimate returned.

    Args:
        acceptance: the wished acceptance rate, above 0.
        tvd: the wished total variation distance of p and p_beta, above 0.
        at_most: where the wished acceptance is more than there is (a pointwise constraint rules samples out at any
            beta), find the beta for all there is; above it nothing is gained, for below it p_beta does not change.
        target_log_scores, proposal_logps, **samples: see :func:`qrs_estimates`.

    Raises:
        ValueError: both wishes or none, or an acceptance rate above that of a vanishing beta (unless ``at_most``).

    >>> p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    >>> round(choose_beta(p.log(), q.log(), acceptance=0.7, log_weights=q.log()).beta, 6)
    1.0
    """
    if (acceptance is None) == (tvd is None):
        raise ValueError(f"acceptance={acceptance} and tvd={tvd}, expected exactly one of them as the wish.")
    wish = acceptance if tvd is None else tvd
    if not 0 < wish <= 1:
        raise ValueError(f"The wish {wish} is not between 0 and 1.")
    ratios = _Ratios(target_log_scores, proposal_logps, **samples)
    finite = ratios.log_r[ratios.log_r > -torch.inf]
    # Below the least ratio nothing changes any more; above the largest p_beta = p, and acceptance only shrinks.
    low, high = float(finite.min()), float(finite.max())
    if tvd is None:
        most = ratios.estimate(low)
        if wish > most.acceptance_rate + 1e-12:
            if at_most:
                return most
            raise ValueError(
                f"acceptance={wish:g} is above the highest there is, {most.acceptance_rate:.4g} at a beta of 0: the "
                "target has no mass on the other samples. Wish for less, or propose from something nearer to it."
            )
        high -= math.log(wish)  # no ratio is above the largest: at most this share is accepted there
    elif ratios.estimate(low).tvd <= wish:
        high = low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        estimate = ratios.estimate(middle)
        above = estimate.acceptance_rate > wish if tvd is None else estimate.tvd > wish
        low, high = (middle, high) if above else (low, middle)
    if abs(high) > LARGEST_LOG:
        raise ValueError(f"beta would be exp({high:.0f}), which is no float. Give log_z, so that P is normalised.")
    return ratios.estimate(high)


class _Ratios:
    """The checked samples, (C, M) in float64 on the CPU, from which the estimate at any beta is computed."""

    def __init__(
        self, target_log_scores: Tensor, proposal_logps: Tensor, *, log_weights=None, log_z=None, features=None
    ) -> None:
        shape = tuple(target_log_scores.shape)
        if len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"target_log_scores has the shape {shape}, expected (samples,) or (prompts, samples).")
        given = {"target_log_scores": target_log_scores, "proposal_logps": proposal_logps, "log_weights": log_weights}
        scores, logps, log_w = (self._checked(name, tensor, shape) for name, tensor in given.items())
        missing = log_w == -torch.inf
        if missing.all(-1).any():
            raise ValueError(f"Prompt {int(missing.all(-1).nonzero()[0])} has no sample: its log_weights are all -inf.")
        never = (logps == -torch.inf) & ~missing
        if never.any():
            raise ValueError(
                f"proposal_logps is -inf on sample {never.nonzero()[0].tolist()}, expected finite log-probs: what the "
                "proposal never draws needs a log_weight of -inf."
            )
        log_r = torch.where(missing, -torch.inf, scores - torch.where(missing, 0.0, logps))
        if log_z is not None:
            known = torch.as_tensor(log_z, dtype=torch.float64).detach().cpu().flatten()
            if len(known) not in (1, len(log_r)) or not torch.isfinite(known).all():
                raise ValueError(f"log_z is {log_z}, expected a finite number or {len(log_r)}, one for each prompt.")
            log_r = log_r - known.unsqueeze(-1)
        alive = (log_r > -torch.inf).any(-1)
        if not alive.any():
            raise ValueError(
                f"The target gives none of {int((~missing).sum())} samples any mass (all scores are -inf): Z = 0. Draw "
                "more samples, from a proposal that satisfies the pointwise constraints."
            )
        self.prompts, self.n = len(alive), int((~missing).sum())
        self.log_w, self.log_r = torch.log_softmax(log_w, -1)[alive], log_r[alive]
        self.w = self.log_w.exp()
        self.log_z = torch.logsumexp(self.log_w + self.log_r, -1)
        self.r = (self.log_r - self.log_z.unsqueeze(-1)).exp()  # r / Z, whose mean is 1
        phi = torch.zeros(*shape, 0) if features is None else features.detach().to("cpu", torch.float64)
        if tuple(phi.shape[:-1]) != shape or not torch.isfinite(phi).all():
            raise ValueError(f"features of shape {tuple(phi.shape)}, expected finite numbers of shape {(*shape, 'J')}.")
        self.features = phi.double().reshape(*log_r.shape, phi.size(-1))[alive]

    @staticmethod
    def _checked(name: str, given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.zeros(shape) if given is None else given.detach()
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape} as target_log_scores.")
        if not (tensor < torch.inf).all():
            i = (~(tensor < torch.inf)).nonzero()[0].tolist()
            raise ValueError(f"{name} is {tensor[tuple(i)].item()} on sample {i}, expected a number or -inf.")
        return torch.atleast_2d(tensor.to("cpu", torch.float64))

    def estimate(self, log_beta: float) -> QRSEstimate:
        log_accept = (self.log_r - log_beta).clamp(max=0)
        log_rate = torch.logsumexp(self.log_w + log_accept, -1)
        rate, r = log_rate.exp(), self.r
        accept = (log_accept - log_rate.unsqueeze(-1)).exp()  # alpha / E[alpha], whose mean is 1
        log_z_beta = log_beta + log_rate
        kept = (log_z_beta - self.log_z).exp()
        excess = (self.log_r - log_beta).clamp(min=0)
        sign = torch.sign(r - accept)
        gap = (r - accept).abs() / 2
        a, b, tvd = self._mean(sign * r), self._mean(sign * accept), self._mean(gap)
        kl = self._mean(r * excess)
        p_beta = self.w * accept
        moments = (p_beta.unsqueeze(-1) * self.features).sum(1)
        # The value for each prompt, and the influence of each sample on it.
        measured = {
            "acceptance_rate": (rate, _as_column(rate) * (accept - 1)),
            "tvd": (tvd, gap - _as_column(tvd) - _as_column(a) * (r - 1) / 2 + _as_column(b) * (accept - 1) / 2),
            "tvd_bound": (-torch.expm1(log_z_beta - self.log_z), _as_column(kept) * (accept - r)),
            "kl": (kl + log_z_beta - self.log_z, r * (excess - _as_column(kl)) + accept - r),
            "log_z": (self.log_z, r - 1),
            "log_z_beta": (log_z_beta, accept - 1),
        }
        found = {}
        for name, (values, influence) in measured.items():
            found[name], found[f"{name}_se"] = self._over_prompts(values, influence)
        each = [
            self._over_prompts(moments[:, j], accept * (self.features[..., j] - _as_column(moments[:, j])))
            for j in range(moments.size(1))
        ]
        c, share = len(rate), len(rate) / self.prompts
        for name in ("acceptance_rate", "acceptance_rate_se"):
            found[name] *= share
        for name in ("tvd_bound", "kl"):
            found[name] = max(found[name], 0.0)
        return QRSEstimate(
            beta=math.exp(min(log_beta, LARGEST_LOG)),
            **found,
            moments=[mean for mean, _ in each],
            moments_se=[se for _, se in each],
            ess=c**2 / float((p_beta**2).sum()),
            ess_target=c**2 / float(((self.w * r) ** 2).sum()),
            clipped=float((self.w * (excess > 0)).sum(-1).mean()) * share,
            n=self.n,
            skipped=self.prompts - c,
        )

    def _mean(self, values: Tensor) -> Tensor:
        return (self.w * values).sum(-1)

    def _over_prompts(self, values: Tensor, influence: Tensor) -> tuple[float, float]:
        """Return the mean of (C,) values over prompts and its standard error, from each sample's influence (C, M)."""
        return float(values.mean()), float((self.w * influence).norm()) / len(values)


def _as_column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)
