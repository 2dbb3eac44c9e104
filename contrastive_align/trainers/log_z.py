"""log Z of every prompt, as a running estimate over all samples ever drawn for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class RunningLogZ:
    r"""For each prompt c the mean of P(y|c) / q(y|c) over the samples y ~ q seen so far, in log space.

    .. math:: Z_c = E_{y \sim q}\big[P(y|c) / q(y|c)\big]

    GDC, arXiv:2012.11635, and one Z for each prompt, CDPG, arXiv:2112.00791. The mean is unbiased although q moves,
    since each sample is weighed by the proposal it came from.

    >>> z = RunningLogZ()
    >>> z.add([("hello", torch.tensor([0.0, -torch.inf]))])  # log P - log q of two samples
    >>> round(math.exp(z["hello"]), 3)
    0.5
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, groups: Iterable[tuple[str, Tensor]]) -> None:
        """Groups of (key of the prompt, (K,) log P - log q of its samples)."""
        for key, log_weights in groups:
            log_sum, n = self._sums.get(key, (-math.inf, 0))
            both = torch.cat([log_weights.double().cpu(), torch.tensor([log_sum], dtype=torch.float64)])
            self._sums[key] = (both.logsumexp(0).item(), n + len(log_weights))

    def __getitem__(self, key: str) -> float:
        log_sum, n = self._sums[key]
        return log_sum - math.log(n)

    def __contains__(self, key: str) -> bool:
        return key in self._sums

    def of(self, keys: Sequence[str]) -> Tensor:
        """(B,) float64; -inf for a prompt none of whose samples the target allows."""
        return torch.tensor([self[key] for key in keys], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {key: list(pair) for key, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = {key: (float(log_sum), int(n)) for key, (log_sum, n) in state.items()}
