"""Coefficients that follow what they control."""

from __future__ import annotations

import math
from typing import Any


class AdaptiveCoefficient:
    r"""A proportional controller in log space: it holds a measured quantity near its target.

    .. math:: e = \mathrm{clip}\Big( \frac{x - x^*}{x^*}, -0.2, 0.2 \Big), \qquad
        c \leftarrow c \, \Big( 1 + s\, e\, \frac{n}{N} \Big)

    Ziegler et al., arXiv:1909.08593, section 2.2, where x is the KL, s = 1 and N a horizon in samples: one update over
    N samples or N updates over one each move c by up to 20%. ``sign`` is s: 1 for the coefficient of a penalty, which
    grows while the quantity is above its target (KL), -1 for that of a bonus, which grows while it is below (entropy).

    Args:
        value: the first value, at least 0; from 0 it never moves, so 0 takes no target.
        target: x*, above 0, in the unit in which the quantity is measured: nats per token for KL and entropy. None: the
            coefficient is constant.
        horizon: N, in samples, above 0.
        sign: 1 or -1.

    Raises:
        ValueError: arguments not as above; from ``update``, a measurement that is not finite, or more samples at once
            than the factor stays positive for (5 N).

    >>> kl_coef = AdaptiveCoefficient(0.05, target=0.1, horizon=1000)
    >>> round(kl_coef.update(0.11, n=500), 5)  # 10% too far from the reference, half a horizon: 5% more
    0.0525
    """

    def __init__(self, value: float, *, target: float | None = None, horizon: float, sign: int = 1) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"value is {value}, expected a finite number of at least 0.")
        if target is not None and not (math.isfinite(target) and target > 0):
            raise ValueError(f"target is {target}, expected a number above 0 (nats per token), or None for a constant.")
        if target is not None and value == 0:
            raise ValueError("value is 0 and target is set: a factor never moves 0. Start above 0, or set no target.")
        if not horizon > 0:
            raise ValueError(f"horizon is {horizon}, expected a number of samples above 0.")
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign}, expected 1 (penalty) or -1 (bonus).")
        self.value, self.target, self.horizon, self.sign = float(value), target, horizon, sign

    def update(self, current: float, *, n: int) -> float:
        """The new value, after ``n`` samples over which the quantity was ``current`` on average."""
        if self.target is None:
            return self.value
        if not math.isfinite(current):
            raise ValueError(f"The measured quantity is {current}, expected a finite number of nats per token.")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n is {n}, expected from 0 to below 5 x horizon = {5 * self.horizon}: raise the horizon.")
        error = min(max((current - self.target) / self.target, -0.2), 0.2)
        self.value *= 1 + self.sign * error * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
