"""What is logged about samples drawn towards a target: estimates with their effective sample sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_align.losses import average_estimate, estimate_divergence, estimate_kl_base, estimate_moments


def distribution_metrics(
    *,
    policy_logps: Tensor,
    proposal_logps: Tensor,
    base_logps: Tensor,
    target_log_scores: Tensor,
    log_z: Tensor,
    phi: Tensor,
    names: Sequence[str],
    keys: Sequence[str],
    lengths: Tensor,
    ended: Tensor,
    completion_ids: Sequence[Sequence[Sequence[int]]],
) -> dict[str, float]:
    """Metrics of K samples of a proposal, the policy's own when online, for each of B prompts.

    Shapes: phi (B, K, J), log_z and keys (B,), all else (B, K).

    ``kl_target`` KL(p||pi), ``reverse_kl_target`` KL(pi||p), ``tv_target``, ``js_target``; ``kl_base`` KL(pi||a);
    ``moment/<feature>`` under the policy and ``moment/<feature>/target`` under the target, self-normalised; ``log_z``;
    beside what is importance-sampled ``.../ess``. Averaged over prompts; where there is only one, over all samples.
    Of the samples themselves: their lengths, how many ended; ``distinct_2``: different bigrams over all;
    ``repetition``: share of tokens that their completion had before.
    """
    if len(set(keys)) == 1:
        policy_logps, proposal_logps, base_logps, target_log_scores = (
            t.reshape(1, -1) for t in (policy_logps, proposal_logps, base_logps, target_log_scores)
        )
        phi, log_z = phi.reshape(1, -1, phi.size(-1)), log_z[:1]
    metrics: dict[str, float] = {"log_z": log_z[torch.isfinite(log_z)].mean().item()}
    metrics["groups/no_mass"] = (~torch.isfinite(log_z)).double().mean().item()
    known = torch.isfinite(log_z)
    for name in ("kl", "reverse_kl", "tv", "js"):
        key = "kl_target" if name == "kl" else f"{name}_target"
        if known.any():
            logs = (policy_logps[known], proposal_logps[known], target_log_scores[known])
            estimate = average_estimate(estimate_divergence(name, *logs, log_z=log_z[known]))
            metrics[key], metrics[f"{key}/ess"] = estimate.value.item(), estimate.ess.item()
    metrics["kl_base"] = average_estimate(
        estimate_kl_base(policy_logps, base_logps, proposal_logps=proposal_logps)
    ).value.item()
    at_policy = average_estimate(estimate_moments(phi, policy_logps, proposal_logps))
    at_target = average_estimate(estimate_moments(phi, target_log_scores, proposal_logps))
    for j, name in enumerate(names):
        metrics[f"moment/{name}"] = at_policy.value[j].item()
        metrics[f"moment/{name}/target"] = at_target.value[j].item()
    metrics["moment/target/ess"] = at_target.ess.item()
    metrics["completions/mean_length"] = lengths.double().mean().item()
    metrics["completions/eos_rate"] = ended.double().mean().item()
    flat = [ids for group in completion_ids for ids in group]
    bigrams = [pair for ids in flat for pair in itertools.pairwise(ids)]
    metrics["distinct_2"] = len(set(bigrams)) / len(bigrams) if bigrams else math.nan
    metrics["repetition"] = sum(len(ids) - len(set(ids)) for ids in flat) / sum(map(len, flat))
    return metrics
