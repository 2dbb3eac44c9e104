"""Measure base, target, tuned model and tuned model + QRS on the same prompts, with separate samples."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_align import losses
from contrastive_align.launch.accepted import accepts_less, feasible_beta
from contrastive_align.launch.common import print_on_main
from contrastive_align.report import Number, TargetChange, in_words, moved, warn_if_above_start
from contrastive_align.report.summary import show
from contrastive_align.sampling import (
    PolicyProposal,
    QRSResult,
    QuasiRejectionSampler,
    Samples,
    choose_beta,
    distinct_n,
)
from contrastive_align.targets import Target, columns_of
from contrastive_align.trainers import FDPGTrainer


Distributions = dict[str, dict[str, Number]]
TO_TARGET = {"kl": "KL(p||pi)", "reverse_kl": "KL(pi||p)", "js": "JS", "tv": "TV"}
TO_BASE = "KL(pi||base)"
# Names of the table -> names of summary.json.
METRICS = {label: f"{name}_target" for name, label in TO_TARGET.items()} | {TO_BASE: "kl_base"}
# Z of a prompt is estimated from its own samples. The bias of first order in 1 / samples is taken off; what is left is
# of second order, and of a few samples (100% of one) too large to be of use.
SAMPLES_PER_PROMPT = 50
RATES = tuple(round(0.1 * i, 1) for i in range(1, 10))  # acceptance rates of the trade-off
BUDGET = 5  # times the expected number of proposals, after which QRS gives up on a prompt
PROPOSALS = 10  # at most, for each sample of another distribution; at a low rate fewer are accepted
FIRST_REPORT, NEXT_REPORT = 10.0, 60.0  # seconds until QRS says how far it is, and between two lines


def measure(
    trainer: FDPGTrainer, rows: Sequence[dict[str, Any]], *, samples: int, acceptance: float | None, seed: int
) -> tuple[Distributions, list[str], list[dict[str, float]]]:
    """Return the columns of the table, remarks, and the trade-off of quasi-rejection sampling.

    They are from ``samples`` per distribution, spread evenly over the rows.

    ``base`` and ``tuned`` are measured on their own samples, ``target`` with importance weights on those of larger
    effective sample size. The moments of ``tuned+QRS`` come from what quasi-rejection sampling accepts of further
    samples at this ``acceptance`` rate, its divergences from weighted samples. Standard errors are over prompts.
    """
    per_prompt = math.ceil(samples / len(rows))
    remarks: list[str] = []
    tradeoff: list[dict[str, float]] = []
    with trainer.sampling_from(reference=True) as model:
        base = _Measured(
            trainer, rows, _proposal(trainer, model, seed, model if trainer.reference is None else None), per_prompt
        )
    columns = {"base": base.column(base.logps), "target": {}}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(trainer.sampling_from())
        own = None if trainer.reference is None else stack.enter_context(trainer.sampling_from(reference=True))
        tuned = _Measured(trainer, rows, _proposal(trainer, model, seed + 1, own), per_prompt)
        columns["tuned"] = tuned.column(tuned.logps)
        columns["target"] = max(base, tuned, key=lambda measured: measured.ess).target_column()
        if acceptance is not None:
            try:
                tradeoff = tuned.tradeoff()
                columns["tuned+QRS"] = tuned.qrs_column(_proposal(trainer, model, seed + 2, own), acceptance, remarks)
            except ValueError as error:
                remarks.append(f"no quasi-rejection sampling: {error}")
    return columns, remarks, tradeoff


def prompts_enough_for(samples: int, at_most: int) -> int:
    """Return the number of prompts to spread ``samples`` over, at least ``SAMPLES_PER_PROMPT`` each.

    >>> prompts_enough_for(10_000, 100), prompts_enough_for(200, 100)
    (100, 4)
    """
    return min(at_most, max(1, samples // SAMPLES_PER_PROMPT))


def metrics_of(columns: Distributions, names: Sequence[str], moments: Sequence[float], prompts: int) -> dict[str, Any]:
    """Convert the columns of the table to the metrics of ``summary.json``."""
    base, target, tuned, qrs = (columns.get(name, {}) for name in ("base", "target", "tuned", "tuned+QRS"))
    wanted = {f"moment/{name}": moment for name, moment in zip(names, moments, strict=True)}
    metrics = {}
    for row in [*wanted, *METRICS]:
        before, after, goal = base[row], tuned[row], wanted.get(row, math.nan)
        if math.isnan(goal):  # a reward has no wanted moment: its goal is the value under the target
            goal = target[row].value
        metrics[METRICS.get(row, row)] = TargetChange(
            before=before.value,
            after=after.value,
            se=math.hypot(before.se or 0.0, after.se or 0.0),
            n=int(tuned["samples"].value),
            before_se=before.se,
            after_se=after.se,
            target=goal,
            qrs=qrs[row].value if row in qrs else None,
            qrs_se=qrs[row].se if row in qrs else None,
            prompts=prompts,
        )
    return metrics


def words_on(metrics: dict[str, TargetChange], trained: str, *, held_out: bool) -> list[str]:
    """Say what moved on the way to the target, whose distance from the start is the scale.

    ``trained`` is the divergence that training lowers; of one that is not measured, KL(p||pi) stands in its place.
    """
    distance = f"{trained if trained in TO_TARGET else 'kl'}_target"
    clauses = []
    for name, change in metrics.items():
        if name.startswith("moment/"):
            clause = moved(name, change, scale=abs(change.target - change.before))
            clauses.append(f"{clause}, under the target it is {show(change.target)}")
    label = TO_TARGET[distance.removesuffix("_target")]
    clauses.append(moved(label, metrics[distance], scale=metrics[distance].before))
    return [in_words(clauses, held_out=held_out), *warn_if_above_start(label, metrics[distance])]


def missed_moments(measured: dict[str, Number], target: Target) -> list[str]:
    """Say which wanted moments the target does not have where it was measured, beyond 3 standard errors.

    The errors are those of the measurement and of the fit together.
    """
    fitted = target.state_dict()["fit"].get("moment_se", {})
    lines = []
    for name, wanted in zip(target.names, target.moments.tolist(), strict=True):
        found = measured[f"moment/{name}"]
        error = math.hypot(found.se or 0.0, fitted.get(name, 0.0))
        if abs(found.value - wanted) > 3 * error + 1e-9:  # never of a reward, which has no wanted moment: NaN
            lines.append(
                f"WARNING: the target itself misses the moment of {name}: {found.value:.4f} +- {error:.4f} where it "
                f"was measured, {wanted:g} wanted. The prompts measured differ from those of training, or the fit had "
                "too few samples: raise fit_max_samples, or measure on prompts like those trained on."
            )
    return lines


class _Measured:
    """K samples for each of C prompts, with their log-probs (C, K) and features phi (C, K, J)."""

    def __init__(self, trainer: FDPGTrainer, rows: Sequence[dict], proposal: PolicyProposal, per_prompt: int) -> None:
        self.rows, self.target, self.per_prompt = rows, trainer.target, per_prompt
        self.samples = proposal.sample([row["prompt"] for row in rows], per_prompt)
        shape = (len(rows), per_prompt)
        self.logps, self.base_logps = self.samples.logps.view(shape), self.samples.base_logps.view(shape)
        self.keywords = {"trainer_state": trainer.state}
        drawn = [rows[i] for i in self.samples.prompt_index.tolist()]
        self.phi = trainer.target.features(
            [row["prompt"] for row in drawn],
            self.samples.completions,
            completion_ids=self.samples.completion_ids,
            **columns_of(drawn, 1),
            **self.keywords,
        ).view(*shape, -1)
        self.scores = trainer.target.log_scores(self.base_logps, self.phi)
        log_z = losses.estimate_log_z(self.logps, self.scores, correct_bias=False)
        self.log_z, self.ess = log_z.value, float(log_z.ess.sum())

    def column(self, logps: Tensor) -> dict[str, Number]:
        """Measure the distribution with these log-probs, with importance weights on the samples."""
        divergences = _divergences(logps, self.scores, self.base_logps, proposal_logps=self.logps)
        return self._moments(logps) | divergences | _texts(self.samples)

    def target_column(self) -> dict[str, Number]:
        """Measure the target, with importance weights on the samples."""
        distance = _number(losses.estimate_divergence("kl", self.base_logps, self.logps, self.scores))
        return self._moments(self.scores) | dict.fromkeys(TO_TARGET.values(), Number(0.0)) | {TO_BASE: distance}

    def tradeoff(self) -> list[dict[str, float]]:
        """Predict acceptance rate and divergences of quasi-rejection sampling at nine rates, or those there are."""
        some = torch.isfinite(self.log_z)
        if not some.any():
            return []
        logs = (self.scores[some], self.logps[some])
        options = {"log_z": self.log_z[some], "at_most": True}
        each = (choose_beta(*logs, acceptance=rate, **options) for rate in RATES)
        found = {estimate.beta: estimate for estimate in each}.values()  # what is above the highest rate is once there
        return [
            {"beta": e.beta, "rate": e.acceptance_rate, "kl": e.kl, "kl_se": e.kl_se, "tvd": e.tvd, "tvd_se": e.tvd_se}
            for e in found
        ]

    def qrs_column(self, proposal: PolicyProposal, acceptance: float, remarks: list[str]) -> dict[str, Number]:
        """Measure the target with quasi-rejection sampling from this policy; add to the remarks."""
        some = torch.isfinite(self.log_z)  # with Z = 0 nothing would be accepted
        if not some.all():
            missed = f"{int((~some).sum())} of {len(some)} prompts"
            remarks.append(f"{missed} have no sample with mass under the target: no QRS there")
        rows = [row for row, kept in zip(self.rows, some.tolist(), strict=True) if kept]
        if not rows:
            raise ValueError("no prompt has a sample with mass under the target.")
        log_z, logps, scores = self.log_z[some], self.logps[some], self.scores[some]
        chosen, remark = feasible_beta(scores, logps, log_z, acceptance=acceptance)
        beta, wished, n = chosen.beta, acceptance, self.per_prompt
        expected = min(acceptance, chosen.acceptance_rate)
        budget = min(math.ceil(BUDGET * n / expected), PROPOSALS * n)
        sampler = QuasiRejectionSampler(
            self.target,
            _WithProgress(proposal, budget * len(rows)),
            beta,
            log_z=log_z,
            batch_size=min(n, max(1, math.ceil(n / expected / 2))),
        )
        result = sampler.sample(
            [row["prompt"] for row in rows],
            n,
            budget=budget,
            columns=columns_of(rows, 1),
            keywords=self.keywords,
            generator=torch.Generator().manual_seed(proposal.seed),
        )
        rate, proposed, found = result.acceptance_rate, int(result.proposed.sum()), len(result.samples)
        if not found:
            raise ValueError(f"none of {proposed} proposals was accepted.")
        accepted = Number(rate, math.sqrt(rate * (1 - rate) / proposed))
        remarks += [accepts_less(str(accepted), wished)] if remark else []
        if result.exhausted.any():
            without = int((result.accepted == 0).sum())
            remarks.append(
                f"QRS stopped at {budget} proposals a prompt: {int(result.exhausted.sum())} of {len(rows)} prompts "
                f"have fewer than {n} accepted samples{f', {without} of them none' if without else ''}; {found} of "
                f"{n * len(rows)} samples in all"
            )
        p_beta = torch.minimum(scores - log_z.unsqueeze(1), math.log(beta) + logps)
        divergences = _divergences(p_beta, scores, self.base_logps[some], proposal_logps=logps, normalise=True)
        moments, texts = _means_over_prompts(result, self.target.names), _texts(result.samples)
        return moments | divergences | texts | {"acceptance": accepted, "beta": Significant(beta)}

    def _moments(self, logps: Tensor) -> dict[str, Number]:
        mean = losses.average_estimate(losses.estimate_moments(self.phi, logps, self.logps))
        return _moments(self.target.names, mean.value, mean.se)


def _means_over_prompts(result: QRSResult, names: Sequence[str]) -> dict[str, Number]:
    index = result.samples.prompt_index
    counts = torch.bincount(index, minlength=len(result.proposed)).double()
    sums = torch.zeros(len(counts), len(names), dtype=torch.float64).index_add_(0, index, result.phi.double())
    means = (sums / counts.unsqueeze(1))[counts > 0]
    independent = result.phi.double() if len(means) == 1 else means
    return _moments(names, means.mean(0), independent.std(0) / math.sqrt(len(independent)))


def _moments(names: Sequence[str], values: Tensor, errors: Tensor) -> dict[str, Number]:
    found = zip(names, values.tolist(), errors.tolist(), strict=True)
    return {f"moment/{name}": Number(value, error) for name, value, error in found}


def _divergences(
    logps: Tensor, scores: Tensor, base_logps: Tensor, *, proposal_logps: Tensor, normalise: bool = False
) -> dict[str, Number]:
    """Measure a distribution's divergences. ``normalise``: its log-probs have an unknown constant for each prompt."""

    def normalised(part: Tensor | None) -> Tensor:
        if not normalise:
            return logps
        plain = {"valid": part, "correct_bias": False}
        return logps - losses.estimate_log_z(proposal_logps, logps, **plain).value.unsqueeze(1)

    def divergence(name: str, part: Tensor | None) -> losses.Estimate:
        given = (normalised(part), proposal_logps, scores)
        return losses.estimate_divergence(name, *given, valid=part, correct_bias=False)

    def from_base(part: Tensor | None) -> losses.Estimate:
        options = {"proposal_logps": proposal_logps, "valid": part, "correct_bias": False}
        return losses.estimate_kl_base(normalised(part), base_logps, **options)

    estimates = {label: functools.partial(divergence, name) for name, label in TO_TARGET.items()} | {TO_BASE: from_base}
    return {label: _number(losses.without_bias(of, None, logps)) for label, of in estimates.items()}


def _texts(samples: Samples) -> dict[str, Number]:
    ids = samples.completion_ids
    return {
        "distinct-2": Number(distinct_n(ids, 2)),
        "tokens": Number(sum(map(len, ids)) / len(ids)),
        "samples": Count(len(ids)),
    }


class Count(Number):
    """Print as a whole number."""

    def __str__(self) -> str:
        return str(self.value)


class Significant(Number):
    """Print four significant digits, of a number that may be small."""

    def __str__(self) -> str:
        return f"{self.value:.4g}"


class _WithProgress:
    """A proposal that says how far quasi-rejection sampling is, where it takes long."""

    def __init__(self, proposal: PolicyProposal, most: int) -> None:
        self.proposal, self.most, self.proposed = proposal, most, 0
        self._begun, self._next = time.perf_counter(), FIRST_REPORT

    def sample(self, prompts: Sequence[Any], n: int) -> Samples:
        """Return ``n`` proposals for each prompt."""
        samples = self.proposal.sample(prompts, n)
        self.proposed += len(samples)
        now = time.perf_counter() - self._begun
        if now >= self._next:
            self._next = now + NEXT_REPORT
            left = now / self.proposed * (self.most - self.proposed)
            print_on_main(
                f"Measuring QRS: {self.proposed:,} of at most {self.most:,} proposals, {left:.0f} s more at most."
            )
        return samples


def _proposal(trainer: FDPGTrainer, model: Any, seed: int, base: Any) -> PolicyProposal:
    """Return what samples from a model. ``base``: of the target; None: the model itself, without its adapter."""
    options = {"max_new_tokens": trainer.max_completion_length, "eos_token_ids": trainer.eos_token_ids}
    return PolicyProposal(model, trainer.processing_class, base=base, seed=seed, **options)


def _number(estimate: losses.Estimate) -> Number:
    mean = losses.average_estimate(estimate)
    return Number(mean.value.item(), mean.se.item())
