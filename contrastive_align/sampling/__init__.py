"""Completions from a policy; quasi-rejection sampling and its estimators."""

from contrastive_align.sampling.decode import Drawn, distinct_n, draw
from contrastive_align.sampling.estimates import QRSEstimate, choose_beta, qrs_estimates
from contrastive_align.sampling.proposal import PolicyProposal
from contrastive_align.sampling.quasi_rejection import QRSResult, QuasiRejectionSampler
from contrastive_align.sampling.samples import Proposal, Samples


__all__ = [
    "Drawn",
    "PolicyProposal",
    "Proposal",
    "QRSEstimate",
    "QRSResult",
    "QuasiRejectionSampler",
    "Samples",
    "choose_beta",
    "distinct_n",
    "draw",
    "qrs_estimates",
]
