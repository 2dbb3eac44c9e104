"""The target distribution: the base, constraints on features, and the lambdas that make them hold."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_align.registry import hash_of_user
from contrastive_align.targets.evaluate import Feature, Text, evaluate_features, shorten
from contrastive_align.targets.features import resolve_feature
from contrastive_align.targets.fit import Fit, fit_lambdas, group_by_prompt
from contrastive_align.targets.reachable import InfeasibleMoment


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Constraint:
    """A wish about a feature: E[feature] = moment; or, pointwise, feature = 1 always.

    Args:
        feature: a :class:`Feature`, or a spec of one (see ``resolve_feature``).
        moment: the wanted mean.
        pointwise: whether the feature itself, 0 or 1, multiplies the target, b(x) = phi(x). None: if the moment is 1
            and the feature is boolean (a fit decides from the samples if the spec does not say).

    Raises:
        ValueError: the moment is not a finite number, not in 0 to 1 for a boolean feature, or not 1 though pointwise.
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
    """Build a constraint from a feature's spec (or the spec under ``feature``) with ``moment`` and ``pointwise``.

    >>> resolve_constraint({"contains": "please", "moment": 0.5}).moment
    0.5

    Raises:
        ValueError: no moment, or a feature that ``resolve_feature`` refuses.
    """
    if isinstance(spec, Constraint):
        return spec
    if not isinstance(spec, Mapping) or "moment" not in spec:
        raise ValueError(
            f"Found {shorten(spec)}, expected a constraint: a feature with its moment, such as "
            "{contains: please, moment: 0.5}."
        )
    rest = {key: value for key, value in spec.items() if key not in ("moment", "pointwise")}
    feature = rest["feature"] if set(rest) == {"feature"} else rest
    return Constraint(resolve_feature(feature, **resolve_kwargs), spec["moment"], spec.get("pointwise"))


class Target:
    r"""An unnormalised distribution over completions, given a prompt c.

    .. math:: P(x|c) = a(x|c) \prod_i b_i(x) \exp(\lambda \cdot \phi(x))

    GDC, arXiv:2012.11635; one lambda for all prompts and one Z for each: CDPG, arXiv:2112.00791. The base a is
    the model whose log-probs :meth:`log_scores` receives. A target holds no model, and does not sample or train.

    Args:
        constraints: J constraints with different names. Their lambdas are unknown until :meth:`fit` or :meth:`load`;
            pointwise constraints need none.
    """

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        for item in constraints:
            if not isinstance(item, Constraint):
                raise ValueError(
                    f"Found {shorten(item)} among the constraints, expected Constraint(feature, moment). For a "
                    "mapping: resolve_constraint(...)."
                )
        if not constraints:
            raise ValueError("A target needs at least one constraint; for a reward: Target.from_reward(feature, beta).")
        self._start([c.feature for c in constraints], [c.pointwise for c in constraints], tuple(constraints))
        doubled = sorted({name for name in self.names if self.names.count(name) > 1})
        if doubled:
            raise ValueError(
                f"Two constraints are called {doubled[0]!r}. Leave one out or, if they differ, give one feature "
                "another 'name'."
            )
        if all(self._pointwise):
            self._lambdas = torch.zeros(len(self.names), dtype=torch.float64)

    def _start(self, features: list[Feature], pointwise: list[bool | None], constraints=(), reward_beta=None) -> None:
        self.constraints, self.reward_beta = constraints, reward_beta
        self.last_fit: Fit | None = None
        self._features, self._pointwise = tuple(features), pointwise
        self._lambdas = None if reward_beta is None else torch.tensor([1 / reward_beta], dtype=torch.float64)
        self._record: dict[str, Any] = {}

    @classmethod
    def from_reward(cls, feature: Any, beta: float) -> Target:
        """Build base * exp(r / beta), the optimum of E[r] - beta KL(pi||base), arXiv:2206.00761, which needs no fit."""
        if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not (0 < beta < math.inf):
            raise ValueError(f"beta is {beta!r}, expected a number above 0: the target is base * exp(reward / beta).")
        target = cls.__new__(cls)
        target._start([resolve_feature(feature)], [False], reward_beta=float(beta))
        return target

    @classmethod
    def from_saved(cls, path: str | os.PathLike, functions: Mapping[str, Any] | None = None) -> Target:
        """Build the target that :meth:`save` wrote, with its features built again from their specs.

        ``functions`` maps the names of Python functions, which have no spec, to these.

        Raises:
            ValueError: a feature without a spec is not in ``functions``.
        """
        state = _read(path)
        specs = {row["name"]: (functions or {}).get(row["name"], row["spec"]) for row in state["constraints"]}
        missing = next((name for name, spec in specs.items() if spec is None), None)
        if missing is not None:
            raise ValueError(f"{path}: '{missing}' was a function of Python, expected it in functions={{name: f}}.")
        made = [replace(resolve_feature(spec), name=name) for name, spec in specs.items()]
        if state["reward_beta"] is not None:
            return cls.from_reward(made[0], state["reward_beta"])
        rows = zip(made, state["constraints"], strict=True)
        return cls([Constraint(feature, row["moment"], row["pointwise"]) for feature, row in rows]).load(path)

    def __str__(self) -> str:
        """Describe the target in words.

        >>> print(Target([Constraint({"contains": "please"}, moment=0.5)]))
        the base with E[contains:please] = 0.5
        """
        if self.reward_beta is not None:
            return f"base * exp({self.names[0]} / {self.reward_beta:g})"
        wishes = [f"E[{c.name}] = {c.moment:g}" if not c.pointwise else f"always {c.name}" for c in self.constraints]
        return f"the base with {', '.join(wishes)}"

    @property
    def names(self) -> list[str]:
        """The names of the J features."""
        return [feature.name for feature in self._features]

    @property
    def sources(self) -> dict[str, str | None]:
        """The features' names and, of those that are the user's functions, a hash of the source."""
        return {feature.name: hash_of_user(feature.function) for feature in self._features}

    @property
    def moments(self) -> Tensor:
        """(J,) the wanted moments; NaN for a reward, which has none."""
        return torch.tensor([c.moment for c in self.constraints] or [math.nan], dtype=torch.float64)

    @property
    def pointwise(self) -> list[bool | None]:
        """J flags; None where only a fit can tell."""
        return list(self._pointwise)

    @property
    def fitted(self) -> bool:
        """Whether the lambdas are known."""
        return self._lambdas is not None

    @property
    def lambdas(self) -> Tensor:
        """(J,) nats per unit of the feature; 0 for pointwise constraints."""
        if self._lambdas is None:
            raise RuntimeError(
                f"The lambdas of {', '.join(map(repr, self.names))} are not known yet. Call target.fit(phi) with the "
                "features of samples, or target.load(path). (Constraints that are all pointwise=True need neither.)"
            )
        return self._lambdas.clone()

    def features(self, /, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Tensor:
        """Return phi, (n, J) float64; see ``evaluate_features``."""
        return evaluate_features(self._features, prompts, completions, **columns)

    def energy(self, phi: Tensor) -> Tensor:
        """Return log b(x) + lambda . phi(x), (...) nats from phi (..., J); -inf if a pointwise constraint fails.

        Raises:
            ValueError: NaN or infinite features, or a pointwise feature that is neither 0 nor 1.
        """
        lambdas = self.lambdas.to(phi.device)
        phi = self._checked(phi)
        return phi @ lambdas + log_b(phi, self._pointwise, self.names)

    def log_scores(self, base_logps: Tensor, phi: Tensor) -> Tensor:
        """Return log P(x|c), (...) unnormalised: ``base_logps`` (...) nats, summed over tokens, plus :meth:`energy`."""
        if base_logps.shape != phi.shape[:-1]:
            raise ValueError(
                f"base_logps has the shape {tuple(base_logps.shape)} and phi {tuple(phi.shape)}, expected one log-prob "
                "for each row of features."
            )
        if not (base_logps < math.inf).all():
            raise ValueError("base_logps has NaN or +inf entries, expected log-probs of completions under the base.")
        return base_logps.double() + self.energy(phi).to(base_logps.device)

    def fit(
        self,
        phi: Tensor,
        *,
        log_weights: Tensor | None = None,
        prompt_index: Tensor | None = None,
        valid: Tensor | None = None,
        **options: Any,
    ) -> Fit:
        """Find the lambdas from samples, keep them, and return them with their error bars.

        Args:
            phi: (n, J) features of samples of the base, as :meth:`features` gives them, or (C, M, J), M samples for
                each of C prompts.
            log_weights: (n,) or (C, M) nats, log base - log proposal, for samples of a proposal.
            prompt_index: (n,) the number of each sample's prompt, 0 to C - 1. Default: one prompt.
            valid: (C, M) bool, with (C, M, J).
            **options: ``min_ess``, ``correct_bias``, ``tolerance``, ... of ``fit_lambdas``.

        Raises:
            InfeasibleMoment: no lambda reaches a moment on these samples, or none satisfies a pointwise constraint.
            ValueError: shapes or values do not fit, or this is the target of a reward, which needs no fit.
        """
        if self.reward_beta is not None:
            raise ValueError(f"A target of a reward has nothing to fit: lambda = 1 / beta = {1 / self.reward_beta:g}.")
        phi, log_weights, valid = group_by_prompt(phi, log_weights, prompt_index, valid)
        sampled = torch.ones(phi.shape[:2], dtype=torch.bool) if valid is None else valid
        sampled = sampled if log_weights is None else sampled & (log_weights != -torch.inf)
        phi = self._checked(torch.where(sampled.unsqueeze(-1), phi, 1.0))
        boolean = ((phi[sampled] == 0) | (phi[sampled] == 1)).all(0).tolist()
        pointwise = [boolean[j] if c.pointwise is None else c.pointwise for j, c in enumerate(self.constraints)]
        check_some_satisfy(phi[sampled], pointwise, self.names)
        free = [j for j, always in enumerate(pointwise) if not always]
        names = [self.names[j] for j in free]
        fit = fit_lambdas(
            phi[..., free],
            self.moments[free],
            log_weights=log_weights,
            log_b=log_b(phi, pointwise, self.names),
            valid=valid,
            names=names,
            **options,
        )
        if fit.skipped:
            logger.warning(
                f"{len(fit.skipped)} of {len(phi)} prompts had no sample that satisfies the pointwise constraints and "
                f"did not count in the fit, the first being numbers {fit.skipped[:5]}."
            )
        self._pointwise, self.last_fit = pointwise, fit
        self._lambdas = torch.zeros(len(pointwise), dtype=torch.float64)
        self._lambdas[free] = fit.lambdas
        self._record = {
            "ess": fit.ess,
            "samples": fit.samples,
            "prompts": len(phi),
            "skipped_prompts": len(fit.skipped),
            "iterations": fit.iterations,
            "base_moment": dict(zip(names, fit.base_moments.tolist(), strict=True)),
            "lambda_se": dict(zip(names, fit.lambda_se.tolist(), strict=True)),
            "moment_se": dict(zip(names, fit.moment_se.tolist(), strict=True)),
            "biased": [name for name, biased in zip(names, fit.biased.tolist(), strict=True) if biased],
        }
        return fit

    def unsure_moments(self) -> list[str]:
        """Say which moments were fitted on too few samples of each prompt for their standard errors to hold."""
        record = self._record
        return [
            f"moment of {name}: fitted on too few samples of each prompt ({record['samples'] // record['prompts']}); "
            f"it may miss {wanted:g} by more than its standard error says. Raise fit_max_samples, or choose a moment "
            "nearer to the base's."
            for name, wanted in zip(self.names, self.moments.tolist(), strict=True)
            if name in record.get("biased", ())
        ]

    def _checked(self, phi: Tensor) -> Tensor:
        if phi.shape[-1:] != (len(self.names),):
            raise ValueError(
                f"phi has the shape {tuple(phi.shape)}, expected (..., {len(self.names)}) for {self.names}."
            )
        bad = ~torch.isfinite(phi)
        if bad.any():
            *row, j = bad.nonzero()[0].tolist()
            raise ValueError(f"phi{row} of '{self.names[j]}' is {phi[bad][0].item()}, expected a finite number.")
        return phi.double()

    def state_dict(self) -> dict[str, Any]:
        """Return the constraints, lambdas and the record of the fit as plain Python, ready for JSON."""
        moments = [c.moment for c in self.constraints] or [None]
        lambdas = [None] * len(self.names) if self._lambdas is None else self._lambdas.tolist()
        rows = [
            {"name": feature.name, "spec": feature.spec, "moment": moment, "pointwise": pointwise, "lambda": value}
            for feature, moment, pointwise, value in zip(self._features, moments, self._pointwise, lambdas, strict=True)
        ]
        return {"constraints": rows, "reward_beta": self.reward_beta, "fit": dict(self._record)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the lambdas of a saved target with the same features, moments and beta.

        Raises:
            ValueError: names the first difference.
        """
        rows = state["constraints"]
        if self.reward_beta is not None and [row["name"] for row in rows] == [f"1*{name}" for name in self.names]:
            rows = [_only_part(row) for row in rows]
        if [row["name"] for row in rows] != self.names:
            raise ValueError(f"it has the features {[row['name'] for row in rows]}, this target has {self.names}.")
        if state["reward_beta"] != self.reward_beta:
            raise ValueError(f"it has the reward's beta {state['reward_beta']}, this target has {self.reward_beta}.")
        for j, row in enumerate(rows):
            here = {"spec": self._features[j].spec}
            if self.constraints:
                here |= {"moment": self.constraints[j].moment, "pointwise": self.constraints[j].pointwise}
            for key, value in here.items():
                if row[key] != value and (key == "moment" or None not in (row[key], value)):
                    raise ValueError(
                        f"it has the {key} {shorten(row[key])} for '{row['name']}', this target has {shorten(value)}. "
                        "Fit anew, or give the constraint that was saved."
                    )
        values = [row["lambda"] for row in rows]
        self._lambdas = None if None in values else torch.tensor(values, dtype=torch.float64)
        self._pointwise = [row["pointwise"] for row in rows]
        self._record, self.last_fit = dict(state["fit"]), None

    def save(self, path: str | os.PathLike) -> Path:
        """Write the target as JSON, atomically, and return the path."""
        from contrastive_align.data.atomic import atomic_write  # with its package come datasets and transformers

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write((json.dumps(self.state_dict(), indent=2, ensure_ascii=False) + "\n").encode())
        return path

    def load(self, path: str | os.PathLike) -> Target:
        """Read a file of :meth:`save` into this target, which must have the same features and moments; return it."""
        try:
            self.load_state_dict(_read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return self


def _only_part(row: dict[str, Any]) -> dict[str, Any]:
    """Return the saved sum 1*r of a single reward as r, which is the same target."""
    spec = row["spec"]
    return {**row, "name": row["name"].removeprefix("1*"), "spec": spec and spec["sum"][0][1]}


def _read(path: str | os.PathLike) -> dict[str, Any]:
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"constraints", "reward_beta", "fit"} <= set(state):
            raise ValueError(f"it has {sorted(state)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no saved target, expected what target.save(path) writes: {error}") from error
    return state


def log_b(phi: Tensor, pointwise: Sequence[bool | None], names: Sequence[str]) -> Tensor:
    """Return log b, (...) float64: 0 where all pointwise features of phi (..., J) are 1, else -inf.

    Raises:
        ValueError: a pointwise feature is neither 0 nor 1.

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
    """Raise :class:`InfeasibleMoment` if no row of phi (n, J) satisfies all pointwise constraints, so that Z = 0."""
    n, places = len(phi), [j for j, flag in enumerate(pointwise) if flag]
    if not n or (phi[:, places] == 1).all(-1).any():
        return
    each = ", ".join(f"'{names[j]}' by {int(phi[:, j].sum())} of {n}" for j in places)
    raise InfeasibleMoment(
        f"None of {n} samples satisfies the pointwise constraints{' together' * (len(places) > 1)}, so that Z = 0: "
        f"{each}. Draw more samples, from a proposal that satisfies them (a prompt asking for it), or lower a moment."
    )
