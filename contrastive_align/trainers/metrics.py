"""What is logged: pure functions of a batch of groups or of samples, and exact averages over steps and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from contrastive_align.losses.contrastive import target_labels
from contrastive_align.losses.estimators import (
    average_estimate,
    estimate_divergence,
    estimate_kl_base,
    estimate_log_z,
    estimate_moments,
)
from contrastive_align.models.logps import CompletionLogps, per_completion
from contrastive_align.sampling import distinct_n


Metric = tuple[Tensor, Tensor]  # a value and a weight for each group


def group_metrics(
    *, log_ratios: Tensor, policy_logps: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, beta: float
) -> dict[str, Metric]:
    """Metrics of (B, K) groups: name -> (values (B,), weights (B,)). A weight of 0 leaves the group out.

    Implied rewards are r = beta * log_ratio. ``rewards/rank_j`` is r of the completion with the j-th highest score,
    ``rewards/margins`` r of the best less the mean r of the others, ``rewards/accuracies`` whether the best-scored
    completion (any of them, where tied) has the highest r of all, ``rewards/pair_accuracies`` the share of the others
    that the best beats (the published "accuracy" at K > 2), ``rewards/kendall_tau`` tau-b between scores and r.
    Groups whose scores are all equal have no accuracy, margin or tau. Pairs also carry the names TRL gives them.
    """
    r = beta * log_ratios.masked_fill(~valid, 0.0)
    s = scores.masked_fill(~valid, -torch.inf)
    order = s.argsort(dim=-1, descending=True, stable=True)
    by_rank = {name: t.gather(-1, order) for name, t in (("r", r), ("logps", policy_logps), ("ratios", log_ratios))}
    present = valid.gather(-1, order).to(r.dtype)
    k = valid.sum(-1)
    best = valid & (s == s.amax(-1, keepdim=True))
    signal = (valid & ~best).any(-1)
    everyone = torch.ones_like(r[:, 0])
    with_signal = signal.to(r.dtype)

    highest_best = r.masked_fill(~best, -torch.inf).amax(-1)
    highest_rest = r.masked_fill(~valid | best, -torch.inf).amax(-1)
    beaten = ((by_rank["r"][:, :1] > r) & valid).sum(-1) / (k - 1).clamp(min=1)
    tau, has_tau = _kendall_tau_b(s, r, valid)

    metrics = {f"rewards/rank_{j}": (by_rank["r"][:, j], present[:, j]) for j in range(r.size(1))}
    metrics |= {
        "rewards/margins": (by_rank["r"][:, 0] - _mean_of_others(r, by_rank["r"], valid), with_signal),
        "rewards/accuracies": ((highest_best > highest_rest).to(r.dtype), with_signal),
        "rewards/pair_accuracies": (beaten, with_signal),
        "rewards/kendall_tau": (tau, has_tau),
        "logps/best": (by_rank["logps"][:, 0], everyone),
        "logps/best_delta": (by_rank["ratios"][:, 0], everyone),
        "logps/rest": (_mean_of_others(policy_logps, by_rank["logps"], valid), (k > 1).to(r.dtype)),
        "logps/rest_delta": (_mean_of_others(log_ratios, by_rank["ratios"], valid), (k > 1).to(r.dtype)),
        "labels/entropy": (torch.special.entr(labels).sum(-1), everyone),
        "groups/no_signal": (1 - with_signal, everyone),
    }
    if r.size(1) >= 2:
        pair = with_signal * (k == 2)
        metrics |= {
            "rewards/chosen": (by_rank["r"][:, 0], pair),
            "rewards/rejected": (by_rank["r"][:, 1], pair),
            "logps/chosen": (by_rank["logps"][:, 0], pair),
            "logps/rejected": (by_rank["logps"][:, 1], pair),
        }
    return metrics


def batch_metrics(
    policy: CompletionLogps, log_ratios: Tensor, scores: Tensor, valid: Tensor, *, beta: float, temperature_alpha: float
) -> dict[str, Metric]:
    """:func:`group_metrics` of a batch, and per-token metrics, whose weight is a group's number of tokens."""
    metrics = group_metrics(
        log_ratios=log_ratios,
        policy_logps=policy.logps,
        scores=scores,
        labels=target_labels(scores, temperature_alpha=temperature_alpha, valid=valid),
        valid=valid,
        beta=beta,
    )

    def per_group(values: Tensor, columns: Tensor) -> Metric:
        # As long as if all columns were valid: their number would have to be read from the device.
        sums = torch.zeros(valid.numel(), device=values.device).index_add(0, policy.completion_index, values.float())
        tokens = (policy.lengths * columns).sum(1)
        return (per_completion(sums, valid) * columns).sum(1) / tokens.clamp(min=1), tokens.to(sums.dtype)

    best = torch.zeros_like(valid).scatter(1, scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True), True)
    metrics["entropy"] = per_group(policy.tokens["entropy"], valid)
    metrics["mean_token_accuracy"] = per_group(policy.tokens["is_top1"], best & valid)
    if "rewards/chosen" in metrics:
        pairs = (metrics["rewards/chosen"][1] > 0).unsqueeze(1) & valid
        metrics["logits/chosen"] = per_group(policy.tokens["mean_logits"], best & pairs)
        metrics["logits/rejected"] = per_group(policy.tokens["mean_logits"], ~best & pairs)
    return metrics


def _mean_of_others(values: Tensor, by_rank: Tensor, valid: Tensor) -> Tensor:
    return ((values * valid).sum(-1) - by_rank[:, 0]) / (valid.sum(-1) - 1).clamp(min=1)


def _kendall_tau_b(s: Tensor, r: Tensor, valid: Tensor) -> Metric:
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    ds = torch.where(
        both, (s.unsqueeze(-1) > s.unsqueeze(-2)).to(r.dtype) - (s.unsqueeze(-1) < s.unsqueeze(-2)).to(r.dtype), 0.0
    )
    dr = torch.where(both, torch.sign(r.unsqueeze(-1) - r.unsqueeze(-2)), 0.0)
    norm = (ds.abs().sum((-1, -2)) * dr.abs().sum((-1, -2))).sqrt()
    return (ds * dr).sum((-1, -2)) / norm.clamp(min=1), (norm > 0).to(r.dtype)


def distribution_metrics(
    *,
    policy_logps: Tensor,
    proposal_logps: Tensor,
    base_logps: Tensor,
    target_log_scores: Tensor,
    phi: Tensor,
    names: Sequence[str],
    keys: Sequence[str],
    lengths: Tensor,
    ended: Tensor,
    completion_ids: Sequence[Sequence[Sequence[int]]],
    inside: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of K samples of a proposal, the policy's own when online, for each of B prompts.

    Shapes: phi (B, K, J), keys (B,), all else (B, K).

    ``kl_target`` KL(p||pi), ``reverse_kl_target`` KL(pi||p), ``tv_target``, ``js_target``; ``kl_base`` KL(pi||a);
    ``moment/<feature>`` under the policy and ``moment/<feature>/target`` under the target, self-normalised; ``log_z``;
    beside each ``.../se``, its standard error over the prompts, and beside what is importance-sampled ``.../ess``. Z is
    that of these K samples, whose bias of first order in 1 / K is taken off; the loss has a Z of all samples so far,
    which as an exact one would make kl near the target low. Averaged over the prompts that have a sample with mass
    under the target, the share of the others being ``groups/no_mass``; where there is one prompt, over all samples.
    ``sampling/target_mass_lost``, where ``inside`` says whether a truncated proposal could draw a sample: the target's
    mass on the others. Of the samples themselves: their lengths, how many ended; ``distinct_2``: different bigrams over
    all; ``repetition``: share of tokens that their completion had before.
    """
    if len(set(keys)) == 1:
        policy_logps, proposal_logps, base_logps, target_log_scores = (
            t.reshape(1, -1) for t in (policy_logps, proposal_logps, base_logps, target_log_scores)
        )
        phi = phi.reshape(1, -1, phi.size(-1))
    known = torch.isfinite(target_log_scores).any(-1)
    log_z = average_estimate(estimate_log_z(proposal_logps, target_log_scores))
    metrics = {"log_z": log_z.value.item(), "log_z/se": log_z.se.item()}
    metrics["groups/no_mass"] = (~known).double().mean().item()
    for name in ("kl", "reverse_kl", "tv", "js"):
        key = "kl_target" if name == "kl" else f"{name}_target"
        if known.any():
            logs = (policy_logps[known], proposal_logps[known], target_log_scores[known])
            estimate = average_estimate(estimate_divergence(name, *logs))
            metrics[key], metrics[f"{key}/se"] = estimate.value.item(), estimate.se.item()
            metrics[f"{key}/ess"] = estimate.ess.item()
    kl_base = average_estimate(estimate_kl_base(policy_logps, base_logps, proposal_logps=proposal_logps))
    metrics["kl_base"], metrics["kl_base/se"] = kl_base.value.item(), kl_base.se.item()
    at_policy = average_estimate(estimate_moments(phi, policy_logps, proposal_logps))
    at_target = average_estimate(estimate_moments(phi, target_log_scores, proposal_logps))
    for j, name in enumerate(names):
        for key, mean in ((f"moment/{name}", at_policy), (f"moment/{name}/target", at_target)):
            metrics[key], metrics[f"{key}/se"] = mean.value[j].item(), mean.se[j].item()
    metrics["moment/target/ess"] = at_target.ess.item()
    if inside is not None:
        lost = target_mass_lost(inside.reshape(target_log_scores.shape), target_log_scores, proposal_logps)
        metrics["sampling/target_mass_lost"], metrics["sampling/target_mass_lost/se"] = lost
    metrics["completions/mean_length"] = lengths.double().mean().item()
    metrics["completions/eos_rate"] = ended.double().mean().item()
    flat = [ids for group in completion_ids for ids in group]
    metrics["distinct_2"] = distinct_n(flat, 2)
    metrics["repetition"] = sum(len(ids) - len(set(ids)) for ids in flat) / sum(map(len, flat))
    return metrics


def target_mass_lost(inside: Tensor, target_log_scores: Tensor, proposal_logps: Tensor) -> tuple[float, float]:
    """Return the target's mass on the samples (B, K) that are not ``inside``, and its standard error over prompts.

    >>> target_mass_lost(torch.tensor([[True, True, True, False]]), torch.zeros(1, 4), torch.zeros(1, 4))[0]
    0.25
    """
    lost = average_estimate(estimate_moments((~inside).double().unsqueeze(-1), target_log_scores, proposal_logps))
    return lost.value[0].item(), lost.se[0].item()


class Averages:
    """Weighted means over everything added since the last call of :meth:`compute`, over all processes.

    Means do not depend on how the groups were spread over batches, steps and processes.

    >>> averages = Averages()
    >>> averages.add({"x": (torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))})
    >>> averages.compute()["x"].mean
    1.5
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        for name, (values, weights) in metrics.items():
            values, weights = values.detach(), weights.detach()
            values = torch.where(weights > 0, values, 0.0)
            sums = torch.stack([weights.sum(), (weights * values).sum(), (weights * values.square()).sum()])
            sums = sums.to(torch.float32 if sums.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> dict[str, Mean]:
        """Name -> mean over all processes, and start anew. To be called on every process."""
        totals: dict[str, list[float]] = {}
        for sums in gather_object([{name: t.tolist() for name, t in self._sums.items()}]):
            for name, parts in sums.items():
                totals[name] = [a + b for a, b in zip(totals.get(name, [0.0, 0.0, 0.0]), parts, strict=True)]
        self._sums.clear()
        return {name: Mean(*parts) for name, parts in sorted(totals.items()) if parts[0] > 0}


class Mean:
    """A weighted mean with its standard error."""

    def __init__(self, n: float, total: float, squares: float) -> None:
        self.n = n
        self.mean = total / n
        variance = max(squares / n - self.mean**2, 0.0)
        self.se = (variance / (n - 1)) ** 0.5 if n > 1 else float("nan")
