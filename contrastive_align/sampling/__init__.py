"""Completions from a policy; quasi-rejection sampling and its estimators."""

from contrastive_align.sampling.generate import sample_completions
from contrastive_align.sampling.quasi_rejection import QRSResult, QuasiRejectionSampler
from contrastive_align.sampling.quasi_rejection_estimates import QRSEstimate, choose_beta, qrs_estimates
from contrastive_align.sampling.samples import Proposal, Samples


__all__ = [
    "Proposal",
    "QRSEstimate",
    "QRSResult",
    "QuasiRejectionSampler",
    "Samples",
    "choose_beta",
    "qrs_estimates",
    "sample_completions",
]
