"""What the model should be: base, constraints, and the lambdas that make them hold."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_align.targets.constraint import Constraint
from contrastive_align.targets.evaluate import Feature, Text, evaluate_features, shorten
from contrastive_align.targets.features import resolve_feature
from contrastive_align.targets.fit import Fit, fit_lambdas
from contrastive_align.targets.grouping import group_by_prompt
from contrastive_align.targets.pointwise import check_some_satisfy, decide_pointwise, log_b


logger = logging.getLogger(__name__)


class Target:
    r"""An unnormalised distribution over completions, given a prompt c.

    .. math:: P(x|c) = a(x|c) \prod_i b_i(x) \exp(\lambda \cdot \phi(x))

    GDC, arXiv:2012.11635; one lambda for all prompts and one Z for each: CDPG, arXiv:2112.00791. The base a is
    whoever gave the log-probs that :meth:`log_scores` receives. A target knows no model, samples nothing and trains
    nothing.

    Args:
        constraints: J of them, with different names. Their lambdas are unknown until :meth:`fit` or :meth:`load`;
            pointwise ones need none.
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

    def _start(
        self,
        features: list[Feature],
        pointwise: list[bool | None],
        constraints: tuple[Constraint, ...] = (),
        reward_beta: float | None = None,
    ) -> None:
        self.constraints, self.reward_beta = constraints, reward_beta
        self.last_fit: Fit | None = None
        self._features, self._pointwise = tuple(features), pointwise
        self._lambdas = None if reward_beta is None else torch.tensor([1 / reward_beta], dtype=torch.float64)
        self._record: dict[str, Any] = {}

    @classmethod
    def from_reward(cls, feature: Any, beta: float) -> Target:
        """base * exp(r / beta): the optimum of E[r] - beta KL(pi||base), arXiv:2206.00761. Nothing is left to fit."""
        if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not (0 < beta < math.inf):
            raise ValueError(f"beta is {beta!r}, expected a number above 0: the target is base * exp(reward / beta).")
        target = cls.__new__(cls)
        target._start([resolve_feature(feature)], [False], reward_beta=float(beta))
        return target

    @classmethod
    def from_saved(cls, path: str | os.PathLike, functions: Mapping[str, Any] | None = None) -> Target:
        """The target that :meth:`save` wrote, its features made anew from their specs.

        Args:
            functions: name -> feature, for those that were functions of Python and so have no spec.

        Raises:
            ValueError: a feature without a spec is not in ``functions``.
        """
        state = _read(path)
        made = []
        for row in state["constraints"]:
            found = (functions or {}).get(row["name"], row["spec"])
            if found is None:
                raise ValueError(
                    f"{path}: '{row['name']}' was a function of Python, expected it in functions={{name: f}}."
                )
            made.append(replace(resolve_feature(found), name=row["name"]))
        if state["reward_beta"] is not None:
            return cls.from_reward(made[0], state["reward_beta"])
        rows = zip(made, state["constraints"], strict=True)
        return cls([Constraint(feature, row["moment"], row["pointwise"]) for feature, row in rows]).load(path)

    def __str__(self) -> str:
        """
        >>> print(Target([Constraint({"contains": "please"}, moment=0.5)]))
        the base with E[contains:please] = 0.5
        """
        if self.reward_beta is not None:
            return f"base * exp({self.names[0]} / {self.reward_beta:g})"
        wishes = [f"E[{c.name}] = {c.moment:g}" if not c.pointwise else f"always {c.name}" for c in self.constraints]
        return f"the base with {', '.join(wishes)}"

    @property
    def names(self) -> list[str]:
        """J names of features."""
        return [feature.name for feature in self._features]

    @property
    def moments(self) -> Tensor:
        """(J,) wanted; NaN for a reward, of which none is."""
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
        """phi (n, J) float64; see ``evaluate_features``."""
        return evaluate_features(self._features, prompts, completions, **columns)

    def energy(self, phi: Tensor) -> Tensor:
        """log b(x) + lambda . phi(x), (...) float64 nats from phi (..., J); -inf where a pointwise constraint fails.

        Raises:
            ValueError: NaN or infinite features, or a pointwise one that is neither 0 nor 1.
        """
        lambdas = self.lambdas.to(phi.device)
        phi = self._checked(phi)
        return phi @ lambdas + log_b(phi, self._pointwise, self.names)

    def log_scores(self, base_logps: Tensor, phi: Tensor) -> Tensor:
        """log P(x|c) (...), unnormalised: ``base_logps`` (...) nats, summed over tokens, + :meth:`energy`."""
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
        min_ess: float = 20.0,
        correct_bias: bool = False,
        tolerance: float = 1e-10,
        max_iterations: int = 200,
        progress: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> Fit:
        """Find the lambdas from samples; remembered here and returned with their error bars.

        Args:
            phi: (n, J) features of samples of the base, as :meth:`features` gives them, or (C, M, J), M samples for
                each of C prompts.
            log_weights: (n,) or (C, M) nats, log base - log proposal, where the samples are a proposal's.
            prompt_index: (n,) the number of the prompt of each sample, 0 to C - 1. Default: one prompt.
            valid: (C, M) bool, with (C, M, J).
            min_ess, correct_bias, tolerance, max_iterations, progress: see ``fit_lambdas``, which also says what is
                minimised.

        Raises:
            InfeasibleMoment: a moment no lambda reaches on these samples; a pointwise constraint none satisfies.
            ValueError: shapes and values that do not fit, or a target of a reward, which has nothing to fit.
        """
        if self.reward_beta is not None:
            raise ValueError(f"A target of a reward has nothing to fit: lambda = 1 / beta = {1 / self.reward_beta:g}.")
        phi, log_weights, valid = group_by_prompt(phi, log_weights, prompt_index, valid)
        sampled = torch.ones(phi.shape[:2], dtype=torch.bool) if valid is None else valid
        sampled = sampled if log_weights is None else sampled & (log_weights != -torch.inf)
        phi = self._checked(torch.where(sampled.unsqueeze(-1), phi, 1.0))
        pointwise = decide_pointwise(phi[sampled], [c.pointwise for c in self.constraints])
        check_some_satisfy(phi[sampled], pointwise, self.names)
        free = [j for j, always in enumerate(pointwise) if not always]
        fit = fit_lambdas(
            phi[..., free],
            self.moments[free],
            log_weights=log_weights,
            log_b=log_b(phi, pointwise, self.names),
            valid=valid,
            names=[self.names[j] for j in free],
            min_ess=min_ess,
            correct_bias=correct_bias,
            tolerance=tolerance,
            max_iterations=max_iterations,
            progress=progress,
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
            "lambda_se": dict(zip([self.names[j] for j in free], fit.lambda_se.tolist(), strict=True)),
            "moment_se": dict(zip([self.names[j] for j in free], fit.moment_se.tolist(), strict=True)),
        }
        return fit

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

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` and a reader need, of plain Python."""
        rows = []
        for j, feature in enumerate(self._features):
            moment = self.constraints[j].moment if self.constraints else None
            value = None if self._lambdas is None else self._lambdas[j].item()
            here = {"name": feature.name, "spec": feature.spec, "moment": moment}
            rows.append({**here, "pointwise": self._pointwise[j], "lambda": value})
        return {"constraints": rows, "reward_beta": self.reward_beta, "fit": dict(self._record)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the lambdas of a saved target with the same features, moments and beta.

        Raises:
            ValueError: names the first thing that differs.
        """
        rows = state["constraints"]
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
        """Write the target as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".incomplete")
        aside.write_text(json.dumps(self.state_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)
        return path

    def load(self, path: str | os.PathLike) -> Target:
        """Read what :meth:`save` wrote into this target, which must have the same features and moments; returns it."""
        try:
            self.load_state_dict(_read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return self


def _read(path: str | os.PathLike) -> dict[str, Any]:
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"constraints", "reward_beta", "fit"} <= set(state):
            raise ValueError(f"it has {sorted(state)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no saved target, expected what target.save(path) writes: {error}") from error
    return state
