"""State of f-DPG between steps: a proposal that adapts to the policy, and a baseline over a window of steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_align.losses.estimators import RunningLogZ, estimate_divergence


@dataclass(frozen=True)
class Comparison:
    """D(target, proposal) - D(target, policy) in nats (tv: a probability), whether the policy took over, and the error.

    The standard error is over the prompts, nan from a single one. Both divergences have the same log Z, taken as exact.
    """

    gap: float
    replaced: bool
    gap_se: float


class AdaptiveProposal:
    r"""q: the base at first, then the policy as it was when it was last replaced.

    .. math:: q \leftarrow \pi \quad\text{if}\quad \hat D(p, \pi) < \hat D(p, q)

    with D = KL(p||.), TV or JSD, estimated by importance sampling on all samples of the last steps, prompts weighing
    the same: KL-adaptive DPG, GDC, arXiv:2012.11635. Both estimates are of the same samples, whose noise
    is therefore much the same. The policy's log-probs are those at sampling time, so that the estimate lags behind
    the present policy. The window is emptied at each replacement.

    While q is the base it takes no memory. From then on it is a copy of the trained weights: of the adapter (LoRA), or
    of the model (full fine-tuning). For sampling, copy and policy exchange their places.

    Args:
        criterion: ``"kl"``, ``"tv"`` or ``"js"``.
        window: over how many of the last times samples were drawn; no replacement before there were so many.
    """

    def __init__(self, criterion: str, window: int) -> None:
        self.criterion = criterion
        self.weights: dict[str, Tensor] | None = None
        self.replacements = 0
        self._window: deque[tuple[list[str], Tensor]] = deque(maxlen=window)

    @property
    def is_base(self) -> bool:
        return self.weights is None

    def compare(
        self,
        model: nn.Module,
        keys: Sequence[str],
        policy_logps: Tensor,
        proposal_logps: Tensor,
        target_log_scores: Tensor,
        log_z: RunningLogZ,
    ) -> Comparison | None:
        """Count in samples of q and replace it if the policy is nearer; None while the window is not full.

        Args:
            model: the policy, whose trained weights may be copied.
            keys: of the B prompts, of all processes, so that all of them decide alike.
            policy_logps, proposal_logps, target_log_scores: (B, K) nats.
            log_z: of all samples so far.
        """
        logs = torch.stack([policy_logps, proposal_logps, target_log_scores]).double().cpu()
        self._window.append((list(keys), logs))
        if len(self._window) < self._window.maxlen:
            return None
        gap, se = self._gap(log_z)
        if gap > 0:
            self.weights = _trained_weights(model, copy=True)
            self.replacements += 1
            self._window.clear()
        return Comparison(gap, gap > 0, se)

    def _gap(self, log_z: RunningLogZ) -> tuple[float, float]:
        rows: dict[str, list[Tensor]] = {}
        for keys, logs in self._window:
            for i, key in enumerate(keys):
                rows.setdefault(key, []).append(logs[:, i])
        joined = {key: torch.cat(parts, 1) for key, parts in rows.items()}
        width = max(logs.size(1) for logs in joined.values())
        valid = torch.tensor([[True] * t.size(1) + [False] * (width - t.size(1)) for t in joined.values()])
        policy, proposal, target = torch.stack(
            [torch.nn.functional.pad(logs, (0, width - logs.size(1))) for logs in joined.values()], 1
        )
        known = log_z.of(list(joined))
        some = known.isfinite()  # of the other prompts nothing is known, on either side
        if not bool(some.any()):
            return 0.0, math.nan

        def divergence(of: Tensor) -> Tensor:
            logs = (of[some], proposal[some], target[some])
            return estimate_divergence(self.criterion, *logs, log_z=known[some], valid=valid[some]).value

        gaps = (divergence(proposal) - divergence(policy)).nan_to_num(nan=0.0)
        return gaps.mean().item(), gaps.std().item() / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Give the policy the weights of q inside the block; while q is the base, do nothing."""
        if self.weights is None:
            yield
            return
        policy = dict(model.named_parameters())
        own = {name: policy[name].data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                policy[name].data = weight
            yield
        finally:
            for name, weight in own.items():
                policy[name].data = weight

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the weights, which are large and are saved once for all processes."""
        return {"replacements": self.replacements, "window": list(self._window)}

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, Tensor] | None, model: nn.Module) -> None:
        trained = _trained_weights(model)
        if weights is not None and weights.keys() != trained.keys():
            differs = sorted(weights.keys() ^ trained.keys())
            raise ValueError(
                f"The checkpoint's proposal has {len(weights)} trained weights and the model {len(trained)}; the first "
                f"that differs is {differs[0]!r}. Resume with the model and the adapter the run began with."
            )
        self.weights = None if weights is None else {n: w.to(trained[n].device) for n, w in weights.items()}
        self.replacements = state["replacements"]
        self._window.clear()
        self._window.extend((keys, logs.cpu()) for keys, logs in state["window"])


def _trained_weights(model: nn.Module, copy: bool = False) -> dict[str, Tensor]:
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return {name: weight.clone() for name, weight in trained.items()} if copy else trained


class WindowBaseline:
    r"""The mean of E_pi[f'(t)] over the last W times samples were drawn.

    .. math:: b = \frac{1}{W} \sum_{s=1}^{W} \frac{1}{B} \sum_c \hat E_{\pi_s}\big[f'(t) | c\big]

    It knows earlier samples only, so it is independent of those it is taken off from, and the gradient stays unbiased.
    Before the first samples it is 0.

    >>> import torch
    >>> baseline = WindowBaseline(2)
    >>> for value in (1.0, 2.0, 4.0):
    ...     baseline.add(torch.tensor([value, value, torch.nan]))
    >>> baseline.value
    3.0
    """

    def __init__(self, window: int) -> None:
        self._means: deque[float] = deque(maxlen=window)

    def add(self, slopes: Tensor) -> None:
        """(B,) one estimate of E_pi[f'] for each prompt, of all processes; those that are not finite are left out."""
        known = slopes[slopes.isfinite()]
        if len(known):
            self._means.append(known.double().mean().item())

    @property
    def value(self) -> float:
        return math.fsum(self._means) / len(self._means) if self._means else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self._means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.clear()
        self._means.extend(state["means"])
