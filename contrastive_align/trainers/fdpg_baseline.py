"""A baseline for f-DPG from earlier steps: the moving average of the pseudo-reward."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from torch import Tensor


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
