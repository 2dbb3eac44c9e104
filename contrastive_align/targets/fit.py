"""The fit of lambda to moments: damped Newton on the convex dual, in float64 log space, over weighted samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from contrastive_align.targets.reachable import EDGE, InfeasibleMoment, Reach


logger = logging.getLogger(__name__)

LARGEST_STEP = 10.0  # nats, over the range of a feature: Newton's own first step can be thousands
NULL = 1e-12  # the least variance that a step is divided by
PER_PROMPT = 32  # samples of each prompt that a fit begins with
PROMPTS_AT_ONCE = 8
BIAS_BESIDE_ERROR = 3.0  # the first-order bias is taken off; beyond a third of the error, what is left of it counts


@dataclass(frozen=True)
class Fit:
    """The result of :func:`fit_lambdas` for J features and C prompts, in float64.

    Standard errors are those of samples; for an enumerated space they have no meaning. They hold for the given prompts,
    and with ``population`` for all prompts of which these are a random choice. ``log_z`` is
    log E_a[b exp(lambda . phi)] for each prompt: -inf where no sample satisfied a pointwise constraint, NaN where the
    prompt has no sample.
    """

    lambdas: Tensor  # (J,) nats per unit of the feature
    moments: Tensor  # (J,) wanted
    achieved: Tensor  # (J,) mean_c E_p[phi | c] on the samples, less its estimated bias if that was corrected
    bias: Tensor  # (J,) estimated, of the samples' moments; 0 without correct_bias
    base_moments: Tensor  # (J,) the same at lambda = 0
    moment_se: Tensor  # (J,) of achieved at these lambdas, by the delta method for ratios
    lambda_se: Tensor  # (J,) H^-1 V H^-1, with V the covariance of achieved and H that of phi under p
    log_z: Tensor  # (C,) nats
    log_z_se: Tensor  # (C,)
    ess: float  # effective sample size of achieved: C^2 / sum_c (1 / ess_c), which for one prompt is ess_c
    ess_per_prompt: Tensor  # (C,) 1 / sum of the squared normalised weights
    iterations: int  # Newton steps
    converged: bool  # always True; a fit that does not converge raises
    samples: int  # how many had any weight
    skipped: list[int] = field(default_factory=list)  # the prompts whose samples all had no weight

    @property
    def residual(self) -> Tensor:
        """(J,) achieved - wanted."""
        return self.achieved - self.moments

    @property
    def biased(self) -> Tensor:
        """(J,) whether the samples of a prompt are too few: the corrected bias is not small beside the error."""
        return self.bias.abs() > self.moment_se / BIAS_BESIDE_ERROR


def fit_lambdas(
    phi: Tensor,
    moments: Tensor | Sequence[float],
    *,
    log_weights: Tensor | None = None,
    log_b: Tensor | None = None,
    valid: Tensor | None = None,
    names: Sequence[str] | None = None,
    min_ess: float = 20.0,
    correct_bias: bool = False,
    population: float | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 200,
    progress: Callable[[int, dict[str, Any]], None] | None = None,
) -> Fit:
    r"""Find the lambdas at which p(x|c) = a(x|c) b(x) exp(lambda . phi(x)) / Z_c has the wanted moments.

    .. math:: \lambda = \arg\min\ \mathrm{mean}_c \log Z_c(\lambda) - \lambda \cdot \bar\mu, \qquad
        Z_c(\lambda) = \sum_m \tilde w_{cm}\, b_{cm}\, e^{\lambda \cdot \phi_{cm}}

    The dual of the information projection: GDC, arXiv:2012.11635 (there minimised by SGD over
    self-normalised importance weights); one lambda for all prompts as in CDPG, arXiv:2112.00791. The gradient is
    mean_c E_p[phi|c] - mu, the Hessian mean_c Cov_p[phi|c], so Newton needs a dozen steps. With one binary feature of
    base rate mu0, lambda = logit(mu) - logit(mu0).

    E_p[phi|c] is a ratio of two means over M samples, and biased by O(1/M) towards what the base has: more prompts do
    not reduce it, and the size of lambda comes out too large. ``correct_bias`` subtracts the leading term by one more
    step:

    .. math:: E[\hat m_c] - m_c \approx -\sum_m p_{cm}^2\, (\phi_{cm} - \hat m_c), \qquad
        \hat m_c = \sum_m p_{cm}\, \phi_{cm}

    which is the delta method for a self-normalised mean, and to this order the jackknife over a prompt's samples.

    Args:
        phi: (C, M, J) features of M samples for each of C prompts; C = 1 where there are no prompts.
        moments: (J,) the wanted moments, each a mean over prompts.
        log_weights: (C, M) nats, log a(x|c) - log q(x|c) for samples of a proposal q, up to a constant per prompt
            (the weights are normalised within a prompt). Default: samples of the base, all weights equal. Every atom
            of an enumerable space weighted by log a(x|c) makes the result exact; then set ``min_ess=0``.
        log_b: (C, M) 0 or -inf: pointwise constraints.
        valid: (C, M) bool: False marks a sample that is not there (other numbers of samples per prompt).
        names: of the features, for error messages.
        min_ess: the smallest effective sample size that is accepted.
        correct_bias: for samples, not for an enumerated space. The residual is then of second order instead of 0.
        population: the number of prompts from which the C prompts are a random choice (infinite for a stream). The
            standard errors of moments and lambdas then include the spread between prompts. None: there are no others.
        tolerance: on the residuals, relative to the range of each feature.
        progress: called with the iteration and a dict of ``dual``, ``residual`` (J,) and ``ess``.

    Returns:
        :class:`Fit`.

    Raises:
        InfeasibleMoment: outside or on the edge of the samples' range, alone or together with the others; a constant
            feature; an effective sample size under ``min_ess``; no sample with any weight.
        ValueError: shapes that do not fit, values that are NaN.

    >>> phi = torch.tensor([[[0.0], [1.0]]])
    >>> fit = fit_lambdas(phi, [0.5], log_weights=torch.tensor([[0.93, 0.07]]).log(), min_ess=0)
    >>> round(fit.lambdas.item(), 5)
    2.58669
    """
    phi, mu, log_w, log_b, names = _check_arguments(phi, moments, log_weights, log_b, valid, names)
    sampled, log_prior = (log_w > -torch.inf).any(-1), log_w + log_b
    alive = (log_prior > -torch.inf).any(-1)
    if not alive.any():
        raise InfeasibleMoment(
            f"None of {int((log_w > -torch.inf).sum())} samples satisfies the pointwise constraints: Z = 0. Draw more "
            "samples, from a proposal that satisfies them more often."
        )
    phi, log_w, log_prior = phi[alive], log_w[alive], log_prior[alive]
    c, reach = len(phi), Reach(phi, mu, log_prior > -torch.inf, names)
    basis = reach.varying_directions()
    theta, iterations = _newton(reach, basis, log_prior, tolerance, max_iterations, progress)
    if correct_bias:
        x = reach.x @ basis
        p = torch.softmax(log_prior + x @ theta, -1)
        theta = theta + torch.linalg.pinv(_scatter(x, p, p), hermitian=True) @ _bias(x, p)

    lambdas = basis @ theta / reach.scale
    p = torch.softmax(log_prior + reach.x @ (basis @ theta), -1)
    ess = c**2 / float((p**2).sum())
    if len(mu) and ess < min_ess:
        raise InfeasibleMoment(_describe_low_ess(ess, min_ess, reach, torch.softmax(log_prior, -1)))
    precision = torch.linalg.pinv(_scatter(reach.x @ basis, p, p), hermitian=True)
    se_basis = basis @ precision
    noise = _scatter(reach.x, p, p**2 / c)
    if population is not None and c > 1:
        means = (p.unsqueeze(-1) * reach.x).sum(1)
        noise = noise * c / population + torch.cov(means.T).reshape(noise.shape) / c * (1 - c / population)
    bias = _bias(phi, p) if correct_bias else torch.zeros_like(mu)
    lambda_cov = se_basis @ (basis.T @ noise @ basis) @ se_basis.T
    log_z = torch.full(alive.shape, torch.nan, dtype=torch.float64).masked_fill(sampled, -torch.inf)
    log_z_se, per_prompt = torch.full_like(log_z, torch.nan), torch.zeros_like(log_z)
    log_z[alive] = torch.logsumexp(log_prior + phi @ lambdas, -1)
    log_z_se[alive] = ((p - log_w.exp()) ** 2).sum(-1).sqrt()
    per_prompt[alive] = 1 / (p**2).sum(-1)
    return Fit(
        lambdas=lambdas,
        moments=mu,
        achieved=_moments(phi, p) - bias,
        bias=bias,
        base_moments=_moments(phi, torch.softmax(log_prior, -1)),
        moment_se=noise.diagonal().sqrt() * reach.scale,
        lambda_se=lambda_cov.diagonal().clamp(min=0).sqrt() / reach.scale,
        log_z=log_z,
        log_z_se=log_z_se,
        ess=ess,
        ess_per_prompt=per_prompt,
        iterations=iterations,
        converged=True,
        samples=int((log_prior > -torch.inf).sum()),
        skipped=(~alive).nonzero().flatten().tolist(),
    )


def _newton(
    reach: Reach, basis: Tensor, log_prior: Tensor, tolerance: float, max_iterations: int, progress: Callable | None
) -> tuple[Tensor, int]:
    """Return theta (R,), lambda in the basis of the varying directions, and the number of steps, or raise."""
    x = reach.x @ basis
    theta = x.new_zeros(basis.size(1))

    def dual(theta: Tensor) -> tuple[float, Tensor]:
        energies = log_prior + x @ theta
        return float(torch.logsumexp(energies, -1).mean()), torch.softmax(energies, -1)

    value, p = dual(theta)
    for iteration in range(max_iterations + 1):
        residual = _moments(reach.x, p)  # wanted: 0
        ess = len(p) ** 2 / float((p**2).sum())
        logger.info(f"lambda, step {iteration}: dual {value:.6f}, residual {_largest(residual):.2e}, ESS {ess:.1f}")
        if progress is not None:
            progress(iteration, {"dual": value, "residual": residual * reach.scale, "ess": ess})
        hessian = _scatter(x, p, p)
        if _largest(residual) <= tolerance:
            # On the edge lambda is infinite, and what is left of the variance there is what is left of the residual.
            for direction in (basis @ torch.linalg.eigh(hessian).eigenvectors).T:
                reach.check_together(direction, edge=EDGE)
                reach.check_together(-direction, edge=EDGE)
            return theta, iteration
        reach.check_together(basis @ theta)  # outside, the dual falls for ever along a direction that proves it
        gradient = _moments(x, p)
        variances, vectors = torch.linalg.eigh(hessian)
        step = -vectors @ ((vectors.T @ gradient) / variances.clamp(min=NULL))
        step = step * min(1.0, LARGEST_STEP / float(step.norm()))
        rate, slope = 1.0, float(gradient @ step)
        rounding = 1e-14 * (1 + abs(value))
        while (new := dual(theta + rate * step))[0] > value + 1e-4 * rate * slope + rounding and rate > 1e-12:
            rate /= 2
        theta, (value, p) = theta + rate * step, new
    j = int(residual.abs().argmax())
    raise InfeasibleMoment(
        f"Lambda did not converge in {max_iterations} steps: {reach.describe(j)}, reached "
        f"{float(reach.moments[j] + residual[j] * reach.scale[j]):.6g}. The moments are at the edge of what the "
        "samples reach: draw more samples, or choose moments nearer to the base's."
    )


def _describe_low_ess(ess: float, min_ess: float, reach: Reach, base: Tensor) -> str:
    mean = _moments(reach.x, base)  # wanted: 0
    shift = mean.abs() / _scatter(reach.x, base, base).diagonal().clamp(min=NULL).sqrt()
    j = int(shift.argmax())
    return (
        f"Lambda would rest on an effective sample size of {ess:.1f} out of {int(reach.support.sum())} samples, "
        f"expected at least {min_ess:g}. Hardest to reach: {reach.describe(j)}, mean of the weighted samples "
        f"{float(reach.moments[j] + mean[j] * reach.scale[j]):.4g}. Draw more samples, from a better proposal, or "
        "choose a moment nearer to that mean. (Where the points are all there is and not a sample: min_ess=0.)"
    )


def _moments(x: Tensor, p: Tensor) -> Tensor:
    """Return the mean over prompts of E_p[x | c], (J,)."""
    return (p.unsqueeze(-1) * x).sum(1).mean(0)


def _bias(x: Tensor, p: Tensor) -> Tensor:
    """Return the bias of ``_moments`` as an expectation over samples, (J,), to first order in 1 / M."""
    centred = x - (p.unsqueeze(-1) * x).sum(1, keepdim=True)
    return -_moments(centred, p**2)


def _scatter(x: Tensor, p: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over prompts of sum_m weights (x - E_p[x])(x - E_p[x])^T, (J, J)."""
    centred = x - (p.unsqueeze(-1) * x).sum(1, keepdim=True)
    rows = (weights.sqrt().unsqueeze(-1) * centred).flatten(0, 1)
    return rows.T @ rows / len(x)


def _largest(residual: Tensor) -> float:
    return float(residual.abs().max()) if len(residual) else 0.0


def _check_arguments(
    phi: Tensor, moments, log_weights: Tensor | None, log_b: Tensor | None, valid: Tensor | None, names
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Check the arguments; return them in float64 on the CPU, log-weights normalised per prompt, unused features 0."""
    if phi.ndim != 3 or not phi.size(0) or not phi.size(1):
        raise ValueError(
            f"phi has the shape {tuple(phi.shape)}, expected (prompts, samples, features) with at least one prompt and "
            "sample. Without prompts: phi.unsqueeze(0)."
        )
    phi = phi.detach().to("cpu", torch.float64)
    mu = torch.as_tensor(moments, dtype=torch.float64).detach().cpu()
    if mu.shape != phi.shape[2:]:
        raise ValueError(f"moments has the shape {tuple(mu.shape)}, expected one for each of {phi.size(2)} features.")
    if not torch.isfinite(mu).all():
        raise ValueError(f"moments are {mu.tolist()}, expected finite numbers.")
    names = [f"feature {j}" for j in range(len(mu))] if names is None else list(names)
    if len(names) != len(mu):
        raise ValueError(f"names has {len(names)} entries for {len(mu)} features, expected one each.")
    for name, given in (("log_weights", log_weights), ("log_b", log_b), ("valid", valid)):
        if given is not None and given.shape != phi.shape[:2]:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, expected {tuple(phi.shape[:2])} as phi.")
    valid = torch.ones(phi.shape[:2], dtype=torch.bool) if valid is None else valid.cpu()
    logs = (torch.zeros(phi.shape[:2]) if given is None else given.detach().cpu() for given in (log_weights, log_b))
    log_w, log_b = (torch.where(valid, log.double(), -torch.inf) for log in logs)
    bad = ~(log_w < torch.inf) | ~(log_b < torch.inf)  # NaN or +inf
    if bad.any():
        prompt, sample = bad.nonzero()[0].tolist()
        found = float(log_w[prompt, sample] + log_b[prompt, sample])
        raise ValueError(
            f"The log-weight of prompt {prompt}, sample {sample} is {found}, expected a number or -inf. Find the "
            "log-prob that is NaN or infinite."
        )
    used = (log_w > -torch.inf) & (log_b > -torch.inf)
    phi = torch.where(used.unsqueeze(-1), phi, 0.0)
    if not torch.isfinite(phi).all():
        prompt, sample, j = (~torch.isfinite(phi)).nonzero()[0].tolist()
        raise ValueError(f"'{names[j]}' is {float(phi[prompt, sample, j])} on prompt {prompt}, sample {sample}.")
    total = torch.logsumexp(log_w, -1, keepdim=True)
    log_w = torch.where(total > -torch.inf, log_w - total, -torch.inf)
    return phi, mu, log_w, log_b, names


def fit_adaptively(
    fit: Callable[[Tensor], Fit],
    draw: Callable[[range, int, int], Tensor],
    *,
    prompts: int,
    samples: int,
    most: int,
    tolerance: float,
    report: Callable[[Tensor, int], None] = lambda phi, samples: None,
) -> Fit:
    """Fit to samples of more and more prompts, and more of each, until the moments are known well enough.

    It begins with ``PER_PROMPT`` samples of many prompts, which tell more than many samples of a few. The number of
    samples of a prompt is doubled while no lambda reaches the moments, or while the bias is not small beside the
    standard error; otherwise the number of prompts is.

    Args:
        fit: samples (C, M, J) -> the fit, with bias correction, and errors that include the spread between prompts.
        draw: places of prompts (in a random order of all of them), number of the call for these, M -> (len, M, J).
        prompts: how many there are.
        samples: to begin with.
        most: samples in all.
        tolerance: standard error of the moments at which it ends, relative to the range of each feature.
        report: called after each part of the samples, with features (C, M, J) and the number of samples so far.

    Raises:
        InfeasibleMoment: no lambda reaches the moments with so many samples, or a feature that never varied.
    """
    c = min(prompts, max(1, samples // PER_PROMPT))
    m = max(1, math.ceil(samples / c))

    def drawn(places: range, call: int, n: int, before: Tensor | None = None) -> Tensor:
        parts, count = [], 0 if before is None else before.size(0) * before.size(1)
        for start in range(places.start, places.stop, PROMPTS_AT_ONCE):
            parts.append(draw(range(start, min(start + PROMPTS_AT_ONCE, places.stop)), call, n))
            count += len(parts[-1]) * n
            report(torch.cat(parts) if before is None else before, count)
        return torch.cat(parts)

    phi, calls = drawn(range(c), 0, m), 1
    while True:
        found, problem = None, None
        try:
            found = fit(phi)
        except InfeasibleMoment as error:
            problem = error
        flat = phi.flatten(0, 1)
        scale = flat.amax(0) - flat.amin(0)
        enough = 2 * phi.size(0) * phi.size(1) > most
        if problem is not None and (enough or not (scale > 0).all()):
            raise problem
        if found is not None:
            error = found.moment_se / scale[scale > 0][: len(found.moment_se)].clamp(min=NULL)
            biased = bool(found.biased.any())
            if enough or (not biased and bool((error <= tolerance).all())):
                return found
        if found is None or biased or phi.size(0) == prompts:
            phi = torch.cat([phi, drawn(range(phi.size(0)), calls, phi.size(1), phi)], 1)
            calls += 1
        else:
            more = range(phi.size(0), min(prompts, 2 * phi.size(0)))
            phi = torch.cat([phi, drawn(more, 0, phi.size(1), phi)])


def group_by_prompt(
    phi: Tensor, log_weights: Tensor | None = None, prompt_index: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Group samples by prompt: return phi (C, M, J), log_weights (C, M) and valid (C, M), the last two or None.

    All are on the CPU, phi and log_weights in float64.

    ``phi`` is (n, J), with ``log_weights`` (n,) and ``prompt_index`` (n,), each sample's prompt from 0 to C - 1
    (default: one prompt); or it is grouped already.

    Raises:
        ValueError: shapes do not fit each other, or a prompt has no sample.

    >>> phi, _, valid = group_by_prompt(torch.tensor([[1.0], [2.0], [3.0]]), prompt_index=torch.tensor([0, 1, 0]))
    >>> phi.squeeze(-1).tolist(), valid.tolist()
    ([[1.0, 3.0], [2.0, 0.0]], [[True, True], [True, False]])
    """
    phi = phi.detach().to("cpu", torch.float64)
    log_weights = None if log_weights is None else log_weights.detach().to("cpu", torch.float64)
    if phi.ndim not in (2, 3):
        raise ValueError(f"phi has the shape {tuple(phi.shape)}, expected (n, J) or (prompts, samples, J).")
    for name, given in (("log_weights", log_weights), ("valid", valid), ("prompt_index", prompt_index)):
        if given is not None and given.shape != phi.shape[:-1]:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, expected {tuple(phi.shape[:-1])} as phi.")
    if phi.ndim == 3:
        if prompt_index is not None:
            raise ValueError("phi (prompts, samples, J) is by prompt already: leave prompt_index out.")
        return phi, log_weights, None if valid is None else valid.cpu()
    if valid is not None:
        raise ValueError("valid marks what is missing of phi (prompts, samples, J); from phi (n, J) leave rows out.")
    if not len(phi):
        raise ValueError("phi has no rows, expected samples.")
    if prompt_index is None:
        return phi.unsqueeze(0), None if log_weights is None else log_weights.unsqueeze(0), None
    index = prompt_index.detach().cpu().long()
    if index.min() < 0:
        raise ValueError(f"prompt_index has {int(index.min())}, expected numbers from 0.")
    counts = torch.bincount(index)
    if not counts.all():
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"{len(missing)} of {len(counts)} prompts have no sample, the first being {missing[:5]}.")
    order, sizes = torch.argsort(index, stable=True), counts.tolist()

    def grid(values: Tensor, fill: float) -> Tensor:
        return pad_sequence(values[order].split(sizes), batch_first=True, padding_value=fill)

    weights = None if log_weights is None else grid(log_weights, -torch.inf)
    return grid(phi, 0.0), weights, grid(torch.ones(len(phi), dtype=torch.bool), False)
