"""A policy tuned towards a target, whose samples are accepted by quasi-rejection sampling: ``sample --qrs``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import TrainerState

from contrastive_align import losses
from contrastive_align.data.formats import Text
from contrastive_align.launch.ask import load_trained
from contrastive_align.launch.trained import GREEDY, Trained
from contrastive_align.launch.usage import UsageError
from contrastive_align.models.loading import eos_token_ids
from contrastive_align.sampling import PolicyProposal, QRSEstimate, QuasiRejectionSampler, choose_beta
from contrastive_align.sampling.adjust import Adjustment
from contrastive_align.sampling.decode import seed_of
from contrastive_align.targets import Target, columns_of


ACCEPTANCE = 0.5  # wished, where nothing else is and the run measured no beta
PILOT = 64  # samples of a prompt from which its log Z is estimated
PROMPTS_FOR_BETA = 32  # prompts, chosen at random, from whose samples beta is found
BUDGET = 20  # times the expected number of proposals, after which a prompt is given up


def feasible_beta(scores: Tensor, logps: Tensor, log_z: Tensor, *, acceptance: float) -> tuple[QRSEstimate, str | None]:
    """Find the beta for an acceptance rate, or for the highest there is; then also say that it is not the wished one.

    Args:
        scores, logps: (C, M) nats, of the target and of the proposal.
        log_z: (C,) nats, finite.
    """
    chosen = choose_beta(scores, logps, acceptance=acceptance, log_z=log_z, at_most=True)
    if chosen.acceptance_rate >= acceptance - 1e-9:
        return chosen, None
    return chosen, accepts_less(f"{chosen.acceptance_rate:.3g}", acceptance)


def accepts_less(rate: str, wished: float) -> str:
    """Say that QRS accepts samples at a lower rate than the wished one, and why."""
    return (
        f"QRS accepts {rate} and not the wished {wished:g}: the target allows no more of the tuned policy's samples. "
        "Train longer for more"
    )


class AcceptedAnswers(Trained):
    """The model of an f-DPG run; of its samples those are answers that quasi-rejection sampling accepts.

    Args:
        folder: of the run, with its model, ``target.json`` and ``summary.json``.
        acceptance, tv, qrs_beta: the wished rate, the wished total variation distance from the target, or beta in the
            scale of the run's table; at most one. By default the beta of that table, or else ``ACCEPTANCE``.

    Raises:
        UsageError: the folder is not that of an f-DPG run.
    """

    def __init__(
        self,
        folder: str,
        *,
        acceptance: float | None = None,
        tv: float | None = None,
        qrs_beta: float | None = None,
        **options: Any,
    ) -> None:
        for name in ("target.json", "summary.json"):
            if not (Path(folder) / name).is_file():
                raise UsageError(f"{folder} has no {name}: --qrs takes the output_dir of contrastive-align fdpg.")
        super().__init__(folder, **options)
        self.target = Target.from_saved(Path(folder) / "target.json")
        self.run = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        start = self.run["model"]
        loading = {name: value for name, value in options.items() if name in ("dtype", "trust_remote_code")}
        self.base = None  # a model with its adapter off
        if not is_peft_model(self.model) or start.get("adapter"):
            base, _ = load_trained(start.get("start_adapter") or start["start"], **loading)
            self.base = base.to(self.model.device).eval()
        measured = self.run.get("distributions", {}).get("tuned+QRS", {}).get("beta", {})
        if acceptance is tv is qrs_beta is None:
            qrs_beta = measured.get("value")
        self.acceptance = ACCEPTANCE if tv is None and acceptance is None else acceptance
        self.tv, self.beta = tv, qrs_beta
        self.chosen = ""  # what is said about beta
        self.proposed = self.accepted = 0
        self.rates: list[float] = []  # of the prompts that were answered last

    @property
    def max_completion_length(self) -> int:
        """The longest completion that the target was made for."""
        return self.run["method"]["max_completion_length"]

    def choose_beta(self, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Text], **options: Any) -> None:
        """Find beta from samples of a random choice of prompts, unless it was given.

        Under truncation acceptance and distance are those given the completions that it leaves: the others have no
        samples, and their mass under the target is not counted.

        Args:
            options: as :meth:`answer` is given.
        """
        if self.beta is not None:
            self.chosen = f"beta {self.beta:.3g}"
            return
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        places = sorted(order[:PROMPTS_FOR_BETA])
        proposal = self._proposal("beta", options)
        some, scores, logps, log_z = self._pilot(proposal, [rows[i] for i in places], [prompts[i] for i in places])
        if not some.any():
            raise UsageError("No sample has mass under the target: train longer, or measure with fewer constraints.")
        remark = None
        if self.tv is not None:
            chosen = choose_beta(scores[some], logps[some], tvd=self.tv, log_z=log_z[some])
        else:
            chosen, remark = feasible_beta(scores[some], logps[some], log_z[some], acceptance=self.acceptance)
        self.beta = chosen.beta
        given = " given what the options leave" if proposal.adjustment.truncates else ""
        self.chosen = (
            f"beta {chosen.beta:.3g}, found on {len(places)} prompts x {PILOT} samples: acceptance "
            f"{chosen.acceptance_rate:.3f} +- {chosen.acceptance_rate_se:.3f}, TV to the target{given} "
            f"{chosen.tvd:.3f} +- {chosen.tvd_se:.3f}"
        ) + (f"\nnote: {remark}." if remark else "")

    def answer(
        self,
        prompts: Sequence[Text],
        numbers: Sequence[Any],
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        per_prompt: int = 1,
        **options: Any,
    ) -> tuple[list[list[str]], list[list[bool]]]:
        """Sample answers that are accepted; ``per_prompt`` of each prompt, or fewer where the budget ends before.

        Args:
            rows: of the prompts, whose columns the features read.
            options: as of :class:`Trained`, for what is proposed.
        """
        proposal = self._proposal(tuple(numbers), options)
        some, scores, logps, log_z = self._pilot(proposal, rows, prompts)
        texts: list[list[str]] = [[] for _ in prompts]
        ended: list[list[bool]] = [[] for _ in prompts]
        self.rates = [0.0] * len(prompts)
        places = some.nonzero().flatten().tolist()
        if not places:
            return texts, ended
        log_accept = scores[some] - logps[some] - log_z[some].unsqueeze(1) - math.log(self.beta)
        expected = float(log_accept.clamp(max=0).exp().mean())
        sampler = QuasiRejectionSampler(
            self.target, proposal, self.beta, log_z=log_z[some], batch_size=math.ceil(per_prompt / expected)
        )
        chosen = [rows[i] for i in places]
        result = sampler.sample(
            [prompts[i] for i in places],
            per_prompt,
            budget=math.ceil(BUDGET * per_prompt / expected),
            columns=columns_of(chosen, 1),
            keywords={"trainer_state": TrainerState()},
            generator=torch.Generator().manual_seed(proposal.seed),
        )
        self.proposed += int(result.proposed.sum())
        self.accepted += int(result.accepted.sum())
        for place, rate in zip(places, result.acceptance_rates.tolist(), strict=True):
            self.rates[place] = rate
        ends = set(proposal.eos_token_ids)
        for i, ids in zip(result.samples.prompt_index.tolist(), result.samples.completion_ids, strict=True):
            texts[places[i]].append(self.tokenizer.decode(ids, skip_special_tokens=True))
            ended[places[i]].append(ids[-1] in ends)
        return texts, ended

    def _proposal(self, what: Any, options: Mapping[str, Any]) -> PolicyProposal:
        given = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
        if given.get("temperature") == 0:
            given |= {"temperature": 1.0, "top_p": GREEDY}
        return PolicyProposal(
            self.model,
            self.tokenizer,
            base=self.base,
            max_new_tokens=options.get("max_new_tokens", self.max_completion_length),
            seed=seed_of(self.seed, "qrs", what),
            eos_token_ids=eos_token_ids(self.model, self.tokenizer),
            adjustment=Adjustment(**given),
        )

    def _pilot(
        self, proposal: PolicyProposal, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Text]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return which prompts (C,) have mass, scores and log-probs (C, M) of samples, and log Z (C,)."""
        samples = proposal.sample(prompts, PILOT)
        phi = self.target.features(
            [prompts[i] for i in samples.prompt_index.tolist()],
            samples.completions,
            completion_ids=samples.completion_ids,
            trainer_state=TrainerState(),
            **columns_of(rows, PILOT),
        )
        scores = self.target.log_scores(samples.base_logps, phi).view(len(prompts), PILOT)
        logps = samples.logps.view(len(prompts), PILOT)
        log_z = losses.estimate_log_z(logps, scores, correct_bias=False).value
        return torch.isfinite(log_z), scores, logps, log_z
