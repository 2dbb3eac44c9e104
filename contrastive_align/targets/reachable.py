"""The moments that samples can reach: each alone, and all together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


EDGE = 1e-6  # of the range: nearer than this to its edge, lambda is as good as infinite
CONSTANT = 1e-12  # a range, or a variance relative to the largest, that is rounding


class InfeasibleMoment(ValueError):
    """A moment that no reweighting of the samples has, or that would rest on too few of them."""


class Reach:
    """The moments that reweighting the samples of each prompt can reach.

    The moments that can be reached are the mean over prompts of the convex hulls of each prompt's samples; lambda is
    finite inside of it and nowhere else.

    Made from features phi (C, M, J), wanted moments (J,) and the samples that have any weight, ``support`` (C, M).
    ``low`` and ``high`` (J,) are the range of each moment, a mean over prompts; ``x`` (C, M, J) is
    (phi - moments) / (high - low), whose wanted mean is 0.

    Raises:
        InfeasibleMoment: a constant feature, or a moment outside or on the edge of its own range.
    """

    def __init__(self, phi: Tensor, moments: Tensor, support: Tensor, names: Sequence[str]) -> None:
        self.moments, self.support, self.names = moments, support, names
        self._samples = f"{int(support.sum())} samples"
        self._over_prompts = f" (mean over {len(support)} prompts)" if len(support) > 1 else ""
        outside = ~support.unsqueeze(-1)
        self.low = phi.masked_fill(outside, torch.inf).amin(1).mean(0)
        self.high = phi.masked_fill(outside, -torch.inf).amax(1).mean(0)
        self.scale = self.high - self.low
        self._check_each(phi)
        self.x = torch.where(support.unsqueeze(-1), (phi - moments) / self.scale, 0.0)

    def _check_each(self, phi: Tensor) -> None:
        for j in range(len(self.names)):
            low, high, wanted = (t[j].item() for t in (self.low, self.high, self.moments))
            if high - low <= CONSTANT * max(1.0, abs(high)):
                raise InfeasibleMoment(self._constant(j, phi, high, wanted))
            if low + EDGE * (high - low) < wanted < high - EDGE * (high - low):
                continue
            inside = low <= wanted <= high
            hint = " Draw more samples, from a better proposal, or choose a moment inside the range."
            if inside and {low, high} == {0.0, 1.0}:
                hint = (
                    " For 'always' use moment=1.0 on a boolean feature, which is then pointwise; for 'never' the same "
                    "on its opposite, {not: ...}."
                )
            raise InfeasibleMoment(
                f"The moment {wanted:g} of '{self.names[j]}' is {'on the edge of' if inside else 'outside'} what the "
                f"{self._samples} reach: {low:g} to {high:g}{self._over_prompts}.{hint}"
            )

    def _constant(self, j: int, phi: Tensor, value: float, wanted: float) -> str:
        varies = float(phi[..., j][self.support].amax() - phi[..., j][self.support].amin()) > 0
        if varies:
            found = f"does not vary among the samples of any one prompt (mean {value:g} over {len(phi)} prompts)"
            fix = "Draw several samples for each prompt, or use a feature that depends on the completion."
        else:
            found = f"is the constant {value:g} on all {self._samples}"
            fix = "Check the feature on a few completions, or drop the constraint."
        return f"'{self.names[j]}' {found}, so that no lambda moves it to the moment {wanted:g}. {fix}"

    def check_together(self, direction: Tensor, *, edge: float = 0.0) -> None:
        """Raise if ``direction`` (J,), in units of ``x``, proves that the moments cannot be reached together.

        A separating hyperplane: every reachable point has d . x <= mean_c max_m d . x_cm, so the wanted point 0 is
        outside if that is below 0, and on the edge if it is 0. No direction gives a false alarm.
        """
        along = self.x @ direction
        highest = along.masked_fill(~self.support, -torch.inf).amax(-1).mean()
        lowest = along.masked_fill(~self.support, torch.inf).amin(-1).mean()
        if highest > edge * (highest - lowest) or not direction.any():
            return
        d = direction / self.scale
        d = (d / d.abs().max() * 1e5).round() / 1e5  # for the message: 1, not 0.9999999999
        terms = [f"{c:+.3g} * '{name}'" for c, name in zip(d.tolist(), self.names, strict=True) if abs(c) > EDGE]
        wanted = float(d @ self.moments)
        reached = wanted + float((self.x @ (d * self.scale)).masked_fill(~self.support, -torch.inf).amax(-1).mean())
        ranges = "; ".join(self.describe(j) for j in range(len(self.names)))
        raise InfeasibleMoment(
            f"The moments cannot be reached together: {' '.join(terms).removeprefix('+')} should be {wanted:.6g}, and "
            f"reaches at most {reached:.6g} on the {self._samples}{self._over_prompts}, where a finite lambda "
            f"needs more. Each alone: {ranges}. Draw more samples, drop a constraint or make it pointwise (moment=1.0)."
        )

    def varying_directions(self) -> Tensor:
        """Return a basis (J, R) of the combinations of x that vary, each with variance 1 over the support.

        R < J if features depend on each other linearly; lambda is then the shortest of its equivalents.
        """
        if not self.names:
            return self.x.new_zeros(0, 0)
        count = self.support.sum(-1, keepdim=True).unsqueeze(-1)
        mean = self.x.sum(1, keepdim=True) / count
        deviations = torch.where(self.support.unsqueeze(-1), self.x - mean, 0.0) / count.sqrt()
        rows = deviations.flatten(0, 1)
        variances, vectors = torch.linalg.eigh(rows.T @ rows / len(self.x))
        vary = variances > CONSTANT * variances.amax()
        for v in vectors[:, ~vary].T:
            offset = float(mean.squeeze(1).mean(0) @ v)
            if abs(offset) > EDGE:
                self.check_together(-v if offset > 0 else v)
        return vectors[:, vary] / variances[vary].sqrt()

    def describe(self, j: int) -> str:
        """Return one wanted moment and its range, for messages."""
        return f"'{self.names[j]}' wanted {self.moments[j]:g}, range {self.low[j]:g} to {self.high[j]:g}"
