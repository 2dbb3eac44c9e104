"""Constraints that hold always: b(x) = phi(x), 0 or 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_align.targets.reachable import InfeasibleMoment


def decide_pointwise(phi: Tensor, flags: Sequence[bool | None]) -> list[bool]:
    """The flags (J), None replaced by whether the feature is boolean on the samples phi (n, J)."""
    boolean = ((phi == 0) | (phi == 1)).all(0).tolist()
    return [boolean[j] if flag is None else flag for j, flag in enumerate(flags)]


def log_b(phi: Tensor, pointwise: Sequence[bool | None], names: Sequence[str]) -> Tensor:
    """(...) float64: 0 where all pointwise features of phi (..., J) are 1, else -inf; no log is taken of anything.

    Raises:
        ValueError: a pointwise feature that is neither 0 nor 1.

    >>> log_b(torch.tensor([[1.0, 0.3], [0.0, 0.3]]), [True, False], ["polite", "length"])
    tensor([0., -inf], dtype=torch.float64)
    """
    places = [j for j, flag in enumerate(pointwise) if flag]
    always = phi[..., places]
    bad = (always != 0) & (always != 1)
    if bad.any():
        raise ValueError(
            f"'{names[places[int(bad.nonzero()[0, -1])]]}' is pointwise, b(x) = phi(x), and {always[bad][0].item():g} "
            "on a sample, expected 0 or 1. Make the feature boolean, for instance by a threshold, or pointwise=False."
        )
    holds = (always == 1).all(-1)
    return torch.zeros(holds.shape, dtype=torch.float64, device=phi.device).masked_fill(~holds, -torch.inf)


def check_some_satisfy(phi: Tensor, pointwise: Sequence[bool], names: Sequence[str]) -> None:
    """Raise :class:`InfeasibleMoment` where no row of phi (n, J) satisfies all pointwise constraints: Z = 0."""
    n, places = len(phi), [j for j, flag in enumerate(pointwise) if flag]
    if not n or (phi[:, places] == 1).all(-1).any():
        return
    each = ", ".join(f"'{names[j]}' by {int(phi[:, j].sum())} of {n}" for j in places)
    raise InfeasibleMoment(
        f"None of {n} samples satisfies the pointwise constraints{' together' * (len(places) > 1)}, so that Z = 0: "
        f"{each}. Draw more samples, from a proposal that satisfies them (a prompt asking for it), or lower a moment."
    )
