"""One wish: a feature and the moment it should have."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contrastive_align.targets.evaluate import shorten
from contrastive_align.targets.features import resolve_feature


CONSTRAINT_KEYS = ("moment", "pointwise")


@dataclass(frozen=True)
class Constraint:
    """E[feature] = moment; or, pointwise, feature = 1 always.

    Args:
        feature: a :class:`Feature`, or a spec of one (see ``resolve_feature``).
        moment: the mean wanted.
        pointwise: whether the feature itself multiplies the target, b(x) = phi(x), which then is 0 or 1. None: where
            the moment is 1 and the feature is boolean (which a fit reads off the samples if the spec does not say).

    Raises:
        ValueError: a moment that is no finite number, a boolean one outside 0 to 1, or a pointwise one not 1.
    """

    feature: Any
    moment: float
    pointwise: bool | None = None

    def __post_init__(self) -> None:
        feature = resolve_feature(self.feature)
        if isinstance(self.moment, bool) or not isinstance(self.moment, numbers.Real) or not math.isfinite(self.moment):
            raise ValueError(f"The moment of '{feature.name}' is {shorten(self.moment)}, expected a finite number.")
        if self.pointwise not in (True, False, None):
            raise ValueError(f"pointwise of '{feature.name}' is {self.pointwise!r}, expected true, false or nothing.")
        if self.pointwise and (self.moment != 1 or feature.boolean is False):
            found = f"moment={self.moment:g}" if self.moment != 1 else "a feature that is not boolean"
            raise ValueError(
                f"'{feature.name}' is pointwise with {found}, expected moment=1.0 and a feature of 0 and 1: 'always'. "
                "Leave pointwise out for a moment that holds on average."
            )
        if feature.boolean and not 0 <= self.moment <= 1:
            raise ValueError(
                f"The moment of '{feature.name}' is {self.moment:g}, expected 0 to 1: the share of the texts that have "
                "the feature."
            )
        pointwise = self.pointwise
        if pointwise is None and (self.moment != 1 or feature.boolean is not None):
            pointwise = self.moment == 1 and bool(feature.boolean)
        object.__setattr__(self, "feature", feature)
        object.__setattr__(self, "moment", float(self.moment))
        object.__setattr__(self, "pointwise", pointwise)

    @property
    def name(self) -> str:
        return self.feature.name


def resolve_constraint(spec: Any, **resolve_kwargs: Any) -> Constraint:
    """A constraint from a feature's spec with ``moment`` (and ``pointwise``) beside it, or the spec under ``feature``.

    >>> resolve_constraint({"contains": "please", "moment": 0.5}).moment
    0.5

    Raises:
        ValueError: no moment, or what ``resolve_feature`` refuses.
    """
    if isinstance(spec, Constraint):
        return spec
    if not isinstance(spec, Mapping) or "moment" not in spec:
        raise ValueError(
            f"Found {shorten(spec)}, expected a constraint: a feature with its moment, such as "
            "{contains: please, moment: 0.5}."
        )
    rest = {key: value for key, value in spec.items() if key not in CONSTRAINT_KEYS}
    feature = rest["feature"] if set(rest) == {"feature"} else rest
    return Constraint(resolve_feature(feature, **resolve_kwargs), spec["moment"], spec.get("pointwise"))
