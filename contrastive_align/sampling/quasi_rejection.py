"""The quasi-rejection sampler: exact samples of p_beta, between the proposal and the target.

``estimates.py`` estimates the distance of p_beta from the target and the acceptance rate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contrastive_align.sampling.estimates import QRSEstimate, qrs_estimates
from contrastive_align.sampling.samples import Proposal, Samples
from contrastive_align.targets.fit import group_by_prompt


if TYPE_CHECKING:
    from contrastive_align.targets import Target


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QRSResult:
    """Accepted samples and all proposals, for C prompts, N proposals in all and J features."""

    samples: Samples  # up to n for each prompt, prompt by prompt, in the order of their acceptance
    phi: Tensor  # (len(samples), J) their features
    proposed: Tensor  # (C,) proposals made for each prompt
    accepted: Tensor  # (C,) how many of them were accepted, including those above n in the last batch
    exhausted: Tensor  # (C,) bool: the budget ended before n were accepted
    proposed_index: Tensor  # (N,) the prompt of each proposal
    target_log_scores: Tensor  # (N,) nats
    proposal_logps: Tensor  # (N,) nats
    proposed_phi: Tensor  # (N, J) features of all proposals

    @property
    def acceptance_rate(self) -> float:
        """The share of all proposals that was accepted; prompts with a low rate have more proposals."""
        return float(self.accepted.sum() / self.proposed.sum())

    @property
    def acceptance_rates(self) -> Tensor:
        """(C,) float64, the acceptance rate of each prompt."""
        return self.accepted.double() / self.proposed

    def estimates(self, betas: Sequence[float], *, log_z: float | Tensor | None = None) -> list[QRSEstimate]:
        """Return :func:`qrs_estimates` from all proposals; a prompt that finished early has fewer.

        Stopping when enough are accepted favours lucky batches a little; separate samples avoid this bias.
        """
        numbers = torch.cat([torch.stack([self.target_log_scores, self.proposal_logps], -1), self.proposed_phi], -1)
        numbers, log_weights, _ = group_by_prompt(numbers, torch.zeros(len(numbers)), self.proposed_index)
        scores, logps, phi = numbers[..., 0], numbers[..., 1], numbers[..., 2:]
        return qrs_estimates(scores, logps, betas, log_weights=log_weights, features=phi, log_z=log_z)


class QuasiRejectionSampler:
    r"""A sampler of p_beta(x|c), proportional to min(P(x|c), beta q(x|c)).

    A sample x of the proposal q is accepted with probability min(1, P(x|c) / (beta q(x|c))), each
    independently, so that the accepted samples are independent samples of p_beta. QRS, arXiv:2112.05702.

    Args:
        target: gives ``features`` and ``log_scores``; the ``proposal`` reports the log-probs of its base.
        beta: above 0. In the scale of P / q, unnormalised, or of p / q with ``log_z``.
        log_z: nats, log Z of the target, a number or one for each prompt of :meth:`sample`.
        batch_size: proposals for each prompt at a time.

    Raises:
        ValueError: a beta or batch size that is not above 0.
    """

    def __init__(
        self,
        target: Target,
        proposal: Proposal,
        beta: float,
        *,
        log_z: float | Sequence[float] | Tensor | None = None,
        batch_size: int = 16,
    ) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}, expected a number above 0; choose_beta finds one.")
        _check_whole("batch_size", batch_size)
        self.target, self.proposal, self.beta, self.batch_size = target, proposal, float(beta), batch_size
        self.log_z = torch.as_tensor(0.0 if log_z is None else log_z, dtype=torch.float64).cpu()
        if not torch.isfinite(self.log_z).all():
            raise ValueError("log_z has NaN or infinite entries, expected numbers. Leave prompts with Z = 0 out.")

    def sample(
        self,
        prompts: Sequence[Any],
        n: int,
        *,
        budget: int,
        columns: Mapping[str, Sequence[Any]] | None = None,
        keywords: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> QRSResult:
        """Propose for all prompts that lack samples, until each has ``n`` or its ``budget`` is spent.

        Args:
            columns: lists of C for C prompts, the dataset's columns that features read.
            keywords: further arguments of the features, the same in every call: ``trainer_state``.
            generator: of the accept decisions, on the CPU; the proposal has its own. Default: torch's global one.

        Raises:
            ValueError: numbers that are not above 0, columns of another length, or another number of proposals than
                asked for.
        """
        _check_whole("n", n)
        _check_whole("budget", budget)
        c = len(prompts)
        if not c:
            raise ValueError("There are no prompts, expected at least one.")
        if self.log_z.ndim and self.log_z.shape != (c,):
            raise ValueError(
                f"log_z has the shape {tuple(self.log_z.shape)}, expected a number or {c}, one per prompt."
            )
        for name, values in (columns or {}).items():
            if len(values) != c:
                raise ValueError(f"The column '{name}' has {len(values)} values for {c} prompts, expected one each.")
        proposed, accepted = torch.zeros(c, dtype=torch.int64), torch.zeros(c, dtype=torch.int64)
        kept, kept_phi, seen = [], [], []
        while len(active := (accepted < n).nonzero().flatten()) and int(done := proposed[active[0]]) < budget:
            m = min(self.batch_size, budget - int(done))
            batch = self._propose(prompts, active, m)
            index = batch.prompt_index
            rows = {name: [values[i] for i in index.tolist()] for name, values in (columns or {}).items()}
            phi = self.target.features(
                [prompts[i] for i in index.tolist()],
                batch.completions,
                completion_ids=batch.completion_ids,
                **rows,
                **(keywords or {}),
            )
            scores = self.target.log_scores(batch.base_logps, phi)
            log_z = self.log_z[index] if self.log_z.ndim else self.log_z
            chance = (scores - batch.logps - log_z - math.log(self.beta)).clamp(max=0).exp()
            hit = torch.rand(len(batch), dtype=torch.float64, generator=generator) < chance
            place = accepted[index] + _count_before(hit, index)  # which acceptance of its prompt this would be
            keep = hit & (place < n)
            kept.append(batch.select(keep))
            kept_phi.append(phi[keep])
            seen.append((index, scores, batch.logps, phi))
            proposed += torch.bincount(index, minlength=c)
            accepted += torch.bincount(index[hit], minlength=c)
        samples = Samples.join(kept)
        order = torch.argsort(samples.prompt_index, stable=True)
        exhausted = accepted < n
        if exhausted.any():
            first = exhausted.nonzero().flatten()[:5].tolist()
            logger.warning(
                f"{int(exhausted.sum())} of {c} prompts used up their budget of {budget} proposals before {n} were "
                f"accepted, the first being numbers {first}, with {accepted[first].tolist()} accepted."
            )
        every = [torch.cat(part) for part in zip(*seen, strict=True)]
        return QRSResult(samples.select(order), torch.cat(kept_phi)[order], proposed, accepted, exhausted, *every)

    def _propose(self, prompts: Sequence[Any], active: Tensor, m: int) -> Samples:
        """Draw m proposals for each active prompt, with ``prompt_index`` in the whole list."""
        batch = self.proposal.sample([prompts[i] for i in active.tolist()], m)
        found = torch.bincount(batch.prompt_index, minlength=len(active)).tolist()
        if found != [m] * len(active):
            raise ValueError(f"The proposal returned {found} samples for {len(active)} prompts, expected {m} for each.")
        return replace(batch, prompt_index=active[batch.prompt_index])


def _count_before(hit: Tensor, index: Tensor) -> Tensor:
    """Count, for each of n rows, the earlier hits with the same index."""
    order = torch.argsort(index, stable=True)
    before = hit[order].long().cumsum(0) - hit[order].long()
    counts = torch.bincount(index)
    first = (counts.cumsum(0) - counts)[index[order]]
    return torch.empty_like(before).index_copy_(0, order, before - before[first])


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number above 0.")
