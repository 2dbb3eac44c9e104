"""f-DPG: the importance-weighted surrogate whose gradient descends an f-divergence to a target distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contrastive_align.losses.divergences import canonical_divergence_name
from contrastive_align.losses.divergences import divergence as slope_of


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
    r"""f-DPG on samples y_1 .. y_K of a proposal q: a surrogate with the gradient of D_f(pi || p), p = P / Z.

    .. math:: \frac{1}{K} \sum_i \frac{\pi(y_i)}{q(y_i)} \big( f'(t_i) - b_i \big) \log \pi(y_i), \qquad
        t_i = \frac{\pi(y_i)}{P(y_i) / Z}

    with everything but the last log pi held constant. f-DPG, arXiv:2302.08215, Theorem 1, under importance weights
    (GDC, arXiv:2012.11635); one Z for each prompt as in CDPG, arXiv:2112.00791. Only the gradient has a meaning: the
    value is no divergence. To measure one, see :mod:`contrastive_align.losses.estimators`.

    The gradient is unbiased for every baseline b_i that does not depend on y_i, since E_q[(pi/q) b grad log pi] = 0.
    ``"leave_one_out"`` is the mean of f' over the other valid samples of the group, weighted by their pi/q:

    .. math:: b_i = \frac{\sum_{j \ne i} w_j f'(t_j)}{\sum_{j \ne i} w_j}, \qquad w = \pi / q

    an estimate of E_pi[f'], which is -1 for ``kl``, the baseline of arXiv:2206.00761. Divided by the
    sum of the weights it takes off every constant in f' exactly; divided by K - 1 it would be as unbiased, but take off
    a random share of it, and off-policy have many times the variance. A sample without another gets 0. ``js``, ``tv``
    and the two chi2 have slopes around 0 near the target: there it gains nothing and costs variance when K is small.

    Args:
        policy_logps: (B, K) nats, log pi(y|x) summed over the completion's tokens. The only input with a gradient.
        proposal_logps: (B, K) nats, log q(y|x) of what the completions were sampled from; the policy's own when online.
        target_log_scores: (B, K) nats, log P(y|x), not normalised; -inf where a pointwise constraint is violated.
        log_z: (B,) nats, log of the sum of P over all completions of the prompt.
        divergence: a name in ``DIVERGENCES`` or ``alpha:<a>``.
        baseline: None, ``"leave_one_out"``, or numbers from outside: a float, (B,) or (B, K); these are as unbiased as
            they are independent of the sample they are taken off from.
        valid: (B, K) bool; a False entry is as good as not there, and a row without any gives 0.
        max_ratio: pi/q is cut at this value. Cutting trades variance for a bias, also with a baseline.

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
        weighted = slope_of(name)(log_pi - log_p, log_ratio).masked_fill(~valid, 0.0)
        if isinstance(baseline, str):
            b = _leave_one_out(baseline, slope_of(name), log_pi - log_p, log_ratio, valid)
        else:
            b = _given(baseline, weighted.shape)
        coefficients = (weighted - log_ratio.exp() * b).masked_fill(~valid, 0.0)
        finite = log_pi.isfinite() & log_q.isfinite() & (log_p < torch.inf) & coefficients.isfinite()
        finite = finite & (log_z.detach().isfinite().unsqueeze(-1) | ~valid)
        if not bool(finite.all()):
            raise ValueError(_what_is_wrong(name, log_pi, log_q, log_p, weighted, target_log_scores, log_z, valid))
    return (coefficients * log_pi).sum(-1) / valid.sum(-1).clamp(min=1)


@torch.no_grad()
def mean_slope(
    policy_logps: Tensor,
    proposal_logps: Tensor,
    target_log_scores: Tensor,
    *,
    log_z: Tensor,
    divergence: str,
) -> Tensor:
    r"""E_pi[f'(t)] of each prompt, from the samples of :func:`fdpg`: minus the mean pseudo-reward.

    .. math:: \sum_i w_i f'(t_i) / \sum_i w_i, \qquad w = \pi / q

    Args: as in :func:`fdpg`.

    Returns:
        (B,); not finite where f' is not, or log_z.

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> mean_slope(logps, logps, logps + 0.5, log_z=torch.tensor([0.5]), divergence="kl")  # at the target
    tensor([-1.])
    """
    log_t = policy_logps - target_log_scores + log_z.unsqueeze(-1)
    shares = (policy_logps - proposal_logps).log_softmax(-1)
    return slope_of(canonical_divergence_name(divergence))(log_t, shares).sum(-1)


def _leave_one_out(baseline: str, slope, log_t: Tensor, log_ratio: Tensor, valid: Tensor) -> Tensor:
    """(B, K)."""
    if baseline != "leave_one_out":
        raise ValueError(f"baseline is {baseline!r}, expected None, 'leave_one_out', a number, or a tensor.")
    # A sum that leaves i out, not the whole minus i: the difference would lose its digits next to one large entry.
    others = valid.unsqueeze(-2) & ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)  # [b, i, j]
    log_shares = log_ratio.unsqueeze(-2).masked_fill(~others, -torch.inf).log_softmax(-1)
    b = slope(log_t.unsqueeze(-2), log_shares).masked_fill(~others, 0.0).sum(-1)
    # Beyond the dtype when every other sample is hopeless: then none. That too is decided without sample i.
    return b.masked_fill(~b.isfinite(), 0.0)


def _given(baseline: float | Tensor | None, shape: torch.Size) -> Tensor | float:
    """A baseline from outside, as it broadcasts to (B, K)."""
    if baseline is None:
        return 0.0
    if not isinstance(baseline, Tensor) or baseline.dim() == 0:
        return float(baseline)
    if baseline.shape not in (shape, shape[:1]):
        raise ValueError(
            f"baseline is {tuple(baseline.shape)}, expected a number, (B,) = {tuple(shape[:1])} or "
            f"(B, K) = {tuple(shape)}."
        )
    return baseline.detach() if baseline.dim() == 2 else baseline.detach().unsqueeze(-1)


def _what_is_wrong(
    name: str,
    log_pi: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    weighted: Tensor,
    target_log_scores: Tensor,
    log_z: Tensor,
    valid: Tensor,
) -> str:
    """The first cause that applies, with where it was found and the way out."""

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
            return f"{argument} is not finite at {where(~logs.isfinite())}; mark what is no sample with valid=False."
    if bool(bad_target.any()):
        return f"target_log_scores is NaN or +inf at {where(bad_target)}, expected log P, finite or -inf."
    infinite = ~weighted.isfinite() & (log_p == -torch.inf)
    if bool(infinite.any()) and bool(slope_of(name)(log_p.new_tensor(torch.inf)) == torch.inf):
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
